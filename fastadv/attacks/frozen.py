"""Hold a live model still for the time of an attack, and leave it as it was whatever happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def frozen(model: object, *, train_mode: bool = False, seed: int = 0) -> Iterator[None]:
    """Freeze a module's parameters and set its mode; restore all of it on leaving, exceptions included.

    Inside, no parameter requires grad, so that an attack computes input gradients only. On leaving, every
    module has its own mode back, every parameter its own ``requires_grad``. With ``train_mode`` the
    buffers (BatchNorm's running statistics) and the random state that dropout used are put back too.

    Args:
        model: an ``nn.Module``; any other callable is left alone.
        train_mode: run in train instead of eval mode.
        seed: of the random numbers that modules draw in train mode.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.train(train_mode)
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        if train_mode:
            with _kept_buffers(model), _forked_random_state(model, seed):
                yield
        else:
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)


@contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    saved: list[tuple[Tensor, Tensor]] = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)


@contextmanager
def _forked_random_state(model: nn.Module, seed: int) -> Iterator[None]:
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(d for d in devices if d is not None)):
        torch.manual_seed(seed)
        yield
