"""Square with several queries of an image in one pass of the network, for the few images that are left.

A pass for few images costs nearly as much as a pass for more. Most points that Square tries late in a search
change nothing. So the points of the next queries are made from the current image and tried together. The first
point that raises the loss is kept. The later points were made from an image that is no longer the current one, so
their queries are made again. Thus each query tries the same point as in a search that makes one query after the
other.

A query whose point is the image itself, or was tried before and not kept, changes nothing either. It counts as
made and costs no pass. `fastadv.attacks.square_tried` finds these queries.

On a GPU each look at a value waits until the device has done its work, which then stands still. So a round reads
what it must know in three places, and everything else stays on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastadv.attacks.batch import AttackBatch
from fastadv.attacks.best import Best, where_images
from fastadv.attacks.objectives import Objective
from fastadv.attacks.square_proposals import proposals_for
from fastadv.attacks.square_tried import TriedSquares, indices
from fastadv.ops.philox import WORDS, philox

DRAWN_AT_ONCE = 64  # queries in a block; drawing random words for one query at a time costs many small operations
_BLOCKS = 4  # number of blocks that are drawn at once for an image
_MOST = 64  # largest number of queries in a pass
_USEFUL = 0.6  # smallest fraction of the points in a pass that are expected to count
_MEMORY = 0.995  # factor, for each query, of the old estimate of the fraction of queries that change an image
_IMAGE = 3 * 32 * 32
# The fixed cost of a pass, in elements of images: on one thread of a CPU with AMX a pass of ResNet-18 costs as
# much as 2 to 3 images more than it has. On several threads, and with smaller networks, it costs more.
_FIXED = {"cpu": 4 * _IMAGE}
_FIXED_ELSEWHERE = 512 * _IMAGE
# The largest number of elements of a pass: beyond it an image costs no less in a larger pass.
_LARGEST = {"cpu": 64 * _IMAGE}
_LARGEST_ELSEWHERE = 512 * _IMAGE


def words_of_queries(
    seed: int, sample_ids: Tensor, blocks: Tensor | int, queries: int, words: int
) -> Tensor:
    """Random words for the queries of one block of `DRAWN_AT_ONCE`, [B, queries, words] int64.

    Args:
        seed: seed of the search.
        sample_ids: numbers of the images [B].
        blocks: number of the block, for all images or [B].
        queries: number of queries, from the block's first.
        words: number of words for each query.
    """
    drawn = philox(seed, sample_ids, -(-queries * words // WORDS), 1 + blocks)
    return drawn[:, : queries * words].view(-1, queries, words)


class AcceptedShare:
    """An estimate of the fraction of queries that change their image, from the last queries."""

    def __init__(self) -> None:
        self.value = 1.0

    def see(self, accepted: int, queries: int) -> None:
        """Record a number of queries, and the number of them that changed their image."""
        if queries:
            kept = _MEMORY**queries
            self.value = kept * self.value + (1 - kept) * accepted / queries

    def expected(self, ahead: int) -> float:
        """The expected number of an image's next points that count: all points up to the first kept one."""
        if self.value <= 0:
            return float(ahead)
        if self.value >= 1:
            return 1.0
        # 1 - (1 - value) ** ahead would be 0 for a tiny value.
        return -math.expm1(ahead * math.log1p(-self.value)) / self.value


def queries_at_once(x: Tensor, share: AcceptedShare) -> int:
    """The number of queries per image with the least cost per useful query, for images ``x``: a power of two."""
    kind, size = x.device.type, x.numel()
    fixed = _FIXED.get(kind, _FIXED_ELSEWHERE)
    largest = _LARGEST.get(kind, _LARGEST_ELSEWHERE)
    best, most, ahead = 1, 1 / (fixed + size), 2
    while ahead <= _MOST and ahead * size <= largest:
        useful = share.expected(ahead)
        if useful >= _USEFUL * ahead and useful / (fixed + ahead * size) > most:
            best, most = ahead, useful / (fixed + ahead * size)
        ahead *= 2
    return best


