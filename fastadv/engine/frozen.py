"""Hold a live model still for the time of an attack, and leave it as it was whatever happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


@contextmanager
def frozen(model: object, *, train_mode: bool = False, seed: int | None = None) -> Iterator[None]:
    """Freeze a module's parameters and set its mode; restore all of it on leaving, exceptions included.

    Inside, no parameter requires grad, so that an attack computes input gradients only. On leaving, every
    module has its own mode back, every parameter its own ``requires_grad``, and every buffer that a
    forward pass can have changed (in train mode BatchNorm's statistics) its own value.

    Args:
        model: an ``nn.Module``; of any other callable only the random numbers are governed.
        train_mode: run in train instead of eval mode.
        seed: of the random numbers that the model draws inside, dropout's in train mode; the caller's
            random state is put back. None leaves the random state alone.
    """
    with ExitStack() as stack:
        if isinstance(model, nn.Module):
            stack.enter_context(_kept_modes(model))
            stack.enter_context(_kept_buffers(model, train_mode))
            model.train(train_mode)
            for parameter in model.parameters():
                parameter.requires_grad_(False)
        if seed is not None:
            stack.enter_context(_forked_random_state(model, seed))
        yield


@contextmanager
def _kept_modes(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)


@contextmanager
def _kept_buffers(model: nn.Module, train_mode: bool) -> Iterator[None]:
    """Keep the buffers' identities and values; in eval mode torch's own modules change none of theirs."""
    saved = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        if train_mode or not type(module).__module__.startswith("torch.nn.modules.")
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, value in saved:
            # Past the version counter, so that a graph made before the attack can still be differentiated.
            buffer.data.copy_(value)
            module._buffers[name] = buffer


@contextmanager
def _forked_random_state(model: object, seed: int) -> Iterator[None]:
    """Seed the generators of the CPU and of the model's GPUs, no others, and put them back on leaving."""
    tensors = (*model.parameters(), *model.buffers()) if isinstance(model, nn.Module) else ()
    devices = {t.device.index for t in tensors if t.device.type == "cuda"}
    if not isinstance(model, nn.Module) and torch.cuda.is_initialized():
        devices.add(torch.cuda.current_device())
    with torch.random.fork_rng(devices=sorted(devices)):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield
