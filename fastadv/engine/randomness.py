"""Noticing the random numbers that a model draws, from any generator. No copy is made of such a model.

The draws of torch's functions are seen when the functions are called. So numbers that other threads draw meanwhile
do not matter. Draws from Python's and numpy's generators, and from generators that a model owns, are seen by the
generators' states.
"""

from __future__ import annotations

import functools
import inspect
import random
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fastadv.engine.compiled_parts import is_compiled_wrapper
from fastadv.engine.hidden_draws import gradient_runs_others_code, may_hide_draws
from fastadv.engine.named_code import content_of, named_by, names_one_of
from fastadv.engine.networks import attributes_of
from fastadv.engine.operands import marked_by, tensors_in
from fastadv.engine.replaced_functions import replaced_function

# Runs of the model after which a generator whose state changes each time counts as one that the model draws from.
_TRIES = 3
# Functions of torch.nn.functional that draw inside, each with the argument that switches the drawing on.
_SWITCHED = {
    "dropout": ("training", 2, True),
    "alpha_dropout": ("training", 2, False),
    "feature_alpha_dropout": ("training", 2, False),
    "dropout1d": ("training", 2, True),
    "dropout2d": ("training", 2, True),
    "dropout3d": ("training", 2, True),
    "rrelu": ("training", 3, False),
    "scaled_dot_product_attention": ("dropout_p", 4, 0.0),
}
_DRAWING = frozenset(
    ("gumbel_softmax", "fractional_max_pool2d", "fractional_max_pool3d", "trunc_normal_", "xavier_uniform_",
     "xavier_normal_", "kaiming_uniform_", "kaiming_normal_", "orthogonal_", "sparse_")
)  # fmt: skip
_NO_DRAW = frozenset(("multi_head_attention_forward", "lstm", "gru", "rnn_tanh", "rnn_relu"))


def draws(function: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call of a torch function draws random numbers."""
    if name in _SWITCHED:
        keyword, place, default = _SWITCHED[name]
        return bool(kwargs.get(keyword, args[place] if len(args) > place else default))
    if name == "multi_head_attention_forward":
        called = inspect.signature(function).bind(*args, **kwargs).arguments
        return bool(called.get("training", True) and called.get("dropout_p", 0.0))
    return name in _DRAWING or (name not in _NO_DRAW and _is_seeded(name))


# Whether torch marks an operator of a name as drawing from a generator.
_is_seeded = marked_by(torch.Tag.nondeterministic_seeded)
_GRADIENTS = frozenset(("grad", "backward"))
_RECURRENT = frozenset(("lstm", "gru", "rnn_tanh", "rnn_relu"))  # which may have dropout inside


class DrawWatch(TorchFunctionMode):
    """Watches the calling thread until it first draws a random number by a function of torch.

    Operators and backward methods of others count as drawing.

    Args:
        on_draw: called once, before that number is drawn.
    """

    def __init__(self, on_draw: Callable[[], object]) -> None:
        super().__init__()
        self._on_draw: Callable[[], object] | None = on_draw
        self._seen_gradient = False  # later ones are of the same network

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one function."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling() or self._on_draw is None:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        may_draw = name in _RECURRENT or may_hide_draws(func)
        if name in _GRADIENTS and not self._seen_gradient:
            self._seen_gradient = True
            may_draw = gradient_runs_others_code(tensors_in(args[:1]))
        if may_draw or draws(func, name, args, kwargs):
            on_draw, self._on_draw = self._on_draw, None
            on_draw()
        return func(*args, **kwargs)


def can_be_watched(model: object) -> bool:
    """Whether a model or another callable computes the same while a `TorchFunctionMode` watches.

    Replaced functions of torch would run twice under it, and some code asks whether there is such a mode.
    """
    return replaced_function() is None and not code_names(model, _ABOUT_MODES)


def draws_can_be_watched(model: object) -> bool:
    """Whether `DrawWatch` sees a model's draws: it sees no scripted or compiled parts, and no other threads."""
    return can_be_watched(model) and not _reaches_hidden_draws(model, set(), depth=4)


def seeds_generators(model: object) -> bool:
    """Whether the code of a model names functions that seed a generator.

    `DrawWatch` sees no such call. At the first draw, a generator that the model has brought to the state that it
    had before looks untouched.
    """
    return code_names(model, _SEEDING)


_ABOUT_MODES = frozenset(
    ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic",
     "_get_current_function_mode_stack", "_get_current_function_mode", "_len_torch_function_stack",
     "_is_torch_function_mode_enabled")
)  # fmt: skip
_SEEDING = frozenset(
    ("manual_seed", "manual_seed_all", "seed", "seed_all", "seed_everything", "set_rng_state",
     "set_rng_state_all", "set_state", "fork_rng")
)  # fmt: skip
# What was found in the code of each callable.
_named: weakref.WeakKeyDictionary[Any, dict[frozenset[str], bool]] = weakref.WeakKeyDictionary()


def code_names(model: object, words: frozenset[str]) -> bool:
    """As `names_one_of`; looked for once."""
    try:
        known = _named.setdefault(model, {})
    except TypeError:  # some objects have no weak references, or no hash
        known = {}
    if words not in known:
        known[words] = names_one_of(model, words)
    return known[words]


