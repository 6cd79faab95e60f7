"""Philox 4x32-10 in plain torch: the reference of every op that draws random numbers.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The key is the seed. The counter
is (block, stream, sample id), block = the element's logical index in (C, H, W) order // 4; the element takes word
index % 4 of the block. A number therefore depends on the seed, the sample and the place in the image alone: not
on memory layout, threads, position in the batch, rank or device.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
WORDS = 4  # 32-bit words per block
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox(seed: int, sample_ids: Tensor, blocks: int, stream: int | Tensor = 0) -> Tensor:
    """The first blocks of random words of each sample.

    Args:
        seed: the key, 64 bits.
        sample_ids: [B] int64.
        blocks: how many blocks of four words.
        stream: separates draws of one seed with different uses; a number for all samples, or int64 [B].

    Returns:
        [B, 4 * blocks] int64 with values in 0 .. 2**32 - 1.
    """
    batch, device = sample_ids.shape[0], sample_ids.device
    c0 = torch.arange(blocks, dtype=torch.int64, device=device).expand(batch, blocks)
    c1 = torch.as_tensor(stream, device=device).view(-1, 1).expand(batch, blocks)
    c2 = (sample_ids & _MASK)[:, None].expand(batch, blocks)
    c3 = (sample_ids >> 32 & _MASK)[:, None].expand(batch, blocks)
    words = philox_block((c0, c1, c2, c3), (seed & _MASK, seed >> 32 & _MASK))
    return torch.stack(words, dim=-1).reshape(batch, WORDS * blocks)


def philox_block(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The random words of counters of four 32-bit words each, as int64 of any shape."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + KEY_STEPS[0] & _MASK, k1 + KEY_STEPS[1] & _MASK
    return c0, c1, c2, c3


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low words of a 32x32-bit product, in int64 without overflow of the sign bit."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16 & _MASK, (high << 16 | low & 0xFFFF) & _MASK


def random_words(seed: int, sample_ids: Tensor | None, like: Tensor, stream: int = 0) -> Tensor:
    """One word per element of ``like`` [B, ...], in logical order: [B, N] int64."""
    batch, size = like.shape[0], like[0].numel() if like.shape[0] else 0
    if sample_ids is None:
        sample_ids = torch.arange(batch, dtype=torch.int64, device=like.device)
    return philox(seed, sample_ids, -(-size // WORDS), stream)[:, :size]


def symmetric_uniform(words: Tensor) -> Tensor:
    """Words to multiples of 2**-23 in [-1, 1): exact in float32, so that no backend rounds differently."""
    return ((words >> 8) - (1 << 23)).to(torch.float32) * 2.0**-23
