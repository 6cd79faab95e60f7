"""The random points that the Square attack tries: stripes and squares in linf, moved bumps in l2 and l1.

Every image has a place and signs of its own, made from its own random words. Source: Andriushchenko, Croce,
Flammarion and Hein, "Square attack: a query-efficient black-box adversarial attack via random search", ECCV 2020,
algorithms 2 and 3; the l1 form is from Croce and Hein, "Mind the box", ICML 2021.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastadv.attacks.batch import AttackBatch
from fastadv.attacks.projections import to_l1_ball
from fastadv.attacks.square_points import bits, inside_of, square_points, window, words_for
from fastadv.ops.checks import over_samples

if TYPE_CHECKING:
    from typing_extensions import Self

_TINY = 1e-12
_TILES = 5  # the first bumps of l2 and l1 form a grid of so many a side


class Proposals(ABC):
    """Points to try for the images of one batch, [B, C, H, W].

    Attributes:
        first_words: number of random words for an image's first point.
        next_words: number of random words for each later point.
    """

    first_words: int
    next_words: int

    def __init__(self, batch: AttackBatch) -> None:
        self._batch = batch
        _, self._channels, self._height, self._width = batch.x.shape

    @abstractmethod
    def first(self, words: Tensor) -> Tensor:
        """The points at which the search begins, from words [B, first_words]."""

    @abstractmethod
    def next(self, images: Tensor, words: Tensor, side: int) -> Tensor:
        """A change of the images in a square of this side; words [B, next_words]."""

    @abstractmethod
    def side_of(self, share: float) -> int:
        """The side of a square that covers a share of an image."""

    def rows(self, rows: Tensor) -> Self:
        """The proposals for some of the images, by int64 indices."""
        some = copy.copy(self)
        some._batch = self._batch.rows(rows)
        return some

    def _side(self, share: float) -> int:
        """The side of a square that covers a share of an image, not yet held to the image's sides."""
        return round(math.sqrt(share * self._height * self._width))

    def _window(self, words: Tensor, side: int) -> tuple[Tensor, Tensor]:
        return window(words, side, self._height, self._width)


class Squares(Proposals):
    """linf: every element is eps above or below the image's; a square takes one sign per channel.

    Attributes:
        highest: the upper ends of ball and bounds, [B, C, H, W].
        lowest: the lower ends.
    """

    def __init__(self, batch: AttackBatch) -> None:
        super().__init__(batch)
        self.first_words = self._channels * self._width
        self.next_words = 2 + words_for(self._channels)
        radius = over_samples(batch.eps, batch.x) if isinstance(batch.eps, Tensor) else batch.eps
        self.highest = (batch.x + radius).clamp(*batch.bounds)
        self.lowest = (batch.x - radius).clamp(*batch.bounds)

    def first(self, words: Tensor) -> Tensor:
        """Vertical stripes."""
        up = (words & 1 == 1).view(-1, self._channels, 1, self._width)
        return torch.where(up, self.highest, self.lowest)

    def next(self, images: Tensor, words: Tensor, side: int) -> Tensor:
        """One more square."""
        return square_points(images, self.highest, self.lowest, words, side)

    def side_of(self, share: float) -> int:
        """At least 1, and not beyond the image."""
        return min(max(self._side(share), 1), self._height, self._width)

    def rows(self, rows: Tensor) -> Self:
        """The proposals for some of the images; the ends are copied and not computed again."""
        some = super().rows(rows)
        some.highest, some.lowest = self.highest[rows], self.lowest[rows]
        return some


