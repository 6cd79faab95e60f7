"""The state of many runs of Auto-PGD, each at a step of its own, as the rows of one batch.

Source: F. Croce and M. Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", ICML 2020, algorithm 1. `fastadv.attacks.apgd` runs all rows of a batch at the same step.
Here each row is at a step of its own, so the work of a step is chosen row by row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fastadv.attacks.apgd import APGDSettings
from fastadv.attacks.apgd_advance import RowFlags, SlotImages, advance
from fastadv.attacks.averaging import mean_gradient
from fastadv.attacks.objectives import Objective, targeted_value
from fastadv.engine.engines import Engine, InputGradient

_NUMBERS = ("alpha", "value", "best_value", "value_then", "kept_value", "kept_alpha")


@dataclass
class Slots:
    """One row for each run. S is the number of rows.

    Attributes:
        x: the clean images [S, ...].
        y: their labels [S] int64.
        target: the wrong classes at which the loss aims, [S] int64; unused if the loss aims at no class.
        adv: the current points [S, ...].
        before: the points from which the current points were reached, [S, ...].
        best: the points of highest value, to which a run goes back, [S, ...].
        best_grad: the gradients at ``best``, [S, ...].
        kept: the worst case so far, [S, ...]: the misclassified point of highest value, else the point of highest
            value.
        alpha: step sizes [S].
        value: values of the last points [S].
        best_value: values of ``best`` [S].
        value_then: ``best_value`` at the last checkpoint [S].
        kept_value: values of ``kept`` [S].
        kept_alpha: step sizes at ``kept`` [S].
        kept_step: number of steps that led to ``kept``, [S] int64.
        rises: number of steps since the last checkpoint that raised the value, [S] int64.
        halved: whether the last checkpoint halved the step size, [S] bool.
        succeeded: whether ``kept`` is misclassified, [S] bool.
    """

    x: Tensor
    y: Tensor
    target: Tensor
    adv: Tensor
    before: Tensor
    best: Tensor
    best_grad: Tensor
    kept: Tensor
    alpha: Tensor
    value: Tensor
    best_value: Tensor
    value_then: Tensor
    kept_value: Tensor
    kept_alpha: Tensor
    kept_step: Tensor
    rises: Tensor
    halved: Tensor
    succeeded: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Slots:
        """Return rows without a run.

        Args:
            x: any images [S, ...] that the model takes.
            y: any labels [S].
        """
        images = {name: x.clone() for name in ("x", "adv", "before", "best", "best_grad", "kept")}
        zeros = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        numbers = {name: zeros.clone() for name in _NUMBERS}
        flags = {name: torch.zeros_like(y, dtype=torch.bool) for name in ("halved", "succeeded")}
        labels = {name: y.clone() for name in ("y", "target", "rises", "kept_step")}
        return cls(**images, **numbers, **flags, **labels)

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.y)

    def rows(self, rows: Tensor) -> Slots:
        """Copies of some of the rows, by int64 indices."""
        return Slots(*(getattr(self, one.name)[rows] for one in fields(self)))

    def fit(self, images: Callable[[Tensor], Tensor]) -> None:
        """Convert all images by an engine's function ``images``, which gives them its dtype and layout."""
        for name in ("x", "adv", "before", "best", "kept"):
            setattr(self, name, images(getattr(self, name)))

    def load(
        self, rows: Tensor, x: Tensor, y: Tensor, target: Tensor, start: Tensor, alpha: Tensor
    ) -> None:
        """Begin runs in some of the rows.

        Args:
            rows: int64 indices [R].
            x: clean images [R, ...].
            y: labels [R].
            target: wrong classes [R].
            start: first points [R, ...], in ball and bounds.
            alpha: first step sizes [R].
        """
        new = {"x": x, "y": y, "target": target, "adv": start, "before": start, "alpha": alpha}
        for name, values in new.items():
            kept = getattr(self, name)
            kept[rows] = values.to(kept.dtype)
        self.succeeded[rows] = False

    def advance(
        self,
        engine: Engine,
        settings: APGDSettings,
        fresh: Tensor,
        checked: Tensor | None,
        since: Tensor,
        step: Tensor,
        *,
        first: bool,
        passes: int = 1,
    ) -> InputGradient:
        """Compute the values and gradients of all rows, and make one step in every row.

        Args:
            engine: the engine, within its session.
            settings: the settings of the attack.
            fresh: the rows whose run begins, [S] bool.
            checked: the rows that are at a checkpoint, [S] bool; None if there is no such row.
            since: number of steps since the last checkpoint, [S] int64.
            step: number of steps made, [S] int64.
            first: keep the first misclassified point, in place of the misclassified point of highest value.
            passes: number of passes through the network for one gradient, which is their mean; for models that
                draw random numbers.

        Returns:
            The values, logits and input gradients before the step; the gradients are valid until the engine's next
            call.
        """
        found = mean_gradient(engine, self.adv, self._value_of(settings), passes)
        value, grad = found.value, found.grad
        succeeded = (found.logits.argmax(1) != self.y) & ~found.logits.isnan().any(1)
        keep = self._keep(fresh, value, succeeded, step, first)
        rises = self.rises + (value > self.value)
        self.rises = torch.where(fresh, torch.zeros_like(rises), rises)
        better = fresh | (value > self.best_value)
        self.best_value = torch.where(better, value, self.best_value)
        self.value_then = torch.where(fresh, value, self.value_then)
        # True, so that the first checkpoint cannot halve because of an unchanged step size.
        self.halved = self.halved | fresh
        self.value = value
        back = None if checked is None else self._check(checked, since, settings.rho)
        eps, norm, bounds = settings.eps, settings.norm, settings.bounds
        rows = RowFlags(fresh, better, keep, back)
        moved = advance(self._images(), grad, rows, self.alpha, eps, norm, bounds)
        for name, images in moved._asdict().items():
            setattr(self, name, images)
        return found

    def _images(self) -> SlotImages:
        return SlotImages(self.x, self.adv, self.before, self.best, self.best_grad, self.kept)

    def _value_of(self, settings: APGDSettings) -> Callable[[Tensor], Tensor]:
        if settings.aims_at_wrong_classes:
            return lambda logits: targeted_value(settings.loss, logits, self.y, self.target)
        objective = Objective(settings.loss)
        return lambda logits: objective(logits, self.y)

    def _keep(
        self, fresh: Tensor, value: Tensor, succeeded: Tensor, step: Tensor, first: bool
    ) -> Tensor:
        """Update the worst cases as `Best.offer` does, and return the rows whose points were kept, [S] bool."""
        better = (value > self.kept_value) | self.kept_value.isnan()
        better = torch.where(succeeded == self.succeeded, better, succeeded)
        if first:
            better &= ~self.succeeded
        better |= fresh
        self.kept_value = torch.where(better, value, self.kept_value)
        self.kept_alpha = torch.where(better, self.alpha, self.kept_alpha)
        self.kept_step = torch.where(better, step, self.kept_step)
        self.succeeded = torch.where(better, succeeded, self.succeeded)
        return better

    def _check(self, checked: Tensor, since: Tensor, rho: float) -> Tensor:
        """Do `StepSizes.check` for some rows, and return the rows that go back to their best points, [S] bool."""
        too_few = self.rises < rho * since
        stuck = ~self.halved & (self.best_value <= self.value_then)
        back = checked & (too_few | stuck)
        self.halved = torch.where(checked, back, self.halved)
        self.alpha = torch.where(back, self.alpha / 2, self.alpha)
        self.value = torch.where(back, self.best_value, self.value)
        self.value_then = torch.where(checked, self.best_value, self.value_then)
        self.rises = self.rises.masked_fill(checked, 0)
        return back
