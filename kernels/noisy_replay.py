"""ARREST's noisy replay in Triton. Definition: fastadv/ops/noisy_replay.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import clip, compute_dtype, double_bits, launch, number, per_sample, seed_bits
from .layout import dense, in_layout_of
from .noise import Tiles, tile_of_noise


@triton.jit(do_not_specialize=["tau", "eps", "low", "high", "seed", "tiles"])
def _replay(
    out,
    x,
    adv,
    distance,
    distance_stride,
    tau: tl.int64,
    eps: tl.int64,
    eps_values,
    low: tl.int64,
    high: tl.int64,
    seed: tl.int64,
    ids,
    size,
    channels,
    tiles,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    row = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    sample = row if ids is None else tl.load(ids + row)
    scale = per_sample(eps, eps_values, row, COMPUTE)
    added, at, inside = tile_of_noise(
        seed, sample, tile, scale, size, channels, "linf", PIXELS, CHANNELS, COMPUTE
    )
    at += row.to(tl.int64) * size
    far = tl.load(distance + row * distance_stride).to(tl.float64) > number(tau, tl.float64)
    # Each sample reads one of the two images, not both.
    if far:
        moved = tl.load(x + at, inside, other=0.0).to(COMPUTE) + added
        moved = clip(moved, number(low, COMPUTE), number(high, COMPUTE))
        tl.store(out + at, moved.to(out.dtype.element_ty), inside)
    else:
        tl.store(out + at, tl.load(adv + at, inside, other=0.0), inside)


def noisy_replay(
    x: Tensor,
    adv: Tensor,
    distance: Tensor,
    tau: float,
    eps: float,
    eps_per_sample: Tensor | None,
    low: float,
    high: float,
    seed: int,
    sample_ids: Tensor | None,
) -> Tensor:
    """The op ``fastadv::noisy_replay``."""
    out = torch.empty_like(x)
    tiles = Tiles.of(x, out)
    if tiles is None:
        arguments = (distance, tau, eps, eps_per_sample, low, high, seed, sample_ids)
        return out.copy_(noisy_replay(x.contiguous(), adv.contiguous(), *arguments))
    if out.numel() == 0:
        return out
    # torch compares in the dtype of the distances, so tau is rounded to it.
    threshold = torch.tensor(tau, dtype=distance.dtype).item()
    launch(
        _replay,
        x.shape[0] * tiles.per_sample,
        x,
        out,
        x,
        in_layout_of(adv, x),
        distance,
        distance.stride(0),
        double_bits(threshold),
        double_bits(eps),
        dense(eps_per_sample),
        double_bits(low),
        double_bits(high),
        seed_bits(seed),
        dense(sample_ids),
        tiles.size,
        tiles.channels,
        tiles.per_sample,
        COMPUTE=compute_dtype(x),
        **tiles.settings,
    )
    return out