class Bumps(Proposals):
    """l2 and l1: a square takes over the change in another, as a bump with halves of opposite signs."""

    def __init__(self, batch: AttackBatch) -> None:
        super().__init__(batch)
        self._order = 1 if batch.norm == "l1" else 2
        self._bumps: dict[int, Tensor] = {}
        self._tile = max(min(self._height, self._width) // _TILES, 1)
        self._grid = (self._height // self._tile, self._width // self._tile)
        self.first_words = self._grid[0] * self._grid[1] * (self._channels + 1)
        self.next_words = 4 + words_for(self._channels + 1)

    def first(self, words: Tensor) -> Tensor:
        """A grid of bumps, each of random sign and orientation."""
        x, (high, wide), tile = self._batch.x, self._grid, self._tile
        flags = (words & 1 == 1).view(-1, self._channels + 1, high, 1, wide, 1)
        bump = self._bump(tile)[None, None, None, :, None, :]  # [B, C, rows, tile, columns, tile]
        bumps = torch.where(flags[:, :1], bump, bump.transpose(3, 5))
        bumps = torch.where(flags[:, 1:], bumps, -bumps)
        delta = torch.zeros_like(x)
        top, left = (self._height - high * tile) // 2, (self._width - wide * tile) // 2
        inner = delta[:, :, top : top + high * tile, left : left + wide * tile]
        inner.copy_(bumps.reshape(inner.shape))
        return self._bounded(delta)

    def side_of(self, share: float) -> int:
        """Odd and at least 3, and not beyond the image."""
        side = max(self._side(share), 3)
        return min(side + 1 - side % 2, self._height, self._width)

    def next(self, images: Tensor, words: Tensor, side: int) -> Tensor:
        """The change within two squares, moved into the first of them."""
        delta = images - self._batch.x
        place = self._window(words, side)
        first, second = inside_of(place), inside_of(self._window(words[:, 2:], side))
        flags = bits(words[:, 4:], self._channels + 1)[:, :, None, None]
        old = torch.where(first, delta, 0.0)
        bump = self._placed_bump(place, side, flags[:, 0])
        new = torch.where(flags[:, 1:], bump, -bump) + old / (self._length(old, 1) + _TINY)
        new = torch.where(first, new, 0.0)
        budget = self._budget(delta, torch.where(first | second, delta, 0.0))
        new = new * (budget / (self._length(new, 1) + _TINY))
        return self._bounded(torch.where(first, new, torch.where(second, 0.0, delta)))

    def _budget(self, delta: Tensor, within: Tensor) -> Tensor:
        """The length that each channel's square may have, [B, C, 1, 1].

        It is the length of the change within the two squares, and a channel's part of the ball's rest.
        """
        order, channels = self._order, self._channels
        left = (self._radius() ** order - self._length(delta) ** order).clamp(min=0) / channels
        if order == 1:
            return (left + self._length(within, 1)) * channels
        return (left + self._length(within, 1).square()).sqrt()

    def _bounded(self, delta: Tensor) -> Tensor:
        """Images changed by delta, in ball and bounds; in l2 by as much of its direction as the ball allows."""
        batch = self._batch
        if self._order == 1:
            return to_l1_ball(batch.x + delta, batch.x, batch.eps, batch.bounds)
        scale = self._radius() / (self._length(delta) + _TINY)
        return batch.project_(batch.x + delta * scale)

    def _radius(self) -> Tensor:
        """The radius, [B, 1, 1, 1] or one for all."""
        x, eps = self._batch.x, self._batch.eps
        return over_samples(eps, x) if isinstance(eps, Tensor) else x.new_full((1, 1, 1, 1), eps)

    def _length(self, delta: Tensor, first_axis: int = 0) -> Tensor:
        """The norm of each image, or, with ``first_axis`` 1, of each channel, with axes of size 1."""
        axes = (2, 3) if first_axis else (1, 2, 3)
        return torch.linalg.vector_norm(delta, self._order, axes, keepdim=True)

    def _placed_bump(self, place: tuple[Tensor, Tensor], side: int, turned: Tensor) -> Tensor:
        """The bump at each image's square, upright or turned, [B, 1, H, W]; outside of it anything."""
        row, column = (index.clamp(min=0) for index in place)
        index = torch.where(turned, column * side + row, row * side + column)
        return self._bump(side).flatten()[index][:, None]

    def _bump(self, side: int) -> Tensor:
        """A square [side, side] of unit norm whose upper half is positive and whose lower half is negative."""
        if side not in self._bumps:
            self._bumps[side] = _bump(side, self._order).to(self._batch.x)
        return self._bumps[side]


def proposals_for(batch: AttackBatch) -> Proposals:
    """The points to try in the batch's norm."""
    return Squares(batch) if batch.norm == "linf" else Bumps(batch)


@cache
def _bump(side: int, order: int) -> Tensor:
    upper, lower = (_heap(height, side, order) for height in (side // 2, side - side // 2))
    bump = torch.cat((upper, -lower))
    return bump / torch.linalg.vector_norm(bump, order)


def _heap(height: int, width: int, order: int) -> Tensor:
    """A rectangle of unit norm that falls off from its centre, [height, width].

    An element at distance d, the larger of those along the two axes, is the sum of 1 / (k + 1)**2, in l1 of
    1 / (k + 1)**4, over k from d up to the largest distance.
    """
    row = (torch.arange(height, device="cpu") - height // 2).abs()
    column = (torch.arange(width, device="cpu") - width // 2).abs()
    distance = torch.maximum(row[:, None], column[None, :])
    steps = torch.arange(1, max(height // 2, width // 2) + 2, dtype=torch.float64, device="cpu")
    sums = (steps ** (-4 if order == 1 else -2)).flip(0).cumsum(0).flip(0)
    heap = sums[distance]
    return heap / torch.linalg.vector_norm(heap, order).clamp(min=_TINY)
