"""Hold a live model still for the time of an attack, and leave it as it was whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn

from fastadv.engine.kept_attributes import kept_attributes
from fastadv.engine.networks import modules_of, parts_of
from fastadv.engine.operands import storage_of
from fastadv.engine.randomness import DrawWatch

_PLAIN_TENSORS = (torch.Tensor, nn.Parameter)
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextmanager
def frozen(
    model: object,
    *,
    train_mode: bool = False,
    keep_state: bool = True,
    freeze_parameters: bool = False,
    keep_parameters: bool = False,
    seed: int | None = None,
    watch: bool = False,
    keep_attributes: bool = False,
) -> Iterator[None]:
    """Set a module's mode and hold its state; restore all of it on leaving, exceptions included.

    On leaving, every module has its own mode and the tensors in its attributes back, every parameter its own
    ``requires_grad``, and every buffer its own value. A module with a ``train`` method of its own, which may do
    more than to set the mode, is called to go back.
    All but the mode also holds for networks that the model runs without having registered them, and for those of
    another callable; see `fastadv.engine.networks`. Their mode is the caller's.

    Args:
        model: an ``nn.Module``, or another callable.
        train_mode: run in train instead of eval mode.
        keep_state: put the buffers and the tensors in attributes back on leaving. If a weight or a buffer had
            another value, all plain attributes go back, since they may tell of it.
        freeze_parameters: inside, no parameter requires grad, so that gradients of the images alone are computed.
        keep_parameters: put the values and gradients of the parameters back on leaving. Inside, they have no
            gradient.
        seed: seed of the random numbers that the model draws inside, such as dropout's in train mode. The caller's
            random state is restored. None does not touch the random state.
        watch: do not touch the random state until the model draws.
        keep_attributes: put back all plain attributes of the registered modules, not only those that held tensors.

    Raises:
        ValueError: if the model has lazy modules, whose weights have no shape yet.
    """
    parts = parts_of(model)
    if isinstance(model, nn.Module):
        _refuse_lazy_weights(model, parts)
    written: list[torch.Tensor] = []  # weights and buffers whose values have been put back
    with ExitStack() as stack:
        stack.enter_context(_own_parametrized_weights())
        if parts:
            stack.enter_context(_in_mode(model, parts, train_mode))
            if keep_state:
                own = modules_of(model) if keep_attributes and isinstance(model, nn.Module) else []
                if len(own) < len(parts):
                    held = set(map(id, own))
                    hidden = [part for part in parts if id(part) not in held]
                    stack.enter_context(kept_attributes(hidden, lambda: not written))
                    stack.enter_context(_kept_structure(hidden, lambda: bool(written)))
                if own:
                    stack.enter_context(kept_attributes(own, tensors_only=False))
                    stack.enter_context(_kept_structure(own))
                stack.enter_context(_kept_buffers(parts, written))
            if keep_parameters:
                stack.enter_context(kept_parameters(parameters_of(parts), written))
            if freeze_parameters:
                for parameter in parameters_of(parts):
                    parameter.requires_grad_(False)
        if seed is not None:
            seeded = _forked_at_first_draw if watch else _forked_random_state
            stack.enter_context(seeded(model, seed))
        yield


@contextmanager
def _own_parametrized_weights() -> Iterator[None]:
    """Keep weights that are computed inside out of the cache of `torch.nn.utils.parametrize.cached`.

    The caller's next pass would take them from there, and they may have no gradient in the parameters.
    """
    if not torch.nn.utils.parametrize._cache_enabled:
        yield
        return
    before = torch.nn.utils.parametrize._cache
    torch.nn.utils.parametrize._cache = dict(before)
    try:
        yield
    finally:
        torch.nn.utils.parametrize._cache = before


def _refuse_lazy_weights(model: nn.Module, parts: Sequence[nn.Module]) -> None:
    held = (parameter for part in parts for parameter in part._parameters.values())
    if not any(nn.parameter.is_lazy(parameter) for parameter in held if parameter is not None):
        return
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise ValueError(
                f"model must have all its weights, got {name!r} without a shape; call the model "
                "once on a batch of images first"
            )


@contextmanager
def in_mode(model: object, train_mode: bool = False) -> Iterator[None]:
    """Set a module's mode; on leaving, its modules have their own modes back, its parameters ``requires_grad``.

    Around several uses of `frozen`, it calls the model's own ``train`` method once for all of them.
    """
    with _in_mode(model, parts_of(model), train_mode):
        yield


@contextmanager
def _in_mode(model: object, parts: Sequence[nn.Module], training: bool) -> Iterator[None]:
    modes = [(module, module.training) for module in parts if hasattr(module, "training")]
    wanted = [(p, p.requires_grad) for p in parameters_of(parts)]
    try:
        # Only if needed: some models empty their caches when their mode is set.
        in_mode = all(before == training for _, before in modes)
        if isinstance(model, nn.Module) and not in_mode and _has_other_mode(model, training):
            _train(model, training)
        yield
    finally:
        # Some merge weights in eval mode and part them in train mode. The order is from the outside in.
        for module, before in modes:
            if module.training != before and _trains_by_itself(module):
                _train(module, before)
        for module, before in modes:
            module.training = before
        for parameter, requires_grad in wanted:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)


def _has_other_mode(model: nn.Module, training: bool) -> bool:
    # Frozen scripted modules have no mode.
    return any(getattr(m, "training", training) != training for m in modules_of(model))


def _train(module: nn.Module, training: bool) -> None:
    with suppress(NotImplementedError):  # exported programs have only one mode
        if training:
            module.train()
        else:
            module.eval()  # which some override, not `train`


def _trains_by_itself(module: nn.Module) -> bool:
    """Whether a module has a ``train`` or ``eval`` method of its own."""
    kind = type(module)
    own = kind.train is not nn.Module.train or kind.eval is not nn.Module.eval
    return own or not vars(module).keys().isdisjoint(("train", "eval"))


def parameters_of(parts: Sequence[nn.Module]) -> list[nn.Parameter]:
    """The parameters of modules, each once, without those made in inference mode, which autograd refuses."""
    found = [p for part in parts for p in part._parameters.values() if p is not None]
    # Lazy ones cannot be asked. `frozen` refuses those of the model.
    found = [p for p in found if nn.parameter.is_lazy(p) or not p.is_inference()]
    return list({id(parameter): parameter for parameter in found}.values())


@contextmanager
def _kept_buffers(parts: Sequence[nn.Module], written: list[torch.Tensor]) -> Iterator[None]:
    """Keep the buffers' identities and values, also where a module updates them in eval mode.

    Args:
        parts: the modules.
        written: gets those whose value was another one on leaving, or that were exchanged.
    """
    modules = [(module, dict(module._buffers.items())) for module in parts]
    saved = [
        (module, name, buffer, buffer.data, buffer.clone())
        for module, buffers in modules
        for name, buffer in buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, buffers in modules:
            # The buffers of a scripted module are no dict. It gets no new ones.
            if not isinstance(module._buffers, dict):
                continue
            for name in [n for n in module._buffers if n not in buffers]:
                del module._buffers[name]
            others = (b for n, b in buffers.items() if module._buffers.get(n) is not b)
            written.extend(b for b in others if b is not None)
            module._buffers.update({n: b for n, b in buffers.items() if b is None})
        for module, name, buffer, home, value in saved:
            if _put_back(buffer, home, value):
                written.append(buffer)
            module._buffers[name] = buffer


@contextmanager
def kept_parameters(
    parameters: Sequence[nn.Parameter], written: list[torch.Tensor] | None = None
) -> Iterator[None]:
    """Keep the values and gradients of parameters, which a model that adapts in its forward pass changes.

    Args:
        parameters: the parameters.
        written: gets those whose value was another one on leaving.
    """
    with_shape = [p for p in parameters if not nn.parameter.is_lazy(p)]
    saved = [(p, p.grad, p.data, p.detach().clone()) for p in with_shape]
    try:
        for parameter, *_ in saved:
            parameter.grad = None
        yield
    finally:
        for parameter, grad, home, value in saved:
            if _put_back(parameter, home, value) and written is not None:
                written.append(parameter)
            parameter.grad = grad


@contextmanager
def _kept_structure(
    parts: Sequence[nn.Module], goes_back: Callable[[], bool] = lambda: True
) -> Iterator[None]:
    """Let modules have their parameters and submodules back, where the attributes go back that tell of them.

    Some models fuse their layers in their first pass, and note that they have.
    """
    # Those of a scripted module are no dicts.
    own: list[Any] = [held for part in parts for held in (part._parameters, part._modules)]
    saved = [(held, dict(held)) for held in own if isinstance(held, dict)]
    try:
        yield
    finally:
        for held, before in saved:
            if goes_back() and _differs(held, before):
                held.clear()
                held.update(before)


def _differs(now: Mapping[str, object], before: Mapping[str, object]) -> bool:
    """Whether the entries are others.

    FSDP switches by itself between a part of a parameter, which has a type of its own, and the whole of it.
    """
    if now.keys() != before.keys():
        return True
    pairs = [(now[name], old) for name, old in before.items()]
    switched = any(
        type(new) is not type(old) and isinstance(new, torch.Tensor) for new, old in pairs
    )
    return not switched and any(new is not old for new, old in pairs)


def _put_back(tensor: torch.Tensor, home: torch.Tensor, value: torch.Tensor) -> bool:
    """Write the value that a tensor had, and return whether it had another one by now.

    `data` leaves the version counter unchanged, so that a graph made before can still be differentiated.

    Args:
        tensor: the tensor.
        home: a tensor that shares the memory that it had. By now it may be in memory that is somebody else's, as
            after ``weight.data = others[0]``, or have another dtype.
        value: a copy of what was there.
    """
    if _is_freed(tensor):
        return False
    moved = _has_moved(tensor, home)
    if moved:
        tensor.data = home
    now, before = _once(tensor.data), _once(value, tensor)
    same = _known_equal(now, before)
    if not same:
        now.copy_(before)
    return moved or not same


def _has_moved(tensor: torch.Tensor, home: torch.Tensor) -> bool:
    """Whether a pass has given a tensor other memory, shape or dtype. FSDP does so, and keeps account of it."""
    if type(tensor) not in _PLAIN_TENSORS or tensor.layout is not torch.strided:
        return False
    if getattr(tensor, "_fsdp_flattened", False):
        return False
    look = tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.storage_offset()
    before = home.dtype, home.device, home.shape, home.stride(), home.storage_offset()
    return look != before or storage_of(tensor) != storage_of(home)


def _is_freed(tensor: torch.Tensor) -> bool:
    """Whether a pass has given the tensor's memory back, as FSDP does with the parameters that it has gathered."""
    has_memory = tensor.layout is torch.strided and tensor.numel() > 0
    return has_memory and tensor.untyped_storage().size() == 0


