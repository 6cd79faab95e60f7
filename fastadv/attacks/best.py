"""Keeping the worst case for each sample, the best image of a search, without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch
from torch import Tensor

from fastadv.attacks.batch import AttackBatch
from fastadv.ops.checks import over_samples
from fastadv.seeding import derive_seed


class Best:
    """For every sample the image of highest value among those offered.

    Args:
        prefer_success: rank an image that reached its aim above any that did not, whatever their values.

    Attributes:
        images: [B, ...] float; valid after the first offer, as are the others.
        value: [B].
        succeeded: [B] bool.
    """

    images: Tensor
    value: Tensor
    succeeded: Tensor

    def __init__(self, prefer_success: bool = True) -> None:
        self._prefer_success = prefer_success
        self._empty = True

    def offer(self, adv: Tensor, value: Tensor, succeeded: Tensor) -> None:
        """Keep the images that are better than the best known ones.

        Args:
            adv: candidates [B, ...]; copied, so that they may be written to afterwards.
            value: [B], to be high.
            succeeded: [B] bool.
        """
        if self._empty:
            self.images, self.value, self.succeeded = adv.clone(), value, succeeded
            self._empty = False
            return
        better = (value > self.value) | self.value.isnan()
        if self._prefer_success:
            better = torch.where(succeeded == self.succeeded, better, succeeded)
        self.images = where_images(better, adv, self.images)
        self.value = torch.where(better, value, self.value)
        self.succeeded = torch.where(better, succeeded, self.succeeded)

    def rows(self, rows: Tensor) -> Best:
        """Some of the samples, by int64 indices."""
        some = Best(self._prefer_success)
        some.offer(self.images[rows], self.value[rows], self.succeeded[rows])
        return some

    def merge(self, other: Best, rows: Tensor | None = None) -> None:
        """Offer the images that another search has found.

        Args:
            other: its images, values and successes, for all samples or some.
            rows: int64 indices of these samples; None for all.
        """
        if rows is None:
            self.offer(other.images, other.value, other.succeeded)
            return
        some = self.rows(rows)
        some.offer(other.images, other.value, other.succeeded)
        self.images = self.images.index_copy(0, rows, some.images)
        self.value = self.value.index_copy(0, rows, some.value)
        self.succeeded = self.succeeded.index_copy(0, rows, some.succeeded)


# A search on a batch, towards wrong classes [B] or no class in particular, with a seed.
Run: TypeAlias = Callable[[AttackBatch, Tensor | None, int], Best]


def best_of_runs(
    run: Run, batch: AttackBatch, targets: Iterable[Tensor | None], seed: int, *, whole: bool
) -> Tensor:
    """The best images of several runs with random numbers of their own, [B, ...].

    Args:
        run: the search.
        batch: the images under attack; the first run of each target begins at its given start.
        targets: for each run, of which there is at least one, the wrong classes [B] it aims at, or None.
        seed: seed of the first run; the seeds of the other runs are derived from it.
        whole: run on all samples each time, for samples that depend on one another. Otherwise each run attacks
            only the samples for which the runs before it have failed.
    """
    best = Best()
    before: Tensor | None = None
    given, own = batch, batch.with_own_start()
    for number, target in enumerate(targets):
        run_seed = derive_seed(seed, "restart", number) if number else seed
        batch = given if number == 0 or target is not before else own
        before = target
        if number == 0 or whole:
            best.merge(run(batch, target, run_seed))
            continue
        rows = (~best.succeeded).nonzero().flatten()
        if rows.numel() == 0:
            break
        aim = None if target is None else target[rows]
        best.merge(run(batch.rows(rows), aim, run_seed), rows)
    return best.images


def where_images(flags: Tensor, images: Tensor, others: Tensor) -> Tensor:
    """Choose ``images`` [B, ...] where the flags [B] are true, else ``others``."""
    return torch.where(over_samples(flags, images), images, others)