class AheadSearch:
    """The rest of a random search, for the images that it has not broken yet.

    Args:
        batch: the images that are left.
        best: the best images so far; no image is broken.
        objective: the value to be raised.
        share_at: the fraction of an image that a query's square covers.
        seed: seed of the search.
        query: the number of the next query, from 1.
        end: the number after the last query.
        accepted: the estimated fraction of queries that change an image.
    """

    def __init__(
        self,
        batch: AttackBatch,
        best: Best,
        objective: Objective,
        share_at: Callable[[int], float],
        seed: int,
        query: int,
        end: int,
        accepted: AcceptedShare,
    ) -> None:
        self._batch, self._best, self._objective = batch, best, objective
        self._seed, self._end, self._accepted = seed, end, accepted
        self._device, images = batch.x.device, len(batch.x)
        self._proposals = proposals_for(batch)
        sides = [self._proposals.side_of(share_at(number - 1)) for number in range(1, end)]
        self._sides = torch.tensor([0, *sides], device=self._device)  # by query
        self._later = torch.tensor(_next_changes(sides), device=self._device)  # by query
        self._queries = torch.full((images,), query, device=self._device)  # the next ones [B]
        self._active = images  # how many images had a point in the last pass
        # Of each image [2, B], not yet seen by the estimate: whether it changed, its points that counted.
        self._outcome = torch.zeros(2, images, dtype=torch.int64, device=self._device)
        self._tried = TriedSquares.of(self._proposals, best.images, min(sides[query - 1 :]))
        # Random words [B, queries, words], from the first query of a block of each image, [B].
        shape = (images, _BLOCKS * DRAWN_AT_ONCE, self._proposals.next_words)
        self._words = torch.empty(shape, dtype=torch.int64, device=self._device)
        self._first = torch.zeros_like(self._queries)
        self._draw(torch.arange(images, device=self._device))

    def carry_out(self, result: Best, rows: Tensor) -> None:
        """Search until every image is broken or has used its queries.

        Args:
            result: the result of the whole batch, to which the best images are added.
            rows: the indices of these images in the whole batch, int64.
        """
        while True:
            going, used = self._pass_over()
            if not all(going):
                result.merge(self._best, rows)
                if not any(going):
                    return
                kept = [row for row, goes in enumerate(going) if goes]
                rows = rows[indices(kept, self._device)]
                self._keep(indices(kept, self._device))
                used = [used[row] for row in kept]
            self._round(used)

    def _pass_over(self) -> tuple[list[int], list[int]]:
        """Images with nothing to try any more go on with the first smaller square, or are through.

        Returns:
            By image: whether its search goes on, and how many queries of its random words lie behind it.
        """
        while True:
            queries = self._queries.clamp(max=self._end - 1)
            within = self._queries < self._end
            done = torch.zeros_like(within)
            if self._tried is not None:
                done = within & self._tried.exhausted(self._sides[queries], self._best.images)
            going = within & ~self._best.succeeded
            state = torch.stack((done, going, self._queries - self._first, *self._outcome))
            through, goes, used, changed, counted = state.tolist()
            self._accepted.see(sum(changed), sum(counted))
            self._outcome = torch.zeros_like(self._outcome)
            if not any(through):
                return goes, used
            self._queries = torch.where(done, self._later[queries], self._queries)

    def _keep(self, rows: Tensor) -> None:
        self._best, self._batch = self._best.rows(rows), self._batch.rows(rows)
        self._proposals = self._proposals.rows(rows)
        self._queries, self._words = self._queries[rows], self._words[rows]
        self._first, self._outcome = self._first[rows], self._outcome[:, rows]
        self._active = min(self._active, len(rows))
        if self._tried is not None:
            self._tried.keep(rows)

    def _draw(self, rows: Tensor) -> None:
        """Random words of the next queries of some images, from the block of `DRAWN_AT_ONCE` that each is in."""
        ids = self._batch.sample_ids
        assert ids is not None
        blocks = (self._queries[rows] - 1) // DRAWN_AT_ONCE
        every = (
            words_of_queries(
                self._seed, ids[rows], blocks + number, DRAWN_AT_ONCE, self._proposals.next_words
            )
            for number in range(_BLOCKS)
        )
        self._words[rows] = torch.cat(list(every), dim=1)
        self._first[rows] = 1 + DRAWN_AT_ONCE * blocks

    def _round(self, used: list[int]) -> None:
        """One pass: the points of the next queries of every image.

        Args:
            used: by image, how many queries of its random words lie behind it.
        """
        ahead = queries_at_once(self._batch.x[: max(self._active, 1)], self._accepted)
        drawn = self._words.shape[1]
        short = [row for row, number in enumerate(used) if number + ahead > drawn]
        if short:
            self._draw(indices(short, self._device))
        # The next queries [B, n] of each image, as far as their words are drawn and their squares have one side.
        count = ahead if self._tried is None else drawn
        queries = self._queries[:, None] + torch.arange(count, device=self._device)
        last = (self._first + drawn).clamp(max=self._end) - 1
        sides = self._sides[self._queries]
        places = torch.minimum(queries, last[:, None])
        valid = (queries <= last[:, None]) & (self._sides[places] == sides[:, None])
        each = torch.arange(len(queries), device=self._device)[:, None]
        words = self._words[each, places - self._first[:, None]]
        fresh = valid
        if self._tried is not None:
            fresh = self._tried.fresh(words, sides, valid)
        number = fresh.cumsum(1)
        picked = fresh & (number <= ahead)
        # All queries before the first one that is not looked at are settled, if no point is kept.
        settled = (valid & (number <= ahead)).sum(1)
        points_of, side_of = torch.stack((picked.sum(1), sides)).tolist()
        found = {side for points, side in zip(points_of, side_of, strict=True) if points}
        self._active = sum(points > 0 for points in points_of)
        if self._active == 0:
            self._queries = self._queries + settled
            return
        rows, columns = _true_places(picked, sum(points_of))
        words = words[rows, columns]
        points, values, succeeded = self._looked_at(rows, words, sides, found)
        self._take(rows, columns, points, values, succeeded, settled)
        if self._tried is not None:
            self._tried.add(rows, words, sides)

    def _looked_at(
        self, rows: Tensor, words: Tensor, sides: Tensor, found: set[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The points [R, ...] made of some images by some words, their values [R], which break an image [R].

        ``found`` are the different sides of these images' squares.
        """
        size = _pass_size(len(rows))
        filled = torch.cat((rows, rows[-1:].expand(size - len(rows))))
        words = torch.cat((words, words[-1:].expand(size - len(rows), -1)))
        some, proposals = self._batch.rows(filled), self._proposals.rows(filled)
        base, own = self._best.images[filled], sides[filled]
        if len(found) == 1:
            points = proposals.next(base, words, *found)
        else:
            points = torch.empty_like(base)
            for side in found:
                at = (own == side).nonzero().flatten()
                points[at] = proposals.rows(at).next(base[at], words[at], side)
        logits = some.logits(points)
        values, succeeded = self._objective(logits, some.y), some.succeeded(logits)
        return points, values[: len(rows)], succeeded[: len(rows)]

    def _take(
        self,
        rows: Tensor,
        columns: Tensor,
        points: Tensor,
        values: Tensor,
        succeeded: Tensor,
        settled: Tensor,
    ) -> None:
        """Keep each image's first point that raises its loss or breaks it, and count the queries up to it."""
        best, looked = self._best, len(rows)
        raised = (values > best.value[rows]) | best.value[rows].isnan()
        numbers = torch.arange(looked, device=self._device)
        kept = torch.where(raised | succeeded, numbers, looked)
        first = torch.full_like(self._queries, looked).scatter_reduce(0, rows, kept, "amin")
        changed = first < looked
        # Of an image with no kept point any point will do, as it is not taken.
        first = first.clamp(max=looked - 1)
        best.images = where_images(changed, points[first], best.images)
        best.value = torch.where(changed, values[first], best.value)
        best.succeeded = torch.where(changed, succeeded[first], best.succeeded)
        self._queries = self._queries + torch.where(changed, columns[first] + 1, settled)
        # Points after the one that was kept say nothing.
        counts = (numbers <= first[rows]) | ~changed[rows]
        counted = torch.zeros_like(self._queries).scatter_add(0, rows, counts.long())
        self._outcome = torch.stack((changed.long(), counted))
        if self._tried is not None:
            self._tried.forget(changed)


def _true_places(flags: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The rows and columns of the ``count`` true flags [B, n], in the order of `torch.nonzero`, without a wait."""
    passed = flags.flatten().cumsum(0)
    places = torch.searchsorted(passed, torch.arange(1, count + 1, device=flags.device))
    return places // flags.shape[1], places % flags.shape[1]


def _next_changes(sides: list[int]) -> list[int]:
    """By query, from 0, the first later query whose squares have another side; ``sides`` begins with query 1."""
    later = [len(sides) + 1]
    for number in range(len(sides) - 1, 0, -1):
        later.append(later[-1] if sides[number] == sides[number - 1] else number + 1)
    return [0, *reversed(later)]


def _pass_size(rows: int) -> int:
    """The next larger one of few sizes: the libraries prepare each batch size once, which takes time."""
    step = 1 << max(rows.bit_length() - 3, 0)  # a quarter of the power of two below
    return -(-rows // step) * step