def _known_equal(now: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether nothing is to be written. Some memory, such as that of a file opened for reading, cannot be written.

    On a GPU the question would wait for the device.
    """
    simple = now.device.type == "cpu" and now.layout is torch.strided and not now.is_quantized
    if simple and now.is_floating_point():  # by their bits, as NaN is not equal to itself
        bits = _SAME_SIZE[now.element_size()]
        return torch.equal(now.view(bits), before.view(bits))
    return simple and torch.equal(now, before)


def _once(tensor: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """The part of a tensor without the repeats of an expanded one, which cannot be written."""
    like = tensor if like is None else like
    if like.layout is torch.strided and 0 in like.stride():
        for axis, step in enumerate(like.stride()):
            tensor = tensor.narrow(axis, 0, min(1, like.shape[axis])) if step == 0 else tensor
    return tensor


@contextmanager
def _forked_random_state(model: object, seed: int) -> Iterator[None]:
    """Seed the generators of the CPU and of the model's GPUs, no others, and put them back on leaving."""
    states = _random_states(model)
    try:
        for generator in states:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in states.items():
            generator.set_state(state)


@contextmanager
def _forked_at_first_draw(model: object, seed: int) -> Iterator[None]:
    """As `_forked_random_state`, but only once the model draws; until then other threads draw undisturbed.

    A generator whose state has changed by then keeps its numbers: the model may have seeded it itself.
    """
    before = _random_states(model)
    drawn = False

    def fork() -> None:
        nonlocal drawn
        drawn = True
        for generator, state in before.items():
            if torch.equal(generator.get_state(), state):
                generator.manual_seed(seed)

    try:
        with DrawWatch(fork):
            yield
    finally:
        if drawn:
            for generator, state in before.items():
                generator.set_state(state)


def _random_states(model: object) -> dict[torch.Generator, torch.Tensor]:
    """The states of the generators of the CPU and of the model's GPUs.

    A model without weights may run on any GPU. It then counts as a model of the current GPU.
    """
    gpus: set[int] = set()
    if torch.cuda.is_initialized():  # else no tensor is on a GPU
        tensors = [
            tensor
            for part in parts_of(model)
            for tensor in (*part._parameters.values(), *part._buffers.values())
            if tensor is not None
        ]
        gpus = {t.device.index for t in tensors if t.device.type == "cuda"}
        if not tensors:
            gpus = {torch.cuda.current_device()}
    generators = [torch.default_generator]
    generators += [torch.cuda.default_generators[gpu] for gpu in sorted(gpus)]
    return {generator: generator.get_state() for generator in generators}
