"""Distance of attention maps in Triton. Definition: fastadv/ops/attention_map_distance.py.

There is no CUDA C++ version. The other distances have one to save the microseconds of Triton's launcher in each
step. This op serves a comparison (ARREST's table 4), where they do not matter. The kernels themselves are bound by
memory in both languages.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import compute_dtype, divide, launch, rounded
from .layout import same_layout

_TILE = 2048  # elements that a program handles at a time
_CHANNELS = 128  # the largest number of channels in a tile
_TORCH_DTYPES = {tl.float32: torch.float32, tl.float64: torch.float64}


@triton.jit
def _maps(
    maps,
    u,
    channels,
    positions,
    channel_stride,
    position_stride,
    blocks,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    STEPS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The sums of squares over the channels at ``POSITIONS`` positions of one sample."""
    sample = tl.program_id(0).to(tl.int64) // blocks
    p = (tl.program_id(0) % blocks) * POSITIONS + tl.arange(0, POSITIONS)
    lane = tl.arange(0, CHANNELS)
    at = u + sample * channels * positions + p[:, None] * position_stride
    total = tl.zeros([POSITIONS, CHANNELS], COMPUTE)
    for i in range(STEPS):
        c = i * CHANNELS + lane
        inside = (p < positions)[:, None] & (c < channels)[None, :]
        x = tl.load(at + c[None, :] * channel_stride, inside, other=0.0).to(COMPUTE)
        total += x * x
    result = tl.sum(total.to(tl.float64), 1).to(COMPUTE)
    tl.store(maps + sample * positions + p, result, p < positions)


