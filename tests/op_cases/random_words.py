"""Philox 4x32-10 in numpy, from the paper's definition: what the ops' random numbers are checked against."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Ten rounds on counters [..., 4] of 32-bit words; the words of the result likewise, all as uint64."""
    x0, x1, x2, x3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(10):
        p0, p1 = x0 * np.uint64(0xD2511F53), x2 * np.uint64(0xCD9E8D57)
        x0, x1, x2, x3 = (
            (p1 >> _HALF) ^ x1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _HALF) ^ x3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack((x0, x1, x2, x3), axis=-1)


def words(seed: int, ids: list[int], count: int, stream: int = 0) -> np.ndarray:
    """The first words of each sample [B, count]; word w of counter (w // 4, stream, id) and key seed."""
    blocks = -(-count // 4)
    counter = np.zeros((len(ids), blocks, 4), dtype=np.uint64)
    counter[..., 0] = np.arange(blocks)
    counter[..., 1] = stream
    counter[..., 2] = np.array([i & 0xFFFFFFFF for i in ids], dtype=np.uint64)[:, None]
    counter[..., 3] = np.array([i >> 32 & 0xFFFFFFFF for i in ids], dtype=np.uint64)[:, None]
    drawn = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    return drawn.reshape(len(ids), 4 * blocks)[:, :count]


def ball_noise(x: Tensor, eps: Tensor, norm: str, seed: int, ids: list[int]) -> Tensor:
    """Noise of `fastadv.ops.random_start` in the shape and dtype of x; eps [B]."""
    size = x[0].numel() if len(x) else 0
    drawn = words(seed, ids, size)
    if norm == "linf":
        unit = (drawn >> np.uint64(8)).astype(np.float64) * 2.0**-23 - 1
    else:
        unit = _unit_ball(drawn, words(seed, ids, size, stream=1), norm)
    noise = torch.from_numpy(unit).to(x.device, x.dtype)
    return (noise * eps[:, None].to(x.dtype)).view(x.shape)


def _unit_ball(drawn: np.ndarray, radius_words: np.ndarray, norm: str) -> np.ndarray:
    """A direction of length 1 times a radius, the largest of n uniforms in (0, 1]."""
    if drawn.size == 0:
        return np.zeros(drawn.shape)
    if norm == "l2":
        direction = _byte_sums(drawn)
        length = np.sqrt(np.square(direction).sum(1, keepdims=True))
    else:
        direction = _signed_logarithms(drawn)
        length = np.abs(direction).sum(1, keepdims=True)
    radius = ((radius_words >> np.uint64(8)).max(1, keepdims=True).astype(np.float64) + 1) / 2**24
    return direction * np.divide(radius, length, out=np.zeros_like(length), where=length > 0)


def _byte_sums(drawn: np.ndarray) -> np.ndarray:
    """Sums of a word's four bytes, centred."""
    shifts = np.arange(0, 32, 8, dtype=np.uint64)
    return (drawn[..., None] >> shifts & np.uint64(0xFF)).sum(-1).astype(np.float64) - 510


def _signed_logarithms(drawn: np.ndarray) -> np.ndarray:
    """Minus log2 of the upper 24 bits, by the cubic of the definition; the sign is the lowest bit."""
    upper = (drawn >> np.uint64(8)).astype(np.int64) | 1
    mantissa, exponent = np.frexp(upper.astype(np.float64))
    fraction = ((2 * mantissa - 1) * 2**16).astype(np.int64)
    inner = 16125 - fraction * 5566 // 2**16
    slope = 28916 - fraction * inner // 2**16
    logarithm = fraction + fraction * (2**16 - fraction) // 2**15 * slope // 2**17
    magnitude = (25 - exponent) * 2.0**16 - logarithm
    return np.where(drawn & np.uint64(1) == 1, -magnitude, magnitude)
