"""Auto-PGD on many images at once, with an engine whose batch is always full.

Each row of the engine's batch holds one run of one image. A row whose image is broken, or whose run is over, gets
the next run at once, whatever the steps of the other rows. So an image that breaks early costs only a few steps,
and the batch keeps its size, for which the engine has been proven.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from fastadv.attacks.apgd import APGD, checkpoints
from fastadv.attacks.apgd_runs import FinishedRun, Run
from fastadv.attacks.apgd_slots import Slots
from fastadv.attacks.leaving import batch_sizes, fine_size
from fastadv.engine.engines import Engine
from fastadv.ops import pgd_step_, random_start
from fastadv.ops.checks import over_samples
from fastadv.seeding import derive_seed

# int64 indices [B] on the CPU -> images [B, ...] and labels [B], where the model is
Take = Callable[[Tensor], tuple[Tensor, Tensor]]
NORMS = ("linf", "l2")  # in l1 Auto-PGD takes other steps
_STEPS_BETWEEN_VERIFICATIONS = 4  # so that several points are verified at once


class PointVerifier(Protocol):
    """Decides, independently of the engine, which of the points that the pool finds break their images."""

    def confirm(self, images: Sequence[int], points: Tensor) -> Sequence[bool]:
        """Return which of the points [R, ...] break their images, which are given by index."""

    def record(self, finished: Sequence[FinishedRun]) -> None:
        """Record runs that are over and have not broken their images."""


class APGDPool:
    """Runs of one APGD attack that share the engine's batches.

    An image that the verifier says is broken leaves, with all of its runs. Whether an image breaks does not depend
    on the other images or on their order. Which of its runs is the first to break it may depend on them.

    Args:
        attack: model, settings and engine.
        size: number of rows of a full batch.
        seed: seed of the random starts.
        set_aside: end a run at the first point that is misclassified by the engine but not by the verifier;
            otherwise the run goes on.
        early: ask the verifier as soon as a point is misclassified by the engine. Otherwise every run makes
            all of its steps and the verifier is never asked. An image's later runs are then left out once one has
            succeeded.
        passes: number of passes through the network for one gradient, which is their mean; more than one for a
            model that draws random numbers (EOT, expectation over transformations).
        fallback: an attack with the same settings on another engine. It is used if the attack's own engine cannot
            run the model.

    Attributes:
        steps: number of gradients of rows with a run so far.
        rows: number of gradients so far, with those of rows that only filled up a batch.
        starts_without_gradient: runs that began at a point without a gradient, a sign of masking.
        nan_points: number of points so far with a NaN among their logits; such a point is no success.
        nan_gradients: number of elements of gradients so far that were NaN or infinite.

    Raises:
        ValueError: if the attack is targeted, in train mode, or in another norm than linf and l2.
    """

    def __init__(
        self,
        attack: APGD,
        size: int,
        seed: int,
        *,
        set_aside: bool = False,
        early: bool = True,
        passes: int = 1,
        fallback: APGD | None = None,
    ) -> None:
        if attack.targeted or attack.train_mode:
            raise ValueError(
                "attack must be neither targeted nor in train mode to be run in a pool"
            )
        if attack.norm not in NORMS:
            raise ValueError(
                f"norm must be one of {', '.join(NORMS)} in a pool, got {attack.norm!r}"
            )
        self._attack, self._seed, self._fallback = attack, seed, fallback
        self._set_aside, self._early, self._passes = set_aside, early, passes
        self._points = checkpoints(attack.steps)
        free = attack.engine in ("auto", "fixed")
        live = attack.engine == "eager" or (free and attack.precision == "fp32")
        self._sizes = batch_sizes(size, live)
        self.steps = self.rows = self.starts_without_gradient = 0
        self.nan_points = self.nan_gradients = 0

    def run(
        self,
        runs: Iterable[Run],
        take: Take,
        verifier: PointVerifier,
        sample_ids: Tensor | None = None,
    ) -> None:
        """Carry out runs; they begin in the given order.

        Args:
            runs: the runs; the next is read when a row becomes free.
            take: returns images and labels by index.
            verifier: confirms the points that are found, and records the runs that are over.
            sample_ids: int64 [N] on the CPU, which random numbers each image gets; by default its index.
        """
        queue = iter(runs)
        first = list(islice(queue, self._sizes[0]))
        if not first:
            return
        _PoolRuns(self, first, queue, take, verifier, sample_ids).carry_out()

    def engine_for(self, x: Tensor) -> Engine:
        """The engine for a batch like ``x``."""
        try:
            return self._attack.engine_for(x)
        except ValueError:
            if self._fallback is None:
                raise
        return self._fallback.engine_for(x)

    def seed_of(self, number: int) -> int:
        """The seed of the random starts of an image's runs, as `APGD` chooses it."""
        return derive_seed(self._seed, "restart", number) if number else self._seed


