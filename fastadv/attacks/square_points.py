"""The points that Square tries in linf: images with one more square each, in one pass over memory.

Source: Andriushchenko, Croce, Flammarion and Hein, "Square attack: a query-efficient black-box adversarial attack
via random search", ECCV 2020, algorithm 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.ops import NATIVE
from fastadv.ops.checks import in_layout_of

WORD_BITS = 32

# On the CPU in csrc/cpu/square_points.cpp.
torch.library.define(
    "fastadv::square_points",
    "(Tensor images, Tensor highest, Tensor lowest, Tensor words, int side) -> Tensor",
)


def square_points(
    images: Tensor, highest: Tensor, lowest: Tensor, words: Tensor, side: int
) -> Tensor:
    """Images in which one square each has been set to the ball's upper or lower end, channel by channel.

    Args:
        images: [B, C, H, W].
        highest: the upper ends of ball and bounds, [B, C, H, W].
        lowest: the lower ends, [B, C, H, W].
        words: 32 random bits each, [B, 2 + ceil(C / 32)] int64: the square's row, its column, and one bit for each
            channel, 1 for the upper end.
        side: side of the squares, from 1 to the smaller of H and W.

    Returns:
        The changed images [B, C, H, W].
    """
    if _is_compiled(images):
        ends = (in_layout_of(end, images) for end in (highest, lowest))
        return torch.ops.fastadv.square_points(images, *ends, words, side)
    return square_points_by_torch(images, highest, lowest, words, side)


def square_points_by_torch(
    images: Tensor, highest: Tensor, lowest: Tensor, words: Tensor, side: int
) -> Tensor:
    """Compute `square_points` by operations of torch, on any device."""
    inside = inside_of(window(words, side, images.shape[2], images.shape[3]))
    up = bits(words[:, 2:], images.shape[1])[:, :, None, None]
    return torch.where(inside, torch.where(up, highest, lowest), images)


def window(words: Tensor, side: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Squares at random places, from two words each: rows [B, H, 1] and columns [B, 1, W].

    Each holds its number within the square, and -1 outside.
    """
    rows = _numbered(words[:, 0], side, height)
    return rows[:, :, None], _numbered(words[:, 1], side, width)[:, None, :]


def inside_of(window: tuple[Tensor, Tensor]) -> Tensor:
    """Which elements lie in a square, [B, 1, H, W] bool."""
    rows, columns = window
    return ((rows >= 0) & (columns >= 0))[:, None]


def words_for(bits: int) -> int:
    """The number of words that hold a number of bits."""
    return -(-bits // WORD_BITS)


def bits(words: Tensor, count: int) -> Tensor:
    """The first bits of some words [B, n], [B, count] bool."""
    places = torch.arange(WORD_BITS, device=words.device)
    return (words[:, :, None] >> places & 1).flatten(1)[:, :count] == 1


def _numbered(words: Tensor, side: int, length: int) -> Tensor:
    """Intervals of ``side`` elements at random places, [B, length]: 0 .. side - 1 inside, -1 outside."""
    start = words * (length - side + 1) >> WORD_BITS
    number = torch.arange(length, device=words.device) - start[:, None]
    return torch.where((number >= 0) & (number < side), number, -1)


def _is_compiled(images: Tensor) -> bool:
    dense = images.is_contiguous() or images.is_contiguous(memory_format=torch.channels_last)
    fits = dense and images.dtype in (torch.float32, torch.float64)
    return fits and images.device.type == "cpu" and NATIVE.library is not None
