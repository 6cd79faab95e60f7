"""Sample tensors: seeded values in a dtype, a shape and a memory layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spec:
    """What the tensors of a sample are to be like.

    Attributes:
        shape: of the batched tensors, [B, ...].
        dtype: of the float tensors.
        layout: a key of `LAYOUTS`, or ``"mixed"``: another layout for each tensor of the sample.
        seed: of the values.
        device: where the tensors are.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    seed: int = 0
    device: str = "cpu"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype} {'x'.join(map(str, self.shape))} {self.layout} on {self.device}"


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def _transposed(t: Tensor) -> Tensor:
    """Dense; the samples stay apart, but for two axes, where they are interleaved."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t


def _batch_inner(t: Tensor) -> Tensor:
    """Dense, with neighbours in memory from different samples."""
    return t.movedim(0, -1).contiguous().movedim(-1, 0)


def _offset(t: Tensor) -> Tensor:
    """Dense, one element off the allocator's alignment."""
    return torch.cat((t.new_zeros(1), t.reshape(-1)))[1:].view(t.shape)


def _slice(t: Tensor) -> Tensor:
    """Every second element of a larger tensor: not dense."""
    filler = torch.nan if t.is_floating_point() else 255
    larger = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), filler)
    larger[..., 1::2] = t
    return larger[..., 1::2]


def _expanded(t: Tensor) -> Tensor:
    """Stride 0 along one axis; its values are those of the axis's first place."""
    axis = min(1, t.dim() - 1)
    return t.narrow(axis, 0, min(1, t.shape[axis])).expand(t.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": _channels_last,
    "transposed": _transposed,
    "batch_inner": _batch_inner,
    "offset": _offset,
    "slice": _slice,
    "expanded": _expanded,
}
_MIXTURE = ("contiguous", "channels_last", "slice", "transposed")
ALL_LAYOUTS = (*LAYOUTS, "mixed")
OVERLAPPING = ("expanded",)  # cannot be written to in place


def arrange(t: Tensor, layout: str) -> Tensor:
    """The tensor in a layout, values unchanged except where the layout repeats them."""
    return LAYOUTS[layout](t)


class Draw:
    """The tensors of one sample, in the order in which they are asked for."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self._generator = torch.Generator().manual_seed(spec.seed)
        self._arranged = 0

    def normal(
        self, dtype: torch.dtype | None = None, shape: tuple[int, ...] | None = None
    ) -> Tensor:
        """[B, ...], or another shape, from the standard normal distribution."""
        shape = self.spec.shape if shape is None else shape
        return self.arranged(torch.randn(shape, generator=self._generator), dtype)

    def images(self, dtype: torch.dtype | None = None) -> Tensor:
        """[B, ...] in 0..1, some elements exactly 0 or 1."""
        values = torch.rand(self.spec.shape, generator=self._generator)
        return self.arranged((values * 1.1 - 0.05).clamp(0, 1), dtype)

    def pixels(self) -> Tensor:
        """[N, C, H, W] uint8."""
        shape, generator = self.spec.shape, self._generator
        values = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        return self.arranged(values, torch.uint8)

    def per_sample(self, low: float, high: float, dtype: torch.dtype = torch.float32) -> Tensor:
        """[B] uniform in low..high."""
        values = torch.rand(self.spec.shape[0], generator=self._generator)
        return (low + (high - low) * values).to(self.spec.device, dtype)

    def integers(self, low: int, high: int, count: int | None = None) -> Tensor:
        """[B] or [count] int64 in low .. high - 1."""
        count = self.spec.shape[0] if count is None else count
        return torch.randint(low, high, (count,), generator=self._generator).to(self.spec.device)

    def arranged(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The values in the spec's dtype (unless another is given), device and layout."""
        layout = self.spec.layout
        if layout == "mixed":
            layout = _MIXTURE[self._arranged % len(_MIXTURE)]
        self._arranged += 1
        return arrange(values.to(self.spec.device, dtype or self.spec.dtype), layout)
