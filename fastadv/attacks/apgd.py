"""Auto-PGD (Croce and Hein 2020): PGD that chooses its own step size, sample by sample.

Source: F. Croce and M. Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", ICML 2020, algorithm 1 and section 3; the targeted losses are from section 4.2. The
attack in l1 is a different algorithm, in `fastadv.attacks.apgd_l1`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastadv.attacks.apgd_advance import MOMENTUM
from fastadv.attacks.apgd_l1 import run_l1
from fastadv.attacks.arguments import Precision, TrainMode
from fastadv.attacks.attack import Attack, AttackSettings
from fastadv.attacks.batch import AttackBatch, ValueOf
from fastadv.attacks.best import Best, best_of_runs, where_images
from fastadv.attacks.objectives import (
    Objective,
    likeliest_wrong_classes,
    targeted_value,
)
from fastadv.attacks.options import Setting
from fastadv.engine.engines import Model
from fastadv.ops.values import integer

Loss = Literal["ce", "dlr", "cw", "ce-t", "dlr-t"]


@dataclass(frozen=True)
class APGDSettings(AttackSettings):
    """The settings of an APGD attack, checked on creation. Fields as in `APGD`."""

    steps: int = 100
    restarts: int = 1
    loss: Loss = "ce"
    target_classes: int = 9
    rho: float = 0.75

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            TypeError: a field of another type.
            ValueError: a value out of range or an unknown word.
        """
        super().__post_init__()
        for name in ("steps", "restarts", "target_classes"):
            integer(name, getattr(self, name), at_least=1)
        if self.targeted and self.aims_at_wrong_classes:
            raise ValueError(
                f"loss {self.loss!r} chooses its own targets; targeted must be False with it"
            )
        if not 0 <= self.rho <= 1:
            raise ValueError(f"rho must be in 0 .. 1, got {self.rho}")

    @property
    def aims_at_wrong_classes(self) -> bool:
        """Whether there is one run per wrong class."""
        return self.loss in ("ce-t", "dlr-t")


class APGD(Attack):
    """Auto-PGD: steps with momentum, whose size is halved, per sample, where the loss no longer rises.

    It starts from a random point of the ball with steps of 2 eps. At checkpoints, ever closer to one another,
    a sample's step is halved and the search goes back to its best point if the loss has risen in fewer than
    ``rho`` of the steps since the last checkpoint, or if neither step size nor best loss have changed since
    then. All of this stays on the device. For each sample the best point is returned. It has the highest loss
    among the successful points, or among all points if no point succeeds.

    In l1 a step moves the elements of largest gradient, fewer the sparser the best point is, and the projection
    keeps the bounds exactly. A run goes through balls of 3, 2 and 1 times eps; there is no momentum, and ``rho``
    is not used. Source: Croce and Hein, "Mind the box: l1-APGD for sparse adversarial attacks on image
    classifiers", ICML 2021.

    A later run attacks only the samples that withstood the earlier runs. In train mode it attacks all samples,
    because they depend on one another.

    Args:
        model: as in `fastadv.PGD`.
        eps: radius of the ball, in the units of the images.
        steps: number of steps of a run, at least 1; one run costs steps + 1 forward passes, in l1 up to
            steps + 3.
        restarts: runs from different random starts, for each target class if the loss has target classes.
        loss: ``"ce"``, ``"dlr"`` (at least 3 classes) or ``"cw"`` of the labels, or, one run for each of the
            likeliest wrong classes, ``"ce-t"`` or ``"dlr-t"`` (at least 4 classes).
        target_classes: number of wrong classes that ``"ce-t"`` and ``"dlr-t"`` try.
        rho: fraction of steps that must raise the loss; see above.
        norm: as in `fastadv.PGD`.
        bounds: as in `fastadv.PGD`.
        targeted: as in `fastadv.PGD`; not with "-t" losses.
        precision: as in `fastadv.PGD`.
        engine: as in `fastadv.PGD`, without ``"graph"``.
        train_mode: as in `fastadv.PGD`.
        seed: as in `fastadv.PGD`.
        check_inputs: as in `fastadv.PGD`.

    Raises:
        TypeError: as in `fastadv.PGD`.
        ValueError: as in `fastadv.PGD`.
    """

    settings: APGDSettings
    steps = Setting[int]()
    restarts = Setting[int]()
    loss = Setting[Loss]()
    target_classes = Setting[int]()
    rho = Setting[float]()

    def __init__(
        self,
        model: Model,
        eps: float = 8 / 255,
        steps: int = 100,
        restarts: int = 1,
        *,
        loss: Loss = "ce",
        target_classes: int = 9,
        rho: float = 0.75,
        norm: str = "linf",
        bounds: tuple[float, float] = (0.0, 1.0),
        targeted: bool = False,
        precision: Precision = "auto",
        engine: Literal["auto", "fixed", "eager", "compiled"] = "auto",
        train_mode: TrainMode = False,
        seed: int | None = None,
        check_inputs: bool = True,
    ) -> None:
        chosen = APGDSettings(
            eps,
            steps,
            restarts,
            loss,
            target_classes,
            rho,
            norm=norm,
            bounds=bounds,
            targeted=targeted,
            precision=precision,
            engine=engine,
            train_mode=train_mode,
        )
        super().__init__(model, chosen, seed, check_inputs)

    def _perturb(self, batch: AttackBatch, seed: int) -> Tensor:
        return best_of_runs(
            self._run, batch, self._targets(batch), seed, whole=bool(self.settings.train_mode)
        )

    def _soft_labels_obstacle(self) -> str | None:
        loss = self.settings.loss
        return None if loss == "ce" else f"with loss {loss!r}"

    def _targets(self, batch: AttackBatch) -> Iterator[Tensor | None]:
        """For each run the wrong classes [B] it aims at, or None."""
        settings = self.settings
        targets: tuple[Tensor | None, ...] = (None,)
        if settings.aims_at_wrong_classes:
            logits = batch.logits(batch.x)
            targets = likeliest_wrong_classes(logits, batch.y, settings.target_classes).unbind(1)
        for target in targets:
            for _ in range(settings.restarts):
                yield target

    def _value_of(self, batch: AttackBatch, target: Tensor | None) -> ValueOf:
        settings = self.settings
        if target is not None:
            return lambda logits: targeted_value(settings.loss, logits, batch.y, target)
        objective = Objective(settings.loss, settings.targeted)
        return lambda logits: objective(logits, batch.y)

    def _run(self, batch: AttackBatch, target: Tensor | None, seed: int) -> Best:
        """Algorithm 1 from one start."""
        settings, value_of = self.settings, self._value_of(batch, target)
        if settings.norm == "l1":
            return run_l1(batch, value_of, settings.steps, seed)
        points, best = checkpoints(settings.steps), Best()
        adv = batch.start(seed)
        found = batch.gradient(adv, value_of)
        best.offer(adv, found.value, batch.succeeded(found.logits))
        schedule = StepSizes(adv, found.value, found.grad, batch.eps, settings.rho)
        before = adv
        for step in range(1, settings.steps + 1):
            moved = _moved(batch, schedule, adv, before, 1.0 if step == 1 else MOMENTUM)
            adv, before = moved, adv
            if step == settings.steps:
                logits = batch.logits(adv)
                best.offer(adv, value_of(logits), batch.succeeded(logits))
                break
            found = batch.gradient(adv, value_of)
            best.offer(adv, found.value, batch.succeeded(found.logits))
            schedule.note(adv, found.value, found.grad)
            if step in points:
                adv = schedule.check(adv, step - points[step])
        return best


