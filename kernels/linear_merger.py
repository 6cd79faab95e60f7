"""The linear merger in Triton. Definition: fastadv/ops/linear_merger.py.

There is no CUDA C++ version. cuBLAS would need a launch for each of the features and, in half precision, would
round to half precision between them. One kernel here goes through all parts with one accumulator in float32
(float64 for float64). Products of float32 are IEEE products, not TF32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import compute_dtype, launch

_ENOUGH = (
    128  # programs that keep a GPU busy: tiles are enlarged only if this number of programs remains
)

_INT32 = 2**31 - 1


@triton.jit
def _add_product(
    total,
    a,
    a_row,
    a_inner,
    b,
    b_inner,
    b_column,
    row,
    rows,
    column,
    columns,
    inner,
    STEPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LARGE: tl.constexpr,
):
    """``total`` plus a tile of A B; A [rows, inner] and B [inner, columns] have the strides given."""
    for step in range(STEPS):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        if LARGE:  # the number of an element times a stride can leave int32
            k = k.to(tl.int64)
        inside_a = (row < rows)[:, None] & (k < inner)[None, :]
        inside_b = (k < inner)[:, None] & (column < columns)[None, :]
        left = tl.load(a + row[:, None] * a_row + k[None, :] * a_inner, inside_a, other=0.0)
        right = tl.load(b + k[:, None] * b_inner + column[None, :] * b_column, inside_b, other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee", out_dtype=total.dtype)
    return total


@triton.jit
def _store_tile(out, total, row, rows, column, columns, stride):
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = out + row[:, None] * stride + column[None, :]
    tl.store(at, total.to(out.dtype.element_ty), inside)


@triton.jit
def _tile(index, across, BLOCK: tl.constexpr):
    """Rows and columns of a tile, as int64."""
    lane = tl.arange(0, BLOCK)
    row = (index // across).to(tl.int64) * BLOCK + lane
    column = (index % across).to(tl.int64) * BLOCK + lane
    return row, column


@triton.jit
def _merge(
    out,
    features,
    weight,
    bias,
    rows,
    classes,
    total_width,
    WIDTHS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LARGE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One program per tile of the result; it adds up all parts."""
    row, column = _tile(tl.program_id(0), tl.cdiv(classes, BLOCK), BLOCK)
    total = tl.zeros([BLOCK, BLOCK], COMPUTE)
    columns = weight
    for part in tl.static_range(PARTS):
        total = _add_product(
            total,
            features[part],
            WIDTHS[part],
            1,
            columns,
            1,
            total_width,
            row,
            rows,
            column,
            classes,
            WIDTHS[part],
            (WIDTHS[part] + BLOCK_K - 1) // BLOCK_K,
            BLOCK_K,
            LARGE,
        )
        columns += WIDTHS[part]
    if bias is not None:
        total += tl.load(bias + column, column < classes, other=0.0).to(COMPUTE)[None, :]
    _store_tile(out, total, row, rows, column, classes, classes)


