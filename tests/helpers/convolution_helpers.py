"""What the tests of the engine's convolutions share."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.engine.convolution_kernels import Epilogue, Kernel


def narrow(shape: tuple[int, ...], seed: int) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.bfloat16().contiguous(memory_format=torch.channels_last)


def poisoned(*shape: int) -> Tensor:
    empty = torch.full(shape, torch.nan, dtype=torch.bfloat16)
    return empty.contiguous(memory_format=torch.channels_last)


class Given:
    """Memory that hands out one given tensor."""

    def __init__(self, out: Tensor) -> None:
        self.out = out

    def take(self, shape: tuple[int, ...]) -> Tensor:
        assert tuple(shape) == tuple(self.out.shape)
        return self.out


def run(kernel: Kernel, out: Tensor, x: Tensor, *epilogue: Tensor | bool | None) -> Tensor:
    return kernel.run(Given(out), out.shape, x, Epilogue(*epilogue))


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()
