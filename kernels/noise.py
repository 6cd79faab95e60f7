"""Philox 4x32-10 noise in Triton. Definition: fastadv/ops/philox.py and fastadv/ops/random_start.py."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .layout import same_layout, sample_size

_TILE = 1024


@triton.jit
def philox(seed, sample, block, STREAM: tl.constexpr):
    """The four words of each block of a sample, as uint32 tensors of the shape of ``block``."""
    seed = seed.to(tl.int64)
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    sample = sample.to(tl.int64)
    c0 = block.to(tl.uint32)
    zero = c0 * 0
    c1 = zero + STREAM
    c2 = zero + sample.to(tl.uint32)
    c3 = zero + (sample >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, zero + 0xD2511F53)
        high1 = tl.umulhi(c2, zero + 0xCD9E8D57)
        low0 = c0 * 0xD2511F53
        low1 = c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def near_gaussian(word):
    """The sum of a word's bytes minus its mean, an integer that is nearly normally distributed."""
    total = (word & 0xFF) + ((word >> 8) & 0xFF) + ((word >> 16) & 0xFF) + (word >> 24)
    return total.to(tl.int32) - 510


@triton.jit
def near_laplace(word):
    """An integer of random sign whose magnitude is nearly exponentially distributed."""
    bits = (word >> 8 | 1).to(tl.float32).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 127
    fraction = (bits >> 7) & 0xFFFF
    slope = 28916 - ((fraction * (16125 - ((fraction * 5566) >> 16))) >> 16)
    bend = (((fraction * (0x10000 - fraction)) >> 15) * slope) >> 17
    magnitude = ((24 - exponent) << 16) - fraction - bend
    return tl.where((word & 1) == 1, -magnitude, magnitude)


@triton.jit
def noise(word, scale, NORM: tl.constexpr, COMPUTE: tl.constexpr):
    """Words to noise: uniform in [-scale, scale), or a direction times scale."""
    if NORM == "l2":
        unit = near_gaussian(word).to(COMPUTE)
    elif NORM == "l1":
        unit = near_laplace(word).to(COMPUTE)
    else:
        unit = ((word >> 8).to(tl.int32) - (1 << 23)).to(tl.float32).to(COMPUTE)
        unit *= 1.1920928955078125e-07  # 2**-23; the product is exact
    return unit * scale


@triton.jit
def tile_of_noise(
    seed,
    sample,
    tile,
    scale,
    size,
    channels,
    NORM: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One tile of a sample: its noise, the positions in the sample's memory, and whether these exist.

    A contiguous sample is one channel of ``size`` elements. A channels-last sample is cut into tiles of pixels
    times channels. There a block's four words are four pixels of one channel, so the number of pixels must be a
    multiple of 4.
    """
    if CHANNELS == 1:
        first = tile.to(tl.int64) * PIXELS
        at = first + tl.arange(0, PIXELS)
        inside = tl.arange(0, PIXELS) < size - first
        block = first // 4 + tl.arange(0, PIXELS // 4)
        w0, w1, w2, w3 = philox(seed, sample, block, 0)
        word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    else:
        pixels = size // channels
        across = tl.cdiv(channels, CHANNELS)
        first = (tile // across).to(tl.int64) * PIXELS
        channel = (tile % across) * CHANNELS + tl.arange(0, CHANNELS)
        pixel = first + tl.arange(0, PIXELS)
        at = pixel[:, None] * channels + channel[None, :]
        inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
        block = first // 4 + tl.arange(0, PIXELS // 4)
        block = channel.to(tl.int64)[None, :] * (pixels // 4) + block[:, None]
        w0, w1, w2, w3 = philox(seed, sample, block, 0)
        word = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [PIXELS / 4, CHANNELS, 2, 2]
        word = tl.reshape(tl.permute(word, (0, 2, 3, 1)), (PIXELS, CHANNELS))
    return noise(word, scale, NORM, COMPUTE), at, inside


@dataclass(frozen=True)
class Tiles:
    """How the samples of a batch are cut into tiles, one per program."""

    size: int
    channels: int
    pixels_of_tile: int
    channels_of_tile: int

    @classmethod
    def of(cls, x: Tensor, out: Tensor) -> Tiles | None:
        """The tiles of ``x`` and ``out`` in their common memory layout; None if the kernels do not support it."""
        size = sample_size(x)
        if not same_layout(x, out):
            return None
        if x.is_contiguous():
            return cls(size, 1, _TILE, 1)
        channels_last = x.dim() == 4 and x.permute(0, 2, 3, 1).is_contiguous()
        if not channels_last or x.shape[2] * x.shape[3] % 4:
            return None
        width = min(64, triton.next_power_of_2(x.shape[1]))
        return cls(size, x.shape[1], _TILE // width, width)

    @property
    def per_sample(self) -> int:
        """Tiles of one sample."""
        down = triton.cdiv(self.size // self.channels, self.pixels_of_tile)
        return down * triton.cdiv(self.channels, self.channels_of_tile)

    @property
    def settings(self) -> dict[str, int]:
        """The tile's shape, as kernels take it."""
        return {"PIXELS": self.pixels_of_tile, "CHANNELS": self.channels_of_tile}