class StepSizes:
    """Step sizes, and the best points to go back to, of all samples; nothing here waits for the device.

    Attributes:
        alpha: step sizes [B].
        grad: the gradient at the point from which the search goes on, [B, ...].
    """

    def __init__(
        self, adv: Tensor, value: Tensor, grad: Tensor, eps: float | Tensor, rho: float
    ) -> None:
        self.alpha = torch.zeros_like(value, dtype=adv.dtype) + 2 * eps
        self.grad = grad.clone()  # an engine's gradient is valid until its next call only
        self._rho = rho
        self._value = self._best_value = self._best_value_then = value
        self._best, self._best_grad = adv, self.grad
        self._rises = torch.zeros_like(value, dtype=torch.int64)
        # All true, so that the first check cannot halve because of an unchanged step size.
        self._halved = torch.ones_like(value, dtype=torch.bool)

    def note(self, adv: Tensor, value: Tensor, grad: Tensor) -> None:
        """Record the next point [B, ...] with its value [B] and its gradient [B, ...]."""
        self._rises += value > self._value
        self.grad, self._value = grad, value
        better = value > self._best_value
        self._best = where_images(better, adv, self._best)
        self._best_grad = where_images(better, self.grad, self._best_grad)
        self._best_value = torch.where(better, value, self._best_value)

    def check(self, adv: Tensor, steps: int) -> Tensor:
        """Halve step sizes at a checkpoint.

        Args:
            adv: the current points [B, ...].
            steps: number of steps since the last checkpoint.

        Returns:
            The points from which to go on: the best known points for samples whose step size was halved.
        """
        too_few = self._rises < self._rho * steps
        stuck = ~self._halved & (self._best_value <= self._best_value_then)
        self._halved = too_few | stuck
        self.alpha = torch.where(self._halved, self.alpha / 2, self.alpha)
        self.grad = where_images(self._halved, self._best_grad, self.grad)
        # The next step is compared with the best point, as if a step had led there.
        self._value = torch.where(self._halved, self._best_value, self._value)
        self._best_value_then = self._best_value
        self._rises = torch.zeros_like(self._rises)
        return where_images(self._halved, self._best, adv)


def checkpoints(steps: int) -> dict[int, int]:
    """The steps after which step sizes are checked, each with the one before it (Croce and Hein, section 3.2).

    The first comes after 22 % of the steps, and each interval is shorter than the last by 3 %, down to 6 %.
    """
    interval, least, shorter = (max(int(part * steps), 1) for part in (0.22, 0.06, 0.03))
    points, last = {}, 0
    while last + interval <= steps:
        points[last + interval] = last
        last += interval
        interval = max(interval - shorter, least)
    return points


def _moved(
    batch: AttackBatch, schedule: StepSizes, adv: Tensor, before: Tensor, share: float
) -> Tensor:
    """The next point: a share of a gradient step, the rest along the last movement (algorithm 1, line 7)."""
    stepped = batch.step_(adv.clone(), schedule.grad, schedule.alpha)
    if share == 1:
        return stepped
    moved = adv + share * (stepped - adv) + (1 - share) * (adv - before)
    return batch.project_(moved)
