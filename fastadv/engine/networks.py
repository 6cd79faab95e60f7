"""Find the networks that a model runs: itself, and those that it holds or names without registering them.

A network in a plain list, in a closure or in a global variable is no submodule. `eval()` and `parameters()` do not
reach it, and yet its mode and its buffers decide the model's result.
"""

from __future__ import annotations

import dis
import functools
import types
import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

_DEEPEST = 4  # steps from the model to a network that it holds
_MOST = 2000  # objects that are looked at
_LONGEST = 64  # a longer container holds data
# The attributes that torch itself keeps in a module, beside those of the module's own code.
TORCHS_ATTRIBUTES = frozenset(vars(nn.Module())) - {"training"}
# Types of attributes in which nothing is hidden.
SIMPLE = frozenset((bool, int, float, str, type(None), Tensor))
_PLAIN = (bool, int, float, complex, str, bytes, type(None), Tensor, type, types.ModuleType)


def networks_of(model: object) -> list[nn.Module]:
    """The networks that a model or another callable runs, as far as they can be found.

    Returns:
        The model, if it is a module; then modules that belong to no module before them.
    """
    return _found(model)[0]


def parts_of(model: object) -> list[nn.Module]:
    """All modules of the networks that a model or another callable runs, each once."""
    return _found(model)[1]


def _found(model: object) -> tuple[list[nn.Module], list[nn.Module]]:
    """The results of `networks_of` and `parts_of`; attacks search often, and one walk does for both."""
    networks = [model] if isinstance(model, nn.Module) else []
    own = modules_of(model) if isinstance(model, nn.Module) else None
    parts = {id(part): part for part in own or ()}
    for network in _NetworkSearch().hidden(model, own):
        if id(network) not in parts:
            networks.append(network)
            parts.update((id(part), part) for part in modules_of(network))
    return networks, list(parts.values())


def modules_of(network: nn.Module) -> list[nn.Module]:
    """As `torch.nn.Module.modules`, in a fraction of its time."""
    found = {id(network): network}
    waiting = [network]
    while waiting:
        children = waiting.pop()._modules
        if not isinstance(children, dict):  # of a scripted module
            return list(network.modules())
        for child in children.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                waiting.append(child)
    return list(found.values())


def switched_to_train_mode(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The parts in train mode, each with its name, whose parents are in eval mode.

    Code that means the part's train mode writes so, such as Monte Carlo dropout: `model.eval()`, then `train()` of
    each dropout.
    """
    for parent in modules_of(model):
        if getattr(parent, "training", True):  # frozen scripts have no mode
            continue
        children = parent._modules
        named = children.items() if isinstance(children, dict) else parent.named_children()
        for name, child in named:
            if child is not None and getattr(child, "training", False):
                yield name, child


def depends_on_mode(kind: type[nn.Module]) -> bool:
    """Whether the code of a class of modules reads `training`, as dropout and BatchNorm do."""
    own = kind.__mro__[: kind.__mro__.index(nn.Module)]
    functions = (f for parent in own for f in vars(parent).values())
    return any(
        isinstance(f, types.FunctionType) and "training" in f.__code__.co_names for f in functions
    )


class _NetworkSearch:
    """One search, which looks at no object twice."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def hidden(
        self, value: object, parts: list[nn.Module] | None = None, depth: int = _DEEPEST
    ) -> Iterator[nn.Module]:
        """Modules within an object that is no module; of a module those that are not registered.

        Args:
            value: the object.
            parts: its modules, if it is one and they are known.
            depth: steps from it that are taken.
        """
        if isinstance(value, nn.Module):
            parts = modules_of(value) if parts is None else parts
            self._seen.update(map(id, parts))
            for part in parts:
                for item in held_by(part):
                    yield from self._at(item, depth - 1)
        else:
            yield from self._at(value, depth)

    def _at(self, value: object, depth: int) -> Iterator[nn.Module]:
        # The object of a weak proxy may be gone, and belongs to somebody else.
        if type(value) in weakref.ProxyTypes or isinstance(value, _PLAIN):
            return
        if id(value) in self._seen or len(self._seen) >= _MOST:
            return
        self._seen.add(id(value))
        if isinstance(value, nn.Module):
            yield value
            yield from self.hidden(value, depth=depth)
        elif depth > 0:
            for item in items_of(value):
                yield from self._at(item, depth - 1)


def held_by(module: nn.Module) -> list[object]:
    """The objects that a module's own code keeps in it or names. torch's modules hide nothing unless patched."""
    attributes, kind = vars(module), type(module)
    if (kind.__module__ or "").startswith("torch."):
        return [attributes["forward"]] if "forward" in attributes else []
    own = [
        v
        for name, v in attributes.items()
        if type(v) not in SIMPLE and name not in TORCHS_ATTRIBUTES
    ]
    return [*own, kind.forward]


def items_of(value: Any) -> list[object]:
    """The parts of a container, of a function or of a plain object."""
    if isinstance(value, dict):
        return list(value.values()) if len(value) <= _LONGEST else []
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value) if len(value) <= _LONGEST else []
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, types.FunctionType):
        return _named_by(value)
    call = vars(type(value)).get("__call__")
    return [
        *attributes_of(value).values(),
        *([call] if isinstance(call, types.FunctionType) else []),
    ]


def attributes_of(value: object) -> dict[str, Any]:
    """The attributes of an object alone, which is not asked for them: its ``__getattr__`` may raise anything."""
    return vars(value) if type(value).__dictoffset__ else {}


def _named_by(function: types.FunctionType) -> list[object]:
    """Variables of the functions around it, defaults, and global variables of its code."""
    if (function.__module__ or "").startswith("torch."):
        return []
    found: list[object] = [
        *(function.__defaults__ or ()),
        *(function.__kwdefaults__ or {}).values(),
    ]
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            continue
    found.extend(_globals_of(function.__code__, function.__globals__))
    if "__wrapped__" in vars(function):
        found.append(vars(function)["__wrapped__"])
    return found


def _globals_of(code: types.CodeType, names: dict[str, Any]) -> Iterator[object]:
    """The global variables that code reads, the functions within it included, apart from plain ones."""
    mentioned = {name for name in code.co_names if not isinstance(names.get(name), _PLAIN)}
    if mentioned:  # some as attributes
        yield from (names[name] for name in mentioned & _read_by(code))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _globals_of(constant, names)


@functools.lru_cache(maxsize=4096)
def _read_by(code: types.CodeType) -> frozenset[str]:
    """The names of the global variables that code reads."""
    steps = dis.get_instructions(code)
    return frozenset(step.argval for step in steps if step.opname == "LOAD_GLOBAL")