def _hides_draws(part: object) -> bool:
    scripted = (torch.jit.ScriptModule, torch.jit.ScriptFunction, nn.DataParallel)
    if isinstance(part, types.FunctionType | types.MethodType):
        return hasattr(part, "_torchdynamo_orig_callable")
    compiled = isinstance(part, nn.Module) and part._compiled_call_impl is not None
    return compiled or isinstance(part, scripted) or is_compiled_wrapper(part)


def _reaches_hidden_draws(value: object, seen: set[int], depth: int) -> bool:
    """Whether a callable holds or names such a part."""
    if id(value) in seen or type(value) in weakref.ProxyTypes:
        return False
    if isinstance(value, (torch.Tensor, types.ModuleType)):
        return False
    seen.add(id(value))
    if _hides_draws(value):
        return True
    if isinstance(value, nn.Module):
        modules = list(value.modules())
        seen.update(map(id, modules))
        own = [m for m in modules if not type(m).__module__.startswith("torch.")]
        held = [part for m in own for part in (*vars(m).values(), type(m).forward)]
        return any(map(_hides_draws, modules)) or any(
            _reaches_hidden_draws(part, seen, depth - 1) for part in held
        )
    if depth == 0:
        return False
    items = _items(value)
    if isinstance(value, functools.partial):
        items = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, types.MethodType):
        items = [value.__func__, value.__self__]
    elif isinstance(value, types.FunctionType):
        named = (value.__globals__.get(name) for name in value.__code__.co_names)
        items.extend(found for found in named if found is not None)
    elif not isinstance(value, type) and callable(value):
        items.append(vars(type(value)).get("__call__"))
    return any(_reaches_hidden_draws(item, seen, depth - 1) for item in items)


def drawing_generator(model: nn.Module, run: Callable[[], object]) -> str | None:
    """Which of numpy's or the model's own generators the model draws from; None if it draws from none of them.

    Args:
        model: the model, whose attributes are searched for generators.
        run: runs the model once; called again only where a state has changed, which another thread can have done.
    """
    own = dict(_own_generators(model))
    own[id(np.random)] = ("numpy's generator", _numpy_state)
    own[id(random)] = ("Python's generator", random.getstate)
    suspects = set(own)
    for _ in range(_TRIES):
        before = {key: own[key][1]() for key in suspects}
        run()
        suspects = {key for key in suspects if own[key][1]() != before[key]}
        if not suspects:
            return None
    return own[min(suspects)][0]


def shared_states() -> tuple[Any, ...]:
    """The states of Python's and numpy's generators, which all code shares."""
    return random.getstate(), _numpy_state()


def generator_states(model: object, device: torch.device) -> tuple[Any, ...]:
    """The states of all generators from which a model or another callable may draw.

    Args:
        model: of a module, also the generators that it owns are looked for.
        device: on which it runs.
    """
    owned = dict(_own_generators(model)) if isinstance(model, nn.Module) else {}
    torchs = [torch.get_rng_state()]
    torchs += [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    own = [state() for _, state in owned.values()]
    return (*shared_states(), *(state.numpy().tobytes() for state in torchs), *own)


def _numpy_state() -> bytes:
    state: Any = np.random.get_state()
    return state[1].tobytes() + repr(state[2:]).encode()


Generator = tuple[str, Callable[[], Any]]  # its name, and a function that reads its state


def _own_generators(model: nn.Module) -> Iterator[tuple[int, Generator]]:
    """Generators that the modules hold, their configuration objects included, or that their code names."""
    seen: set[int] = set()
    for module in model.modules():
        for name, value in vars(module).items():
            yield from _generators_in(value, f"{type(module).__name__}.{name}", seen, depth=3)
    for name, value in named_by(model):
        yield from _generators_in(value, name, seen, depth=1)


def _generators_in(
    value: Any, name: str, seen: set[int], depth: int
) -> Iterator[tuple[int, Generator]]:
    if id(value) in seen or type(value) in weakref.ProxyTypes:
        return  # the object of a weak proxy may be gone, and belongs to somebody else
    if isinstance(value, (torch.Tensor, nn.Module, type, types.ModuleType)):
        return
    seen.add(id(value))
    if isinstance(value, random.SystemRandom):
        return  # has no state; the recorder sees it read the system's numbers
    if isinstance(value, random.Random):
        yield id(value), (name, value.getstate)
    elif isinstance(value, np.random.Generator):
        yield id(value), (name, lambda: str(value.bit_generator.state))
    elif isinstance(value, np.random.RandomState):
        yield id(value), (name, lambda: repr(value.get_state(legacy=False)))
    elif isinstance(value, torch.Generator):
        yield id(value), (name, lambda: value.get_state().tolist())
    elif depth > 0:
        for item in _items(value):
            yield from _generators_in(item, name, seen, depth - 1)


def _items(value: Any) -> list[Any]:
    """The parts of a container or of a plain object."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    if isinstance(value, types.FunctionType):
        return [content_of(cell) for cell in value.__closure__ or ()]
    if isinstance(value, (types.MethodType, types.BuiltinMethodType)):  # such as `generator.random`
        return [value.__self__]
    return list(attributes_of(value).values())