class _PoolRuns:
    """One call of `APGDPool.run`."""

    def __init__(
        self,
        pool: APGDPool,
        first: list[Run],
        queue: Iterator[Run],
        take: Take,
        verifier: PointVerifier,
        sample_ids: Tensor | None,
    ) -> None:
        self._pool, self._attack, self._ids = pool, pool._attack, sample_ids
        self._queue, self._take, self._verifier = queue, take, verifier
        self._exhausted = len(first) < pool._sizes[0]
        self._any_size = False  # whether the engine takes batches of any size without another proof
        self._broken: set[int] = set()  # images that are broken
        size = self._size_for(len(first))
        # Rows without a run hold the first image, as the engine needs something to look at.
        x, y = take(torch.tensor([first[0].image] * size, device="cpu"))
        self._slots = Slots.of(x, y)
        self._runs: list[Run | None] = [None] * size
        # By row, on the CPU. A table of the steps with a checkpoint spares a search for every row.
        self._used = torch.zeros(size, dtype=torch.bool, device="cpu")
        self._step, self._begin, self._since = torch.zeros(
            3, size, dtype=torch.int64, device="cpu"
        ).unbind()
        self._last = self._attack.steps
        self._is_check = torch.zeros(self._last + 1, dtype=torch.bool, device="cpu")
        self._is_check[list(pool._points)] = True
        # Points with NaN logits, and elements of gradients that are not finite.
        self._nan = torch.zeros(2, dtype=torch.int64, device=x.device)
        self._load(list(range(len(first))), first)

    def carry_out(self) -> None:
        """Go on until no run is left."""
        attack = self._attack
        with attack.held(self._slots.x.device):
            while bool(self._used.any()):
                if not self._any_size:
                    engine = self._pool.engine_for(self._slots.adv)
                    self._any_size = engine.any_batch and self._slots.x.device.type == "cpu"
                    if self._any_size:
                        self._shrink()
                with engine.session(attack.model, self._pool._seed, current=True):
                    self._slots.fit(engine.images)
                    self._advance_while_full(engine)
                self._shrink()

    def _advance_while_full(self, engine: Engine) -> None:
        """Step all rows, and refill them, until the batch should become smaller."""
        tick = 0
        while self._fits():
            self._advance(engine)
            tick += 1
            look = self._pool._early and tick % _STEPS_BETWEEN_VERIFICATIONS == 0
            over = self._finished_rows()
            if look or over:
                self._verify_and_refill(look, over)

    def _advance(self, engine: Engine) -> None:
        settings, device = self._attack.settings, self._slots.x.device
        begun = self._used & (self._step == self._begin)
        at_check = self._used & ~begun & self._is_check[self._step.clamp(max=self._last)]
        # All copies to a GPU, which wait for it, before it gets the step's work.
        used, fresh, since, step = (
            one.to(device) for one in (self._used, begun, self._since, self._step)
        )
        checked = at_check.to(device) if bool(at_check.any()) else None
        early, passes = self._pool._early, self._pool._passes
        found = self._slots.advance(
            engine, settings, fresh, checked, since, step, first=early, passes=passes
        )
        if settings.loss in ("dlr", "dlr-t") and bool(begun.any()):
            zero = (found.grad.flatten(1) == 0).all(1) & fresh
            self._pool.starts_without_gradient += int(zero.sum())
        nan = found.logits.isnan().any(1) & used
        useless = ~found.grad.isfinite() & over_samples(used, found.grad)
        self._nan += torch.stack((nan.sum(), useless.sum()))
        self._pool.steps += int(self._used.sum())
        self._pool.rows += len(begun)
        self._since = self._since.masked_fill(at_check, 0) + 1
        self._step = self._step + 1

    def _finished_rows(self) -> list[int]:
        """The rows whose run is over."""
        over: list[int] = (self._used & (self._step > self._last)).nonzero().flatten().tolist()
        return over

    def _verify_and_refill(self, every_row: bool, over: list[int]) -> None:
        """Remove the runs of broken images and finished runs, and begin other runs in their rows."""
        points, elements = self._nan.tolist()
        self._pool.nan_points += points
        self._pool.nan_gradients += elements
        self._nan.zero_()
        if self._pool._early:
            self._verify(list(range(len(self._runs))) if every_row else over)
        self._report([row for row in over if self._runs[row] is not None])
        self._refill()

    def _verify(self, rows: list[int]) -> None:
        """Ask the verifier about the rows whose points are misclassified by the engine."""
        flags = self._slots.succeeded.tolist()
        rows = [row for row in rows if self._runs[row] is not None and flags[row]]
        if not rows:
            return
        index = torch.tensor(rows, device=self._slots.x.device)
        images = [self._image(row) for row in rows]
        confirmed = self._verifier.confirm(images, self._slots.kept[index])
        refused = [row for row, yes in zip(rows, confirmed, strict=True) if not yes]
        self._broken.update(i for i, yes in zip(images, confirmed, strict=True) if yes)
        for row, run in enumerate(self._runs):
            if run is not None and run.image in self._broken:
                self._set_free(row)
        refused = [row for row in refused if self._runs[row] is not None]
        if self._pool._set_aside:
            self._report(refused)
        elif refused:
            self._slots.succeeded[torch.tensor(refused, device=index.device)] = False

    def _report(self, rows: list[int]) -> None:
        """Report runs and free their rows."""
        if not rows:
            return
        slots, index = self._slots, torch.tensor(rows, device=self._slots.x.device)
        points = slots.kept[index]
        values = slots.kept_value[index].tolist()
        successes = slots.succeeded[index]
        alphas = torch.where(successes, slots.kept_alpha[index], slots.alpha[index]).tolist()
        flags, steps = successes.tolist(), slots.kept_step[index].tolist()
        made = self._step.tolist()
        ended = []
        for i, row in enumerate(rows):
            run = self._runs[row]
            assert run is not None
            step = steps[i] if flags[i] else made[row] - 1
            ended.append(FinishedRun(run, points[i].clone(), values[i], flags[i], alphas[i], step))
            self._set_free(row)
        if not self._pool._early:
            self._broken.update(one.run.image for one in ended if one.succeeded)
        self._verifier.record(ended)

    def _refill(self) -> None:
        free = [row for row, run in enumerate(self._runs) if run is None]
        if self._exhausted or not free:
            return
        runs = []
        for run in self._queue:
            if run.image not in self._broken:
                runs.append(run)
                if len(runs) == len(free):
                    break
        else:
            self._exhausted = True
        self._load(free[: len(runs)], runs)

    def _load(self, rows: list[int], runs: list[Run]) -> None:
        if not rows:
            return
        settings, device = self._attack.settings, self._slots.x.device
        x, y = self._take(torch.tensor([run.image for run in runs], device="cpu"))
        target = torch.tensor([run.target for run in runs], device=device)
        alpha = [2 * settings.eps if run.alpha is None else run.alpha for run in runs]
        start = x.clone()
        for i, run in enumerate(runs):
            if run.point is not None:
                start[i] = run.point
            self._runs[rows[i]] = run
        start = pgd_step_(start, x, x, settings.eps, 0.0, settings.norm, settings.bounds)
        for number in dict.fromkeys(run.number for run in runs if run.point is None):
            some = [i for i, run in enumerate(runs) if run.number == number and run.point is None]
            ids = torch.tensor([runs[i].image for i in some], device="cpu")
            start[some] = random_start(
                x[some],
                settings.eps,
                settings.norm,
                settings.bounds,
                self._pool.seed_of(number),
                sample_ids=(ids if self._ids is None else self._ids[ids]).to(device),
            )
        index, made = (
            torch.tensor(rows, device="cpu"),
            torch.tensor([run.step for run in runs], device="cpu"),
        )
        self._used[index] = True
        self._since = self._since.index_fill(0, index, 0)
        self._step = self._step.index_copy(0, index, made)
        self._begin[index] = made
        alphas = torch.tensor(alpha, dtype=x.dtype, device=device)
        self._slots.load(index.to(device), x, y, target, start, alphas)

    def _set_free(self, row: int) -> None:
        """Mark a row as free."""
        self._runs[row] = None
        self._used[row] = False

    def _image(self, row: int) -> int:
        run = self._runs[row]
        assert run is not None
        return run.image

    def _fits(self) -> bool:
        """Whether the batch has the size that its runs need."""
        used = int(self._used.sum())
        return used > 0 and (not self._exhausted or self._size_for(used) == len(self._runs))

    def _shrink(self) -> None:
        """Remove rows without a run, as far as the allowed sizes permit."""
        used = [row for row, run in enumerate(self._runs) if run is not None]
        free = [row for row, run in enumerate(self._runs) if run is None]
        rows = (used + free)[: self._size_for(len(used))]
        index = torch.tensor(rows, device="cpu")
        self._slots = self._slots.rows(index.to(self._slots.x.device))
        self._runs = [self._runs[row] for row in rows]
        self._used, self._step = self._used[index], self._step[index]
        self._begin, self._since = self._begin[index], self._since[index]

    def _size_for(self, runs: int) -> int:
        """The smallest allowed size that holds a number of runs."""
        sizes = self._pool._sizes
        return min(
            fine_size(runs) if self._any_size and runs else sizes[0],
            *(size for size in sizes if size >= runs),
        )