@triton.jit
def _map_distances(
    distance,
    norms,
    u_map,
    v_map,
    positions,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One program per sample, in float64: the maps are squares, and their squares can leave float32's range."""
    sample = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    at = sample * positions + lane
    aa = tl.zeros([BLOCK], tl.float64)
    bb = tl.zeros([BLOCK], tl.float64)
    for i in range(STEPS):
        inside = lane < positions - i * BLOCK
        a = tl.load(u_map + at + i * BLOCK, inside, other=0.0).to(tl.float64)
        b = tl.load(v_map + at + i * BLOCK, inside, other=0.0).to(tl.float64)
        aa += a * a
        bb += b * b
    norm_a = tl.sqrt(tl.sum(aa, 0))
    norm_b = tl.sqrt(tl.sum(bb, 0))
    divisor_a = tl.where(norm_a == 0, 1.0, norm_a)
    divisor_b = tl.where(norm_b == 0, 1.0, norm_b)
    squares = tl.zeros([BLOCK], tl.float64)
    for i in range(STEPS):
        inside = lane < positions - i * BLOCK
        a = tl.load(u_map + at + i * BLOCK, inside, other=0.0).to(tl.float64)
        b = tl.load(v_map + at + i * BLOCK, inside, other=0.0).to(tl.float64)
        d = a / divisor_a - b / divisor_b
        squares += d * d
    tl.store(distance + sample, tl.sqrt(tl.sum(squares, 0)).to(COMPUTE))
    tl.store(norms + 2 * sample, norm_a.to(COMPUTE))
    tl.store(norms + 2 * sample + 1, norm_b.to(COMPUTE))


@triton.jit
def _map_gradient(
    out,
    grad,
    grad_stride,
    u,
    u_map,
    v_map,
    norms,
    distance,
    channels,
    positions,
    channel_stride,
    position_stride,
    position_blocks,
    channel_blocks,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One tile of ``slope * u``, with one slope per position."""
    block = tl.program_id(0) % (position_blocks * channel_blocks)
    sample = tl.program_id(0).to(tl.int64) // (position_blocks * channel_blocks)
    p = (block % position_blocks) * POSITIONS + tl.arange(0, POSITIONS)
    c = (block // position_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    length_a = tl.load(norms + 2 * sample).to(COMPUTE)
    length_b = tl.load(norms + 2 * sample + 1).to(COMPUTE)
    length = tl.load(distance + sample).to(COMPUTE)
    nothing = (length_a == 0) | (length_b == 0) | (length == 0)
    length_a = tl.where(length_a == 0, 1.0, length_a)
    length_b = tl.where(length_b == 0, 1.0, length_b)
    d = tl.where(length == 0, 1.0, length)
    weight = divide(2 * tl.load(grad + sample * grad_stride).to(COMPUTE), length_a)
    weight = tl.where(nothing, 0.0, weight)
    at = sample * positions + p
    a = tl.load(u_map + at, p < positions, other=0.0).to(COMPUTE)
    b = tl.load(v_map + at, p < positions, other=0.0).to(COMPUTE)
    a = divide(a, tl.zeros_like(a) + length_a)
    b = divide(b, tl.zeros_like(b) + length_b)
    slope = weight * (divide(a - b, tl.zeros_like(a) + d) - a * (d * 0.5))
    at = sample * channels * positions + p[:, None] * position_stride + c[None, :] * channel_stride
    inside = (p < positions)[:, None] & (c < channels)[None, :]
    x = tl.load(u + at, inside, other=0.0).to(COMPUTE)
    tl.store(out + at, rounded(slope[:, None] * x, out.dtype.element_ty), inside)


def _planes(t: Tensor) -> tuple[Tensor, dict[str, int]]:
    """Features whose memory is [B, C, P] or [B, P, C], with their sizes and strides as kernels take them."""
    channels, positions = t.shape[1], math.prod(t.shape[2:])
    pixels = not t.is_contiguous() and t.movedim(1, -1).is_contiguous()
    walk = {
        "channels": channels,
        "positions": positions,
        "channel_stride": 1 if pixels else positions,
        "position_stride": channels if pixels else 1,
    }
    return t if pixels else t.contiguous(), walk


def _tile(channels: int, positions: int) -> dict[str, int]:
    """The tile of a program: few positions, for enough programs, and hardly larger than the features."""
    across = min(_CHANNELS, triton.next_power_of_2(max(channels, 1)))
    along = min(_TILE // across, triton.next_power_of_2(max(positions, 1)))
    return {"CHANNELS": across, "POSITIONS": along}


def _maps_of(u: Tensor, compute: tl.dtype) -> Tensor:
    features, walk = _planes(u)
    batch, positions = u.shape[0], walk["positions"]
    maps = torch.empty((batch, positions), dtype=_TORCH_DTYPES[compute], device=u.device)
    tile = _tile(walk["channels"], positions)
    blocks = triton.cdiv(positions, tile["POSITIONS"])
    steps = triton.cdiv(walk["channels"], tile["CHANNELS"])
    settings = {**tile, "STEPS": steps, "COMPUTE": compute}
    launch(_maps, batch * blocks, u, maps, features, *walk.values(), blocks, **settings)
    return maps


def attention_map_distance(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op ``fastadv::attention_map_distance``."""
    compute = compute_dtype(u, v)
    u_map, v_map = _maps_of(u, compute), _maps_of(v, compute)
    batch, positions = u_map.shape
    distance = u_map.new_empty(batch)
    norms = u_map.new_empty((batch, 2))
    block = min(1024, triton.next_power_of_2(max(positions, 32)))
    launch(
        _map_distances,
        batch,
        u,
        distance,
        norms,
        u_map,
        v_map,
        positions,
        BLOCK=block,
        STEPS=triton.cdiv(positions, block),
        COMPUTE=compute,
        num_warps=max(1, block // 256),
    )
    return distance, u_map, v_map, norms


def attention_map_distance_backward(
    grad: Tensor, u: Tensor, u_map: Tensor, v_map: Tensor, norms: Tensor, distance: Tensor
) -> Tensor:
    """The op ``fastadv::attention_map_distance_backward``."""
    features, walk = _planes(u)
    out = torch.empty_like(u)
    to = out if same_layout(out, features) else torch.empty_like(features)
    tile = _tile(walk["channels"], walk["positions"])
    position_blocks = triton.cdiv(walk["positions"], tile["POSITIONS"])
    channel_blocks = triton.cdiv(walk["channels"], tile["CHANNELS"])
    launch(
        _map_gradient,
        u.shape[0] * position_blocks * channel_blocks,
        u,
        to,
        grad,
        grad.stride(0),
        features,
        u_map.contiguous(),
        v_map.contiguous(),
        norms.contiguous(),
        distance.contiguous(),
        *walk.values(),
        position_blocks,
        channel_blocks,
        COMPUTE=compute_dtype(u, u_map),
        **tile,
    )
    return out if to is out else out.copy_(to)
