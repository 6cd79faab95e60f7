"""One batch under attack: the passes and steps that attacks use, with the counters of the report."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadv.attacks.averaging import mean_gradient
from fastadv.attacks.report import AttackReport
from fastadv.attacks.soft_labels import hard
from fastadv.engine.engines import Engine, InputGradient
from fastadv.ops import pgd_step_, random_start
from fastadv.ops.checks import over_samples
from fastadv.ops.pgd_step_per_channel import Bounds

ValueOf = Callable[[Tensor], Tensor]  # logits [B, C] -> [B] or scalar, to be raised


@dataclass
class CallCounters:
    """Counters of one call of an attack; counting never waits for the device.

    Attributes:
        engine: name of the engine that ran.
        reason: the reason for this engine.
        counts: int64 [2], zero elements of the gradients, and NaN and infinite ones.
        nan_points: int64 scalar, number of points with a NaN among their logits.
        elements: number of elements of the gradients.
        losses: mean loss at each gradient.
        first_logits: the logits of the first gradient [B, C]; None before it.
    """

    engine: str
    reason: str
    counts: Tensor
    nan_points: Tensor
    elements: int = 0
    losses: list[Tensor] = field(default_factory=list)
    first_logits: Tensor | None = None

    def report(self, precision: str, outside: Tensor) -> AttackReport:
        """Return the report of the call.

        Args:
            precision: precision of the network's passes.
            outside: share of the result outside ball or bounds, a scalar.
        """
        return AttackReport(
            self.engine,
            self.reason,
            precision,
            self.elements,
            self.counts,
            self.nan_points,
            tuple(self.losses),
            outside,
        )


class CallOverrides(NamedTuple):
    """Step sizes, numbers of steps and bounds that a call gives, in place of the attack's own.

    Attributes:
        alpha: step size, a number, [B] or [B, C, 1, ...]; None is the attack's, in proportion to the radius.
        steps: int64 [B] on the images' device; None is the attack's number.
        max_steps: the largest of these numbers of steps.
        bounds: lowest and highest value, numbers or tensors that broadcast over the images; None is the attack's.
    """

    alpha: float | Tensor | None = None
    steps: Tensor | None = None
    max_steps: int = 0
    bounds: Bounds | None = None

    def rows(self, rows: Tensor) -> CallOverrides:
        """Some of the samples, by int64 indices."""
        alpha = self.alpha[rows] if isinstance(self.alpha, Tensor) else self.alpha
        steps = None if self.steps is None else self.steps[rows]
        return self._replace(alpha=alpha, steps=steps)


@dataclass
class AttackBatch:
    """Images under attack, within the session of an engine.

    Attributes:
        engine: computes logits and gradients.
        x: the clean images [B, ...] in the dtype and layout in which the attack moves them.
        y: labels, or targets, [B]; or soft labels [B, C], whose likeliest class is to be left or reached.
        eps: radius, a number or [B]; for attacks that move by `step_` also [B, C, 1, ...].
        norm: norm of the ball.
        bounds: lowest and highest allowed value; for attacks that move by `step_` also tensors that broadcast over
            the images.
        targeted: whether ``y`` is to be reached rather than left.
        sample_ids: int64 [B], or None for 0 .. B-1.
        check: called once with the number of classes, which the first logits have; None afterwards.
        given_start: the points at which the first run starts, [B, ...]; None for the attack's own start.
        active: bool [B], false for samples that only fill up the batch: they are neither moved nor counted. None
            means that all are true.
        passes: number of passes through the network for one gradient, which is their mean.
        overrides: the step sizes, numbers of steps and bounds that this call gives.
    """

    engine: Engine
    x: Tensor
    y: Tensor
    eps: float | Tensor
    norm: str
    bounds: tuple[Any, Any]
    targeted: bool
    sample_ids: Tensor | None
    check: Callable[[int], None] | None
    given_start: Tensor | None = None
    active: Tensor | None = None
    passes: int = 1
    overrides: CallOverrides = CallOverrides()  # noqa: RUF009, it is immutable

    def __post_init__(self) -> None:
        counts, nan_points = (
            torch.zeros(size, dtype=torch.int64, device=self.x.device) for size in ((2,), ())
        )
        self.counters = CallCounters(self.engine.name, self.engine.reason, counts, nan_points)

    def logits(self, adv: Tensor) -> Tensor:
        """Logits [B, C] without gradient."""
        logits = self.engine.logits(adv)
        self.check_values(logits.shape[1])
        return logits

    def gradient(self, adv: Tensor, value_of: ValueOf) -> InputGradient:
        """Value, logits and input gradient at ``adv``; the gradient is valid until the next call."""
        if self.check is not None:
            value_of = self._checked(value_of)
        found = mean_gradient(self.engine, adv, value_of, self.passes)
        self.counters.elements += adv.numel()
        self.counters.losses.append(self._mean(found.value))
        if self.counters.first_logits is None:
            self.counters.first_logits = found.logits
        return found

    def _checked(self, value_of: ValueOf) -> ValueOf:
        """A value that first checks images and labels, now that the logits tell the number of classes."""

        def value_of_checked(logits: Tensor) -> Tensor:
            self.check_values(logits.shape[1])
            return value_of(logits)

        return value_of_checked

    def start(self, seed: int, random: bool = True) -> Tensor:
        """The given start, in the ball; else a random point of the ball, or the image: [B, ...]."""
        if self.given_start is not None:
            return self.project_(self.given_start.clone())
        if not random:
            return self.x.clone()
        return random_start(
            self.x, self.eps, self.norm, self.bounds, seed, sample_ids=self.sample_ids
        )

    def step_(
        self, adv: Tensor, grad: Tensor, alpha: float | Tensor, sparsity: float = 0.95
    ) -> Tensor:
        """Step along a gradient that the engine gave, in place, and count its zeros, NaN and infinities."""
        if self.norm == "l1":
            self.count(grad)
            return self.step_along_(adv, grad, alpha, sparsity)
        return self._step_(adv, grad, alpha, active=self.active, counts=self.counters.counts)

    def step_along_(
        self, adv: Tensor, direction: Tensor, alpha: float | Tensor, sparsity: float
    ) -> Tensor:
        """Step along a direction that is not a gradient of the engine, in place.

        In l1 elements at a bound whose direction leads out of it do not count among the largest: a step along
        these elements alone would change nothing.
        """
        if self.norm == "l1":
            low, high = self.bounds
            stuck = ((adv <= low) & (direction < 0)) | ((adv >= high) & (direction > 0))
            direction = direction.masked_fill(stuck, 0.0)
        return self._step_(adv, direction, alpha, sparsity=sparsity, active=self.active)

    def project_(self, adv: Tensor) -> Tensor:
        """Move points into ball and bounds, in place."""
        return self._step_(adv, self.x, 0.0)

    def _step_(
        self, adv: Tensor, direction: Tensor, alpha: float | Tensor, **options: Any
    ) -> Tensor:
        return pgd_step_(adv, direction, self.x, self.eps, alpha, self.norm, self.bounds, **options)

    def count(self, grad: Tensor) -> None:
        """Count the zeros, NaN and infinities of a gradient that no `step_` sees."""
        zero, useless = self._of_active(grad == 0), self._of_active(~grad.isfinite())
        self.counters.counts += torch.stack((zero.sum(), useless.sum()))

    def _of_active(self, flags: Tensor) -> Tensor:
        """Flags [B, ...] of the samples that are counted; false for the others."""
        return flags if self.active is None else flags & over_samples(self.active, flags)

    def succeeded(self, logits: Tensor) -> Tensor:
        """Which samples are where the attack wants them, [B] bool; NaN logits are no success, and are counted."""
        success, nan = self._judged(logits)
        self.counters.nan_points += (nan if self.active is None else nan & self.active).sum()
        return success

    def is_success(self, logits: Tensor) -> Tensor:
        """As `succeeded`, for points that are counted elsewhere."""
        return self._judged(logits)[0]

    def _judged(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Which samples are where the attack wants them, and which have NaN logits, [B] bool each."""
        reached, nan = logits.argmax(1) == hard(self.y), logits.isnan().any(1)
        return (reached if self.targeted else ~reached) & ~nan, nan

    def rows(self, rows: Tensor) -> AttackBatch:
        """Some of the samples, by int64 indices; they keep their random numbers, and are counted here."""
        ids = self.sample_ids
        if ids is None:
            ids = torch.arange(self.x.shape[0], device=self.x.device)
        some = copy.copy(self)  # shares the counters
        some.x, some.y, some.sample_ids = self.x[rows], self.y[rows], ids[rows]
        if self.given_start is not None:
            some.given_start = self.given_start[rows]
        if isinstance(self.eps, Tensor):
            some.eps = self.eps[rows]
        some.overrides = self.overrides.rows(rows)
        return some

    def with_radius(self, eps: float | Tensor) -> AttackBatch:
        """The same samples in another ball; they are counted here."""
        other = copy.copy(self)  # shares the counters
        other.eps = eps
        return other

    def with_own_start(self) -> AttackBatch:
        """The same samples for a later run, which would repeat the first one from its given start."""
        other = copy.copy(self)  # shares the counters
        other.given_start = None
        return other

    def on(self, x: Tensor, y: Tensor, eps: Tensor, active: Tensor) -> AttackBatch:
        """The same attack on other tensors, without checks and with its own counters."""
        return replace(
            self,
            x=x,
            y=y,
            eps=eps,
            active=active,
            sample_ids=None,
            check=None,
            given_start=None,
            overrides=CallOverrides(),
        )

    def check_values(self, classes: int) -> None:
        """Check the values of images and labels, unless this was done before or is not wanted."""
        check, self.check = self.check, None
        if check is not None:
            check(classes)

    def _mean(self, value: Tensor) -> Tensor:
        if self.active is None:
            return value.mean()
        return torch.where(self.active, value, torch.zeros_like(value)).sum() / self.active.sum()
