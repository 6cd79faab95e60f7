"""Square with several queries of an image in one pass of the network, for the few images that are left.

A pass for few images costs nearly as much as one for more. Most points that Square tries late in a search change
nothing. So the points of the next queries are made from the present image and tried together. The first of them
that raises the loss is kept; the later ones were made from an image that is no longer the present one, and their
queries are made again. So each query sees the same point as in a search that takes one after the other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastadv.attacks.batch import AttackBatch
from fastadv.attacks.best import Best, where_images
from fastadv.attacks.objectives import Objective
from fastadv.attacks.square_proposals import proposals_for
from fastadv.ops.philox import WORDS, philox

DRAWN_AT_ONCE = 64  # queries, because random words cost many small operations
_BLOCKS = 4  # of so many queries, drawn at once for every image
_MOST = 64  # queries in a pass
_USEFUL = 0.6  # the least part of the points in a pass that are expected to count
_MEMORY = 0.995  # for each query, of the estimated share of queries that change an image
_ROUNDS_BETWEEN_CHOICES = 32
_IMAGE = 3 * 32 * 32
# What a pass costs beside its images, in numbers of images: on one thread of a CPU with AMX a pass of ResNet-18
# costs as much as 2 to 3 images more than it has; on several threads, and with smaller networks, it is more.
_FIXED = {"cpu": 4 * _IMAGE}
_FIXED_ELSEWHERE = 512 * _IMAGE
# How many numbers the images of a pass may have, beyond which more of them do not come cheaper.
_LARGEST = {"cpu": 64 * _IMAGE}
_LARGEST_ELSEWHERE = 512 * _IMAGE


def words_of_queries(
    seed: int, sample_ids: Tensor, blocks: Tensor | int, queries: int, words: int
) -> Tensor:
    """Random words for the queries of one block of `DRAWN_AT_ONCE`, [B, queries, words] int64.

    Args:
        seed: of the search.
        sample_ids: [B].
        blocks: number of the block, for all images or [B].
        queries: how many, from the block's first.
        words: how many each takes.
    """
    drawn = philox(seed, sample_ids, -(-queries * words // WORDS), 1 + blocks)
    return drawn[:, : queries * words].view(-1, queries, words)


class AcceptedShare:
    """An estimate of how many queries change their image, from the queries seen last."""

    def __init__(self) -> None:
        self.value = 1.0

    def see(self, accepted: int, queries: int) -> None:
        """Take note of queries, of which so many changed an image."""
        if queries:
            kept = _MEMORY**queries
            self.value = kept * self.value + (1 - kept) * accepted / queries

    def expected(self, ahead: int) -> float:
        """How many of so many points of an image are expected to count: those up to the first that is kept."""
        if self.value <= 0:
            return float(ahead)
        return (1 - (1 - self.value) ** ahead) / self.value


def queries_at_once(x: Tensor, share: AcceptedShare) -> int:
    """How many queries of an image make the most of a pass for images ``x``: a power of two."""
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
        batch: these images.
        best: how far they have come; no image is broken.
        objective: the value to be raised.
        share_at: the share of an image that a query's square covers.
        seed: of the search.
        query: the number of the next query, from 1.
        end: the number after the last one.
        accepted: the estimated share of queries that change an image.
    """

    _words: Tensor  # [B, queries, words], from the first query of a block
    _first: list[int]  # number of this block, by image

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
        self._share_at, self._seed, self._end = share_at, seed, end
        self._queries = [query] * len(batch.x)
        self._accepted = accepted
        self._ahead = queries_at_once(batch.x, accepted)
        self._arrange()
        self._draw()

    def carry_out(self, result: Best, rows: Tensor) -> None:
        """Search until every image is broken or has used its queries.

        Args:
            result: of the whole batch; gets the finds.
            rows: which of its samples these images are, int64.
        """
        rounds = 0
        while True:
            going = [
                row
                for row, (query, broken) in enumerate(
                    zip(self._queries, self._best.succeeded.tolist(), strict=True)
                )
                if query < self._end and not broken
            ]
            if len(going) < len(rows):
                result.merge(self._best, rows)
                if not going:
                    return
                index = torch.tensor(going, device=rows.device)
                rows = rows[index]
                self._keep(index, going)
            elif rounds % _ROUNDS_BETWEEN_CHOICES == 0:
                self._choose()
            self._round()
            rounds += 1

    def _keep(self, index: Tensor, rows: list[int]) -> None:
        self._best, self._batch = self._best.rows(index), self._batch.rows(index)
        self._queries = [self._queries[row] for row in rows]
        self._words, self._first = self._words[index], [self._first[row] for row in rows]
        self._choose(anew=True)

    def _choose(self, anew: bool = False) -> None:
        ahead = queries_at_once(self._batch.x, self._accepted)
        if anew or ahead != self._ahead:
            self._ahead = ahead
            self._arrange()

    def _arrange(self) -> None:
        """Repeat every image for its queries in a pass."""
        each = torch.arange(len(self._batch.x), device=self._batch.x.device)
        self._repeated = self._batch.rows(each.repeat_interleave(self._ahead))
        self._proposals = proposals_for(self._repeated)

    def _draw(self) -> None:
        """Random words of the next queries of each image, from the block of `DRAWN_AT_ONCE` that it is in."""
        ids = self._batch.sample_ids
        assert ids is not None
        first = [(query - 1) // DRAWN_AT_ONCE for query in self._queries]
        blocks = torch.tensor(first, device=ids.device)
        every = (
            words_of_queries(
                self._seed, ids, blocks + number, DRAWN_AT_ONCE, self._proposals.next_words
            )
            for number in range(_BLOCKS)
        )
        self._words, self._first = torch.cat(list(every), dim=1), first

    def _places(self) -> list[int]:
        """Where the words of each image's next query lie among those that were drawn."""
        return [
            query - 1 - DRAWN_AT_ONCE * first
            for query, first in zip(self._queries, self._first, strict=True)
        ]

    def _round(self) -> None:
        """One pass: the points of the next queries of every image."""
        ahead, images = self._ahead, len(self._queries)
        places = self._places()
        if max(places) + ahead > self._words.shape[1]:
            self._draw()
            places = self._places()
        device = self._batch.x.device
        index = torch.tensor(places, device=device)[:, None] + torch.arange(ahead, device=device)
        words = self._words[torch.arange(images, device=device)[:, None], index].flatten(0, 1)
        points = self._points(words)
        logits = self._repeated.logits(points)
        values = self._objective(logits, self._repeated.y).view(images, ahead)
        succeeded = self._repeated.succeeded(logits).view(images, ahead)
        left = [self._end - query for query in self._queries]
        allowed = torch.arange(ahead, device=device) < torch.tensor(left, device=device)[:, None]
        self._take(points, values, succeeded, allowed, left)

    def _points(self, words: Tensor) -> Tensor:
        """The point of each query, made from its image as it is now."""
        base = self._best.images.repeat_interleave(self._ahead, dim=0)
        last = self._end - 1
        # Squares only become smaller.
        largest = self._share_at(min(self._queries) - 1)
        smallest = self._share_at(min(max(self._queries) + self._ahead - 1, last) - 1)
        if largest == smallest:
            return self._proposals.next(base, words, largest)
        shares = [
            self._share_at(min(query + number, last) - 1)
            for query in self._queries
            for number in range(self._ahead)
        ]
        points = torch.empty_like(base)
        for share in dict.fromkeys(shares):
            some = [row for row, own in enumerate(shares) if own == share]
            rows = torch.tensor(some, device=base.device)
            part = proposals_for(self._repeated.rows(rows))
            points[rows] = part.next(base[rows], words[rows], share)
        return points

    def _take(
        self, points: Tensor, values: Tensor, succeeded: Tensor, allowed: Tensor, left: list[int]
    ) -> None:
        """Keep each image's first point that raises its loss or breaks it, and count the queries up to it."""
        best, ahead = self._best, self._ahead
        raised = (values > best.value[:, None]) | best.value.isnan()[:, None]
        accepted = (raised | succeeded) & allowed
        changed = accepted.any(1)
        first = accepted.int().argmax(1)
        each = torch.arange(len(first), device=first.device)
        chosen = points[each * ahead + first]
        best.images = where_images(changed, chosen, best.images)
        best.value = torch.where(changed, values[each, first], best.value)
        best.succeeded = changed & succeeded[each, first]
        used = torch.where(changed, first + 1, ahead).tolist()
        used = [min(one, limit) for one, limit in zip(used, left, strict=True)]
        self._queries = [query + one for query, one in zip(self._queries, used, strict=True)]
        self._accepted.see(int(changed.sum()), sum(used))