@triton.jit
def _features_backward(
    outs,
    grad,
    weight,
    rows,
    classes,
    total_width,
    STARTS: tl.constexpr,
    WIDTHS: tl.constexpr,
    PARTS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LARGE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One program per tile of one of the features' gradients."""
    index = tl.program_id(0)
    down = tl.cdiv(rows, BLOCK)
    for part in tl.static_range(PARTS):
        across = (WIDTHS[part] + BLOCK - 1) // BLOCK
        if (index >= 0) & (index < down * across):
            row, column = _tile(index, across, BLOCK)
            total = _add_product(
                tl.zeros([BLOCK, BLOCK], COMPUTE),
                grad,
                classes,
                1,
                weight + STARTS[part],
                total_width,
                1,
                row,
                rows,
                column,
                WIDTHS[part],
                classes,
                STEPS,
                BLOCK_K,
                LARGE,
            )
            _store_tile(outs[part], total, row, rows, column, WIDTHS[part], WIDTHS[part])
        index -= down * across


@triton.jit
def _weight_backward(
    out,
    grad,
    features,
    rows,
    classes,
    total_width,
    STARTS: tl.constexpr,
    WIDTHS: tl.constexpr,
    PARTS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LARGE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One program per tile of the columns of the weight's gradient that belong to one of the features."""
    index = tl.program_id(0)
    down = tl.cdiv(classes, BLOCK)
    for part in tl.static_range(PARTS):
        across = (WIDTHS[part] + BLOCK - 1) // BLOCK
        if (index >= 0) & (index < down * across):
            row, column = _tile(index, across, BLOCK)
            total = _add_product(
                tl.zeros([BLOCK, BLOCK], COMPUTE),
                grad,
                1,
                classes,
                features[part],
                WIDTHS[part],
                1,
                row,
                classes,
                column,
                WIDTHS[part],
                rows,
                STEPS,
                BLOCK_K,
                LARGE,
            )
            to = out + STARTS[part]
            _store_tile(to, total, row, classes, column, WIDTHS[part], total_width)
        index -= down * across


def _block(rows: int, widths: Sequence[int], dtype: torch.dtype) -> int:
    """Side of the largest tile with which there are still enough programs."""
    for side in (64, 32):  # in float64 these tiles would not fit into the registers
        if dtype != torch.float64 and _programs(rows, widths, side) >= _ENOUGH:
            return side
    return 16


def _programs(rows: int, widths: Sequence[int], side: int) -> int:
    return triton.cdiv(rows, side) * sum(triton.cdiv(width, side) for width in widths)


def _block_k(block: int) -> int:
    """Terms of the sums per step: enough for loads of 16 bytes, also if the tile is small."""
    return max(32, 1024 // block)


def _settings(block: int, *factors: Tensor) -> dict[str, Any]:
    """Settings of a kernel that multiplies these matrices."""
    return {
        "BLOCK": block,
        "BLOCK_K": _block_k(block),
        # Numbers of elements in int64 take registers, of which float64 has few left.
        "LARGE": any(factor.numel() > _INT32 for factor in factors),
        "COMPUTE": compute_dtype(factors[0]),
        "num_warps": 4,
    }


def _starts(widths: Sequence[int]) -> list[int]:
    return [sum(widths[:i]) for i in range(len(widths))]


def linear_merger(features: list[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    """The op ``fastadv::linear_merger``."""
    rows, classes = features[0].shape[0], weight.shape[0]
    out = weight.new_empty((rows, classes))
    widths = tuple(part.shape[1] for part in features)
    block = _block(rows, (classes,), weight.dtype)
    launch(
        _merge,
        _programs(rows, (classes,), block),
        weight,
        out,
        tuple(part.contiguous() for part in features),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        rows,
        classes,
        weight.shape[1],
        WIDTHS=widths,
        PARTS=len(widths),
        **_settings(block, weight, *features),
    )
    return out


def linear_merger_backward_features(
    grad: Tensor, weight: Tensor, widths: list[int], wanted: list[bool]
) -> list[Tensor]:
    """The op ``fastadv::linear_merger_backward_features``."""
    rows, classes = grad.shape
    asked = [i for i, is_wanted in enumerate(wanted) if is_wanted]
    starts = _starts(widths)
    chosen = tuple(widths[i] for i in asked)
    outs = tuple(grad.new_empty((rows, width)) for width in chosen)
    block = _block(rows, chosen, grad.dtype)
    launch(
        _features_backward,
        _programs(rows, chosen, block),
        weight,
        outs,
        grad.contiguous(),
        weight.contiguous(),
        rows,
        classes,
        weight.shape[1],
        STARTS=tuple(starts[i] for i in asked),
        WIDTHS=chosen,
        PARTS=len(chosen),
        STEPS=triton.cdiv(classes, _block_k(block)),
        **_settings(block, weight, grad),
    )
    return list(outs)


def linear_merger_backward_weight(grad: Tensor, features: list[Tensor]) -> Tensor:
    """The op ``fastadv::linear_merger_backward_weight``."""
    rows, classes = grad.shape
    widths = tuple(part.shape[1] for part in features)
    out = grad.new_empty((classes, sum(widths)))
    block = _block(classes, widths, grad.dtype)
    launch(
        _weight_backward,
        _programs(classes, widths, block),
        grad,
        out,
        grad.contiguous(),
        tuple(part.contiguous() for part in features),
        rows,
        classes,
        out.shape[1],
        STARTS=tuple(_starts(widths)),
        WIDTHS=widths,
        PARTS=len(widths),
        STEPS=triton.cdiv(rows, _block_k(block)),
        **_settings(block, grad, *features),
    )
    return out
