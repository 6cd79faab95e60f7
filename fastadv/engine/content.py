"""A value that shows whether tensors have changed: their shapes, their strides, and a hash of their bytes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastadv.ops import NATIVE

torch.library.define("fastadv::content_hash", "(Tensor[] tensors) -> Tensor")


def content(tensors: Sequence[Tensor]) -> tuple[Any, ...] | None:
    """A value that stays equal as long as no element of the tensors changes, bit for bit.

    A hash of 64 bits always shows the change of a single word of 8 bytes, and any other change almost certainly.
    Autograd's version counters are not enough: writing through ``tensor.data`` does not change them.

    Returns:
        The value; None if a tensor is not an ordinary tensor on the CPU, or without the compiled part, which
        computes the hashes.
    """
    if NATIVE.library is None or not all(_is_ordinary(t) for t in tensors):
        return None
    dense = [t.detach() if _is_dense(t) else t.detach().contiguous() for t in tensors]
    hashes = torch.ops.fastadv.content_hash(dense).tolist()
    return tuple((t.dtype, t.shape, t.stride(), h) for t, h in zip(dense, hashes, strict=True))


def content_or_counters(tensors: Sequence[Tensor]) -> Hashable:
    """A value that differs once a tensor is written: their `content`, or on a GPU torch's counters of writes."""
    found = content(tensors)
    if found is not None:
        return found
    return tuple((id(t), 0 if t.is_inference() else t._version) for t in tensors)


def _is_ordinary(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.is_cpu
        and tensor.layout == torch.strided
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )


def _is_dense(tensor: Tensor) -> bool:
    if tensor.is_contiguous():
        return True
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
