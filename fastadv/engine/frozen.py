"""Hold a live model still for the time of an attack, and leave it as it was whatever happens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

import torch
from torch import nn

from fastadv.engine.networks import modules_of, networks_of, parts_of
from fastadv.engine.randomness import DrawWatch


@contextmanager
def frozen(
    model: object,
    *,
    train_mode: bool = False,
    keep_buffers: bool = True,
    freeze_parameters: bool = True,
    seed: int | None = None,
    watch: bool = False,
) -> Iterator[None]:
    """Freeze a module's parameters and set its mode; restore all of it on leaving, exceptions included.

    Inside, no parameter requires grad, so that an attack computes input gradients only. On leaving, every
    module has its own mode back, every parameter its own ``requires_grad``, and every buffer its own value.
    All but the mode also holds for networks that the model runs without having registered them, and for those of
    another callable; see `fastadv.engine.networks`. Their mode is the caller's.

    Args:
        model: an ``nn.Module``, or another callable.
        train_mode: run in train instead of eval mode.
        keep_buffers: put the buffers back on leaving.
        freeze_parameters: whether parameters stop to require grad.
        seed: seed of the random numbers that the model draws inside, such as dropout's in train mode. The caller's
            random state is restored. None does not touch the random state.
        watch: do not touch the random state until the model draws.

    Raises:
        ValueError: if the model has lazy modules, whose weights have no shape yet.
    """
    if isinstance(model, nn.Module):
        _refuse_lazy_weights(model)
    with ExitStack() as stack:
        parts = parts_of(networks_of(model))
        if parts:
            stack.enter_context(_kept_modes(parts, freeze_parameters))
            if keep_buffers:
                stack.enter_context(_kept_buffers(parts))
            # Only if needed: some models empty their caches when their mode is set.
            if isinstance(model, nn.Module) and _has_other_mode(model, train_mode):
                with suppress(NotImplementedError):  # exported programs have only one mode
                    model.train(train_mode)
            if freeze_parameters:
                for parameter in _parameters_of(parts):
                    parameter.requires_grad_(False)
        if seed is not None:
            seeded = _forked_at_first_draw if watch else _forked_random_state
            stack.enter_context(seeded(model, seed))
        yield


def _refuse_lazy_weights(model: nn.Module) -> None:
    if not any(map(nn.parameter.is_lazy, _parameters_of(modules_of(model)))):
        return
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise ValueError(
                f"model must have all its weights, got {name!r} without a shape; call the model "
                "once on a batch of images first"
            )


def _has_other_mode(model: nn.Module, training: bool) -> bool:
    return any(module.training != training for module in modules_of(model))


def _parameters_of(parts: Sequence[nn.Module]) -> list[nn.Parameter]:
    """The parameters of modules, each once."""
    found = [p for part in parts for p in part._parameters.values() if p is not None]
    return list({id(parameter): parameter for parameter in found}.values())


@contextmanager
def _kept_modes(parts: Sequence[nn.Module], parameters: bool) -> Iterator[None]:
    modes = [(module, module.training) for module in parts]
    wanted = [(p, p.requires_grad) for p in _parameters_of(parts)] if parameters else []
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)


@contextmanager
def _kept_buffers(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Keep the buffers' identities and values, also where a module updates them in eval mode."""
    modules = [(module, dict(module._buffers.items())) for module in parts]
    saved = [
        (module, name, buffer, buffer.clone())
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
            module._buffers.update({n: b for n, b in buffers.items() if b is None})
        for module, name, buffer, value in saved:
            # `data` leaves the version counter unchanged, so that a graph made before can still be differentiated.
            buffer.data.copy_(value)
            module._buffers[name] = buffer


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
    """The states of the generators of the CPU and of the model's GPUs."""
    devices: set[int] = set()
    if torch.cuda.is_initialized():  # else no tensor is on a GPU
        if isinstance(model, nn.Module):
            tensors = (*model.parameters(), *model.buffers())
            devices = {t.device.index for t in tensors if t.device.type == "cuda"}
        else:
            devices = {torch.cuda.current_device()}
    generators = [torch.default_generator]
    generators += [torch.cuda.default_generators[device] for device in sorted(devices)]
    return {generator: generator.get_state() for generator in generators}
