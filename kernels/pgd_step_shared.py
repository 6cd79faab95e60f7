"""The parts of the PGD step in Triton that all norms share: the arguments, and the work on single elements."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .launch import clip, double_bits
from .layout import dense


@triton.jit
def count_gradient(grad, inside, counts, counts_stride):
    """Add the numbers of elements that are zero and that are not finite to two counters."""
    zeros = tl.sum(((grad == 0) & inside).to(tl.int64), 0)
    finite = tl.abs(grad) < float("inf")
    others = tl.sum((~finite & inside).to(tl.int64), 0)
    tl.atomic_add(counts, zeros, sem="relaxed")
    tl.atomic_add(counts + counts_stride, others, sem="relaxed")


@triton.jit
def linf_moved(adv, grad, x, radius, step):
    """Elements after a step along the gradient's sign, clipped to the ball."""
    moved = adv + tl.where(grad > 0, step, tl.where(grad < 0, -step, 0.0))
    return clip(moved, x - radius, x + radius)


@dataclass(frozen=True)
class Step:
    """The arguments of the two ops after the images, in the order of their schema."""

    eps: float
    alpha: float
    eps_values: Tensor | None
    alpha_values: Tensor | None
    norm: str
    low: float
    high: float
    sparsity: float
    active: Tensor | None
    counts: Tensor | None = None

    def arguments(self) -> tuple[int, int, Tensor | None, Tensor | None, int, int]:
        """The arguments of every kernel, in their order."""
        return (
            double_bits(self.eps),
            double_bits(self.alpha),
            self.eps_values,
            self.alpha_values,
            double_bits(self.low),
            double_bits(self.high),
        )

    def counters(self) -> tuple[Tensor | None, int]:
        """The counters and the distance between them."""
        return self.counts, 1 if self.counts is None else self.counts.stride(0)

    def __post_init__(self) -> None:
        for name in ("eps_values", "alpha_values", "active"):
            object.__setattr__(self, name, dense(getattr(self, name)))

    @property
    def same_for_all(self) -> bool:
        """Whether all samples have the same limits and all are stepped."""
        return self.eps_values is None and self.alpha_values is None and self.active is None
