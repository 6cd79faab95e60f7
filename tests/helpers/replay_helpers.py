"""Passes of a program and of its replays, and a program whose Python code may do what it likes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastadv.engine.buffer_pool import Memory
from fastadv.engine.replayed_program import ReplayedProgram


def images_of(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator).contiguous(memory_format=torch.channels_last)


def pass_of(program: Any, x: Tensor, *options: bool) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of a weighted sum of them."""
    logits, started = program.forward(x, *options)
    kept = logits.clone()
    weights = torch.linspace(-1, 2, logits.numel()).view_as(logits)
    return kept, program.backward(started, weights).clone()


def is_replayed(program: ReplayedProgram, x: Tensor, with_gradient: bool = True) -> bool:
    return program.forward(x, with_gradient)[1].values is not None


class Stub:
    """A program of one layer, whose Python code may do what it likes.

    Args:
        forward: the code.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        self._forward, self.memory, self.passes = forward, Memory(torch.float32), 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.passes += 1
        with torch.no_grad():
            return self._forward(x), x

    def backward(self, run: Tensor, at_logits: Tensor) -> Tensor:
        return run * at_logits.sum()
