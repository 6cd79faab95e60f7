"""Memory layouts of the tensors, and how the work on them is divided among programs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

_ONE_PROGRAM = 32768  # elements of a sample up to which one program reduces it
_PART = 16384  # elements of a larger sample that one program reduces
_MOST_PARTS = 64  # partial results that every program of the second stage adds up


def sample_size(t: Tensor) -> int:
    """Elements of one sample."""
    return t.numel() // t.shape[0] if t.shape[0] else 0


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have the same strides in all axes with more than one element."""
    return all(n <= 1 or p == q for n, p, q in zip(a.shape, a.stride(), b.stride(), strict=True))


def batch_major(t: Tensor) -> Tensor:
    """``t`` if its samples are dense and follow one another in memory, else a contiguous copy."""
    if t.is_contiguous():
        return t
    inner = sorted(
        (stride, n) for n, stride in zip(t.shape[1:], t.stride()[1:], strict=True) if n > 1
    )
    expected = 1
    for stride, n in inner:
        if stride != expected:
            return t.contiguous()
        expected *= n
    return t if t.shape[0] <= 1 or t.stride(0) == expected else t.contiguous()


def dense(values: Tensor | None) -> Tensor | None:
    """Values [B] side by side, as kernels read them; None for None."""
    return None if values is None else values.contiguous()


def in_layout_of(t: Tensor, like: Tensor) -> Tensor:
    """``t`` in the memory layout of ``like``; ``t`` itself if it has this layout already."""
    if same_layout(t, like):
        return t
    return torch.empty_strided(t.shape, like.stride(), dtype=t.dtype, device=t.device).copy_(t)


def apart_from(written: Tensor, t: Tensor) -> Tensor:
    """``t``, which a kernel reads element by element while it writes ``written``, of the same layout.

    A copy where only some of their memory is the same, as elements would be read after they were written.
    """
    to, origin = written.data_ptr(), t.data_ptr()
    same = origin == to and t.element_size() == written.element_size()
    apart = origin + t.nbytes <= to or to + written.nbytes <= origin
    return t if same or apart else t.clone()


class Gradient:
    """A gradient in its argument's layout; empty if it is not wanted.

    Attributes:
        written: the tensor in the kernel's layout that the kernel writes; None if the gradient is not wanted.
    """

    def __init__(self, argument: Tensor, like: Tensor, wanted: bool) -> None:
        self._result = torch.empty_like(argument) if wanted else argument.new_empty(0)
        self.written = self._result if wanted else None
        if wanted and not same_layout(self._result, like):
            self.written = torch.empty_like(like, dtype=argument.dtype)

    def finished(self) -> Tensor:
        """The result, once the kernel has run."""
        if self.written is None or self.written is self._result:
            return self._result
        return self._result.copy_(self.written)


@dataclass(frozen=True)
class Parts:
    """The number of programs that share a sample in a reduction, and the number of elements for each.

    They depend only on the sample's size: the other samples of the batch do not change a sample's sums.
    """

    count: int
    length: int

    @classmethod
    def of(cls, size: int) -> Parts:
        """The parts of a sample of ``size`` elements; at least one, also for an empty sample."""
        if size <= _ONE_PROGRAM:
            return cls(1, size)
        length = max(_PART, triton.cdiv(triton.cdiv(size, _MOST_PARTS), 16) * 16)
        return cls(triton.cdiv(size, length), length)


def reduction_loop(length: int) -> dict[str, int]:
    """The settings of the loop in which one program reduces ``length`` elements: 8 elements per thread and step.

    The compiler knows the number of steps, so that it can start the loads of several steps together.
    """
    block = min(2048, max(256, triton.next_power_of_2(length)))
    return {"BLOCK": block, "STEPS": triton.cdiv(length, block), "num_warps": block // 256}
