"""A random point of the eps-ball in Triton. Definition: fastadv/ops/random_start.py.

In l2 and l1 a first kernel computes, for each sample, the exact integer sum of squares or magnitudes of its
direction and the largest number of its radius stream. The second kernel draws the same numbers again, which is
cheaper than keeping them in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import clip, compute_dtype, double_bits, launch, number, per_sample, seed_bits
from .layout import Parts, dense, sample_size
from .noise import Tiles, near_gaussian, near_laplace, philox, tile_of_noise

_RADIUS_STREAM = 1


@triton.jit(do_not_specialize=["seed", "parts"])
def _measure(
    partial,
    ids,
    seed: tl.int64,
    size,
    parts,
    length,
    BLOCKS: tl.constexpr,
    STEPS: tl.constexpr,
    STREAM: tl.constexpr,
    NORM: tl.constexpr,
):
    """Sum of squares or magnitudes and largest radius number of a part of a sample, [2, B, parts] int64."""
    row = tl.program_id(0) // parts
    sample = row if ids is None else tl.load(ids + row)
    begin = (tl.program_id(0) % parts).to(tl.int64) * length
    end = tl.minimum(begin + length, size)
    lane = tl.arange(0, BLOCKS)
    total = tl.zeros([BLOCKS], tl.int64)
    largest = tl.zeros([BLOCKS], tl.uint32)
    for i in range(STEPS):
        first = begin + i * 4 * BLOCKS
        block = first // 4 + lane
        left = end - first - 4 * lane  # elements of the lane's block that exist
        direction = philox(seed, sample, block, 0)
        radius = philox(seed, sample, block, STREAM)
        for word in tl.static_range(4):
            if NORM == "l2":
                g = near_gaussian(direction[word])
                term = g * g
            else:
                term = tl.abs(near_laplace(direction[word]))
            total += tl.where(word < left, term, 0)
            r = tl.where(word < left, radius[word] >> 8, 0)
            largest = tl.where(r > largest, r, largest)
    to = partial + tl.program_id(0)
    tl.store(to, tl.sum(total, 0))
    tl.store(to + tl.num_programs(0), tl.max(largest.to(tl.int64), 0))


@triton.jit
def _ball_scale(partial, row, rows, parts, radius, NORM: tl.constexpr, PARTS: tl.constexpr):
    """The ratio of the noise's length to the direction's length, in float64."""
    lane = tl.arange(0, PARTS)
    of_row = partial + row.to(tl.int64) * parts + lane
    length = tl.sum(tl.load(of_row, lane < parts, other=0), 0).to(tl.float64)
    if NORM == "l2":
        length = tl.sqrt(length)
    largest = tl.max(tl.load(of_row + rows * parts, lane < parts, other=0), 0)
    share = (largest + 1).to(tl.float64) * 5.9604644775390625e-08  # 2**-24
    return tl.where(length > 0, share * radius / length, 0.0)


@triton.jit(do_not_specialize=["eps", "low", "high", "seed", "tiles", "rows", "parts"])
def _start(
    out,
    x,
    eps: tl.int64,
    eps_values,
    low: tl.int64,
    high: tl.int64,
    seed: tl.int64,
    ids,
    partial,
    size,
    channels,
    tiles,
    rows,
    parts,
    PARTS: tl.constexpr,
    NORM: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    row = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    sample = row if ids is None else tl.load(ids + row)
    if NORM == "linf":
        scale = per_sample(eps, eps_values, row, COMPUTE)
    else:
        radius = per_sample(eps, eps_values, row, tl.float64)
        scale = _ball_scale(partial, row, rows, parts, radius, NORM, PARTS).to(COMPUTE)
    added, at, inside = tile_of_noise(
        seed, sample, tile, scale, size, channels, NORM, PIXELS, CHANNELS, COMPUTE
    )
    at += row.to(tl.int64) * size
    moved = tl.load(x + at, inside, other=0.0).to(COMPUTE) + added
    moved = clip(moved, number(low, COMPUTE), number(high, COMPUTE))
    tl.store(out + at, moved.to(out.dtype.element_ty), inside)


def random_start(
    x: Tensor,
    eps: float,
    eps_per_sample: Tensor | None,
    norm: str,
    low: float,
    high: float,
    seed: int,
    sample_ids: Tensor | None,
) -> Tensor:
    """The op ``fastadv::random_start``."""
    out = torch.empty_like(x)
    tiles = Tiles.of(x, out)
    if tiles is None:
        source = x.contiguous()
        return out.copy_(
            random_start(source, eps, eps_per_sample, norm, low, high, seed, sample_ids)
        )
    rows, size = x.shape[0], sample_size(x)
    if rows == 0 or size == 0:
        return out
    ids = dense(sample_ids)
    key = seed_bits(seed)
    partial, parts = None, Parts.of(size)
    if norm != "linf":
        blocks = min(256, max(16, triton.next_power_of_2(triton.cdiv(size, 4))))
        partial = torch.empty((2, rows, parts.count), dtype=torch.int64, device=x.device)
        launch(
            _measure,
            rows * parts.count,
            x,
            partial,
            ids,
            key,
            size,
            parts.count,
            parts.length,
            BLOCKS=blocks,
            STEPS=triton.cdiv(parts.length, 4 * blocks),
            STREAM=_RADIUS_STREAM,
            NORM=norm,
        )
    launch(
        _start,
        rows * tiles.per_sample,
        x,
        out,
        x,
        double_bits(eps),
        dense(eps_per_sample),
        double_bits(low),
        double_bits(high),
        key,
        ids,
        partial,
        size,
        tiles.channels,
        tiles.per_sample,
        rows,
        parts.count,
        PARTS=triton.next_power_of_2(parts.count),
        NORM=norm,
        COMPUTE=compute_dtype(x),
        **tiles.settings,
    )
    return out
