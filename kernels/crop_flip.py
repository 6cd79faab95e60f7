"""Gather, crop, flip and scale uint8 images in Triton. Definition: fastadv/ops/crop_flip.py.

There is no CUDA C++ version. The op runs once per training step, in a queue that is ahead of the GPU, so the
launch latency that CUDA C++ would save is hidden. The kernel itself is bound by its writes, which Triton also
makes 16 bytes wide. Its loads are single bytes in both languages, as a crop starts at any byte and a flip reads
backwards.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, seed_bits
from .noise import philox

_TILE = 1024  # elements per program


@triton.jit
def _fold(position, size, REFLECT: tl.constexpr):
    """The positions that are read for positions outside the image."""
    if REFLECT:
        position = tl.where(position < 0, -position, position)
        position = tl.where(position >= size, 2 * (size - 1) - position, position)
    return position


@triton.jit(do_not_specialize=["seed", "pad", "count", "tiles_down", "tiles_across"])
def _crop_flip(
    out,
    images,
    indices,
    ids,
    seed: tl.int64,
    pad,
    count,
    channels,
    height,
    width,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    tiles_down,
    tiles_across,
    RANDOM: tl.constexpr,
    FLIP: tl.constexpr,
    REFLECT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of the result seen as a matrix: [C * H, W], or [H, W * C] in channels-last."""
    program = tl.program_id(0)
    sample = program // (tiles_down * tiles_across)
    tile = program % (tiles_down * tiles_across)
    row = (tile // tiles_across) * ROWS + tl.arange(0, ROWS)
    column = (tile % tiles_across) * COLUMNS + tl.arange(0, COLUMNS)
    rows = height if CHANNELS_LAST else channels * height
    columns = width * channels if CHANNELS_LAST else width
    exists = (row < rows)[:, None] & (column < columns)[None, :]

    h = row if CHANNELS_LAST else row % height
    w = column // channels if CHANNELS_LAST else column
    if RANDOM:
        w0, w1, w2, _ = philox(seed, tl.load(ids + sample), tl.zeros([1], tl.int32), 0)
        places = (2 * pad + 1).to(tl.uint32)
        h += (w0 % places).to(tl.int32) - pad
        if FLIP:
            w = tl.where((w2 & 1) == 1, width - 1 - w, w)
        w += (w1 % places).to(tl.int32) - pad
    h = _fold(h, height, REFLECT)
    w = _fold(w, width, REFLECT)
    readable = ((h >= 0) & (h < height))[:, None] & ((w >= 0) & (w < width))[None, :]

    image = tl.load(indices + sample)
    known = (image >= 0) & (image < count)
    from_row = image * stride_n + h.to(tl.int64) * stride_h
    from_column = w.to(tl.int64) * stride_w
    if CHANNELS_LAST:
        from_column += (column % channels).to(tl.int64) * stride_c
    else:
        from_row += (row // height).to(tl.int64) * stride_c
    pixel = tl.load(
        images + from_row[:, None] + from_column[None, :], exists & readable & known, other=0
    )
    value = tl.div_rn(pixel.to(tl.float32), tl.full(pixel.shape, 255.0, tl.float32))
    # A GPU can raise IndexError only if the host waits for it. NaN makes the error visible without waiting.
    value = tl.where(known, value, float("nan"))
    start = out + sample.to(tl.int64) * rows * columns
    to = start + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(to, value.to(out.dtype.element_ty), exists)


def crop_flip(
    images: Tensor,
    indices: Tensor,
    pad: int,
    mode: str,
    flip: bool,
    seed: int,
    sample_ids: Tensor,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """The op ``fastadv::crop_flip``."""
    batch = indices.shape[0]
    count, channels, height, width = images.shape
    out = torch.empty(
        (batch, channels, height, width),
        dtype=dtype,
        device=images.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
    if out.numel() == 0:
        return out
    rows, columns = (height, width * channels) if channels_last else (channels * height, width)
    columns_of_tile = min(256, triton.next_power_of_2(columns))
    rows_of_tile = min(triton.next_power_of_2(rows), _TILE // columns_of_tile)
    tiles_down = triton.cdiv(rows, rows_of_tile)
    tiles_across = triton.cdiv(columns, columns_of_tile)
    launch(
        _crop_flip,
        batch * tiles_down * tiles_across,
        images,
        out,
        images,
        indices.contiguous(),
        sample_ids.contiguous(),
        seed_bits(seed),
        pad,
        count,
        channels,
        height,
        width,
        *images.stride(),
        tiles_down,
        tiles_across,
        RANDOM=pad > 0 or flip,
        FLIP=flip,
        REFLECT=mode == "reflect",
        CHANNELS_LAST=channels_last,
        ROWS=rows_of_tile,
        COLUMNS=columns_of_tile,
    )
    return out
