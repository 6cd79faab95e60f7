"""How every kernel is launched, and how numbers reach it with all their bits."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def launch(kernel: Any, programs: int, like: Tensor, *arguments: Any, **settings: Any) -> None:
    """Run ``kernel`` on the device of ``like`` with ``programs`` programs; for 0 programs nothing is launched.

    Products and sums are not fused, so that every backend rounds in the same way.

    Raises:
        RuntimeError: if the tensors are not on a GPU, and Triton's interpreter is not on.
    """
    if programs == 0:
        return
    if isinstance(kernel, triton.JITFunction) and not like.is_cuda:
        raise RuntimeError(
            f"the triton backend needs tensors on a CUDA device, got {like.device}; "
            "for tests on a CPU, set TRITON_INTERPRET=1 before triton is imported"
        )
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        kernel[(programs,)](*arguments, enable_fp_fusion=False, **settings)


def compute_dtype(*tensors: Tensor) -> tl.dtype:
    """float64 if one of the tensors is float64, else float32."""
    return tl.float64 if any(t.dtype == torch.float64 for t in tensors) else tl.float32


def double_bits(number: float) -> int:
    """A Python number as the int64 with its bits: a float argument would reach a kernel in float32."""
    return struct.unpack("<q", struct.pack("<d", number))[0]


def seed_bits(seed: int) -> int:
    """The low 64 bits of a seed as an int64."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


@triton.jit
def number(bits, dtype: tl.constexpr):
    """The inverse of `double_bits`, rounded to ``dtype``."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(dtype)


@triton.jit
def per_sample(bits, values, sample, dtype: tl.constexpr):
    """The number of one sample: the common number, or the sample's own if there are ``values``."""
    return number(bits, dtype) if values is None else tl.load(values + sample).to(dtype)


@triton.jit
def clip(value, low, high):
    """Clip by comparisons, so that NaN stays NaN and -0.0 stays -0.0 as in the other backends."""
    value = tl.where(value < low, low, value)
    return tl.where(value > high, high, value)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """``value`` in the dtype of a result.

    Half precision is rounded from float32, as in torch: Triton's interpreter rounds float64 to bfloat16 wrongly.
    """
    return value.to(tl.float32).to(dtype) if dtype.primitive_bitwidth < 32 else value.to(dtype)


@triton.jit
def divide(a, b):
    """IEEE division in both dtypes of computation; Triton's ``/`` is approximate in float32."""
    return a / b if a.dtype.scalar == tl.float64 else tl.div_rn(a, b)


@triton.jit
def square_root(a):
    """IEEE square root in both dtypes of computation; Triton's is approximate in float32."""
    return tl.sqrt(a) if a.dtype.scalar == tl.float64 else tl.sqrt_rn(a)


@triton.jit
def rounded_to_float_precision(a):
    """A positive double rounded to 24 significant bits. fastadv/ops/pgd_step_reference.py gives the reason."""
    bits = a.to(tl.int64, bitcast=True) + (1 << 28)
    return ((bits >> 29) << 29).to(tl.float64, bitcast=True)


@triton.jit
def elements_to_read(size, active, sample):
    """``size``, or 0 for a sample that is not active, whose memory is not read."""
    return size if active is None else tl.where(tl.load(active + sample), size, 0)
