"""Which squares of the Square attack in linf change nothing, so that no pass of the network needs to look at them.

A square sets the elements at one place to the ends of the ball, each channel by a sign. Late in a search squares
are small, and the image lies at the ends already. So there are few points to go to: 64 from an image of 8x8
elements. Thousands of queries try them again and again. A square is settled if its elements have the values
already, or if its point was tried since the image changed last and was not kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadv.attacks.square_points import WORD_BITS
from fastadv.attacks.square_proposals import Proposals, Squares

_MOST = 1 << 14  # largest size of a table; of more squares, few would be drawn twice


class TriedSquares:
    """For each image a table of the squares of its present side, which is true where a square is settled.

    A square has the number ``place * 2**C + signs``, with places counted row by row.

    Args:
        proposals: the proposals, which have the ends of the ball.
        size: number of entries of a table.
    """

    def __init__(self, proposals: Squares, size: int) -> None:
        self._highest, self._lowest = proposals.highest, proposals.lowest
        images = len(self._highest)
        self._table = torch.zeros(images, size, dtype=torch.bool, device=self._highest.device)
        self._sides = torch.zeros(images, dtype=torch.int64, device=self._highest.device)

    @classmethod
    def of(cls, proposals: Proposals, images: Tensor, smallest: int) -> TriedSquares | None:
        """Return tables for images [B, C, H, W]; None if the tables would be too large or the norm is not linf.

        Args:
            proposals: the points that are tried.
            images: the images.
            smallest: the smallest side to come.
        """
        size = _squares(images, smallest)
        return cls(proposals, size) if isinstance(proposals, Squares) and size <= _MOST else None

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the images, by int64 indices."""
        self._highest, self._lowest = self._highest[rows], self._lowest[rows]
        self._table, self._sides = self._table[rows], self._sides[rows]

    def forget(self, changed: Tensor) -> None:
        """Drop the tables of images that have changed, [B] bool."""
        self._sides = self._sides.masked_fill(changed, 0)

    def exhausted(self, sides: Tensor, images: Tensor) -> Tensor:
        """Whether all squares of an image are settled, [B] bool; also renews the tables that must be.

        Args:
            sides: side of each image's squares, [B].
            images: the current images, [B, C, H, W].
        """
        # The one wait for the device; no side is 0.
        stale = torch.where(self._sides != sides, sides, 0).tolist()
        for side in set(stale) - {0}:
            rows = [row for row, own in enumerate(stale) if own == side]
            self._begin(indices(rows, sides.device), side, images)
        self._sides = sides
        return self._table.all(1)

    def fresh(self, words: Tensor, sides: Tensor, valid: Tensor) -> Tensor:
        """Return which queries have a new point, [B, n] bool; of several queries with the same point the first.

        Args:
            words: random words of the queries, [B, n, words].
            sides: side of each image's squares, [B].
            valid: false for queries that are not to be made, [B, n].
        """
        numbers = self._numbers(words, sides[:, None])
        open_ = valid & ~self._table.gather(1, numbers)
        columns = torch.arange(numbers.shape[1], device=numbers.device).expand_as(numbers)
        never = torch.full_like(numbers, numbers.shape[1])
        first = torch.full(self._table.shape, numbers.shape[1], device=numbers.device)
        first.scatter_reduce_(1, numbers, torch.where(open_, columns, never), "amin")
        return open_ & (first.gather(1, numbers) == columns)

    def add(self, rows: Tensor, words: Tensor, sides: Tensor) -> None:
        """Mark points of some images as tried: rows [R], words [R, words]; the sides of all images [B]."""
        self._table[rows, self._numbers(words, sides[rows])] = True

    def _begin(self, rows: Tensor, side: int, images: Tensor) -> None:
        """A new table for some images: squares are settled whose elements have the values already."""
        kept = []
        for ends in (self._lowest, self._highest):
            differs = (images[rows] != ends[rows]).float()
            kept.append(F.max_pool2d(differs, side, stride=1).flatten(2) == 0)  # [R, C, places]
        settled = torch.ones(len(rows), kept[0].shape[2], 1, dtype=torch.bool, device=rows.device)
        # The first channel's sign is the lowest bit.
        for channel in reversed(range(images.shape[1])):
            signs = torch.stack([one[:, channel] for one in kept], dim=2)
            settled = (settled[..., None] & signs[:, :, None, :]).flatten(2)
        settled = settled.flatten(1)
        self._table[rows] = True  # beyond the squares of this side there are no others
        self._table[rows, : settled.shape[1]] = settled

    def _numbers(self, words: Tensor, sides: Tensor) -> Tensor:
        """The numbers of the squares that words [..., words] draw."""
        _, channels, height, width = self._highest.shape
        across = width - sides + 1
        row, column = (
            words[..., axis] * places >> WORD_BITS
            for axis, places in ((0, height - sides + 1), (1, across))
        )
        signs = words[..., 2] & (1 << channels) - 1
        return (row * across + column << channels) + signs


def indices(rows: list[int], device: torch.device) -> Tensor:
    """Indices that the host knows, int64 on the device; the host does not wait for the copy."""
    return torch.tensor(rows, dtype=torch.int64, device="cpu").to(device, non_blocking=True)


def _squares(images: Tensor, side: int) -> int:
    """The number of squares of a side, with all signs of the channels."""
    _, channels, height, width = images.shape
    return (height - side + 1) * (width - side + 1) << channels
