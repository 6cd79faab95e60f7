"""Auto-PGD as a part of AutoAttack: runs in a pool on the engine, confirmed by the plain model in float32."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fastadv.attacks.apgd import APGD, Loss
from fastadv.attacks.apgd_pool import APGDPool
from fastadv.attacks.apgd_runs import FinishedRun, Run
from fastadv.attacks.attack_warnings import nan_warnings
from fastadv.attacks.objectives import likeliest_wrong_classes
from fastadv.evaluation.autoattack_run import (
    APGD_STEPS,
    TARGET_CLASSES,
    AutoAttackRun,
    FinishedImages,
)
from fastadv.evaluation.autoattack_state import BatchRecord
from fastadv.evaluation.verify import logits_of
from fastadv.seeding import derive_seed

LOSSES: dict[str, Loss] = {"apgd-ce": "ce", "apgd-dlr": "dlr", "apgd-t": "dlr-t"}


class PoolSearch:
    """One Auto-PGD attack on the images that are left.

    A point that breaks its image on the engine and on the plain model in float32 ends the image's search. From a
    point that breaks it on the engine alone, the search continues on the plain model. An image that an engine in a
    narrower precision does not break is tried in float32 for a few more steps, from the best points of its best
    runs.

    Args:
        run: the run of AutoAttack.
        attack: a key of `LOSSES`.
    """

    def __init__(self, run: AutoAttackRun, attack: str) -> None:
        self._run, self._attack = run, attack
        self._seed = derive_seed(run.runner.seed, f"autoattack/{attack}")
        self._targeted = LOSSES[attack] == "dlr-t"
        self._finished = FinishedImages()
        self._broken: set[int] = set()
        self._left: dict[int, int] = {}  # image -> number of runs that have not ended
        # For each image the runs that are to be continued in float32.
        self._to_refine: dict[int, list[FinishedRun]] = {}
        self._waiting: list[int] = []  # images whose runs have ended, which wait for float32
        self._records: list[BatchRecord] = []
        self._refining = False
        self._advance: Callable[[int], object] = lambda images: None
        self._pool = self._pool_of(run.narrow, set_aside=run.is_narrow)
        self._reset_counts()

    @property
    def by(self) -> str:
        """The precision of the search, as in `AutoAttackRun.search`."""
        return self._run.search

    def run(self, remaining: Tensor) -> list[BatchRecord]:
        """Attack images.

        Args:
            remaining: indices of the images, int64 [R] on the CPU.

        Returns:
            The records of all batches, including the records of the state.
        """
        run, state = self._run, self._run.state
        self._records = state.load_all(self._attack, remaining) if state else []
        done = {i for record in self._records for i in record.indices.tolist()}
        todo = torch.tensor(
            [i for i in remaining.tolist() if i not in done], dtype=torch.int64, device="cpu"
        )
        progress = run.runner.progress.count(f"autoattack {self._attack}", len(remaining))
        with progress as self._advance:
            self._advance(len(done))
            self._pool.run(self._runs(todo), self._take, self, run.sample_ids)
            self._refine()
            self._save()
        return self._records

    def confirm(self, images: Sequence[int], points: Tensor) -> Sequence[bool]:
        """Return which points the plain model misclassifies."""
        adv, wrong = self._run.judged(torch.tensor(images, device="cpu"), points, self._audit)
        confirmed = wrong.tolist()
        for image, one, yes in zip(images, adv, confirmed, strict=True):
            if yes and image not in self._broken:
                self._broken.add(image)
                self._finished.broken[image] = one.clone()
                self._refined += self._refining
                if not self._refining:
                    self._finish([image])
        self._unconfirmed += confirmed.count(False)
        return confirmed

    def record(self, finished: Sequence[FinishedRun]) -> None:
        """Record runs that have ended without success. An image without further runs waits for float32."""
        if self._refining:
            return
        for one in finished:
            image = one.run.image
            if image in self._broken:
                continue
            if self._run.is_narrow:
                self._to_refine[image] = self._worth_refining(
                    [*self._to_refine.get(image, []), one]
                )
            self._left[image] -= 1
            if self._left[image] == 0:
                del self._left[image]
                if self._to_refine.get(image):
                    self._waiting.append(image)
                else:
                    self._finish([image])
        if len(self._waiting) >= self._run.runner.batch_size:
            self._refine()

    def _pool_of(self, attack: APGD, set_aside: bool, fallback: APGD | None = None) -> APGDPool:
        for one in (attack, fallback):
            if one is not None:
                one.loss = LOSSES[self._attack]
        size, passes = self._run.rows, self._run.passes
        return APGDPool(
            attack, size, self._seed, set_aside=set_aside, passes=passes, fallback=fallback
        )

    def _runs(self, todo: Tensor) -> Iterator[Run]:
        """All runs, by batches of images; within a batch the likeliest wrong classes come first."""
        for indices in self._run.runner.samples.batches(self._run.runner.batch_size, todo):
            images = indices.tolist()
            if not self._targeted:
                self._left.update(dict.fromkeys(images, 1))
                yield from (Run(image) for image in images)
                continue
            x, y = self._take(indices)
            logits = logits_of(self._run.runner.model, x)
            classes = likeliest_wrong_classes(logits, y, TARGET_CLASSES).cpu()
            self._left.update(dict.fromkeys(images, classes.shape[1]))
            for number, targets in enumerate(classes.T.tolist()):
                for image, target in zip(images, targets, strict=True):
                    yield Run(image, number, target)

    def _take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self._run.runner.samples.take(indices, self._run.runner.device)

    def _worth_refining(self, runs: list[FinishedRun]) -> list[FinishedRun]:
        """The runs whose points only the engine misclassifies, and the best of the other runs."""
        claims = [one for one in runs if one.succeeded]
        others = sorted((one for one in runs if not one.succeeded), key=lambda one: -one.value)
        return claims + others[: self._run.refined_runs]

    def _refine(self) -> None:
        """Continue the waiting images in float32, and settle them."""
        images, self._waiting = self._waiting, []
        if not images:
            return
        begun = time.perf_counter()
        latest = APGD_STEPS - self._run.refinement.steps
        runs = []
        for image in images:
            for one in self._to_refine.pop(image):
                step = min(one.step, latest)
                runs.append(Run(image, one.run.number, one.run.target, one.point, one.alpha, step))
        self._refining = True
        try:
            exact, wide = self._run.exact, self._run.wide
            if exact is None:
                pool = self._pool_of(wide, set_aside=False)
            else:
                pool = self._pool_of(exact, set_aside=False, fallback=wide)
            pool.run(runs, self._take, self)
            self._nan_refined += pool.nan_points
            self._useless_refined += pool.nan_gradients
        finally:
            self._refining = False
        self._refinement += time.perf_counter() - begun
        self._finish(images)

    def _finish(self, images: Sequence[int]) -> None:
        """Mark these images as finished."""
        for image in images:
            self._left.pop(image, None)
            self._to_refine.pop(image, None)
        self._finished.indices += images
        self._advance(len(images))
        if len(self._finished.indices) >= self._run.runner.batch_size:
            self._save()

    def _save(self) -> None:
        """Make a record of the finished images."""
        if not self._finished.indices:
            return
        blind = self._pool.starts_without_gradient - self._starts_then
        warnings = []
        if blind:
            warnings.append(
                f"{blind} runs of {self._attack} began at a point with zero gradient; "
                "attacks that follow gradients may find too little"
            )
        nan = self._pool.nan_points - self._nan_then + self._nan_refined
        useless = self._pool.nan_gradients - self._useless_then + self._useless_refined
        warnings += nan_warnings(nan, useless)
        record = self._finished.record(
            self._run.runner.samples.image_shape,
            violations=self._audit.found.as_dict(),
            warnings=warnings,
            seconds=time.perf_counter() - self._since,
            refined=self._refined,
            unconfirmed=self._unconfirmed,
            refinement_seconds=self._refinement,
        )
        if self._run.state:
            self._run.state.save(self._attack, len(self._records), record)
        self._records.append(record)
        self._reset_counts()

    def _reset_counts(self) -> None:
        self._audit, self._since = self._run.audit(), time.perf_counter()
        self._refined = self._unconfirmed = 0
        self._refinement = 0.0
        self._starts_then = self._pool.starts_without_gradient
        self._nan_then, self._useless_then = self._pool.nan_points, self._pool.nan_gradients
        self._nan_refined = self._useless_refined = 0  # in float32
