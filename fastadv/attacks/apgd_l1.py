"""Auto-PGD in the l1 ball (Croce and Hein 2021): sparse steps, and an exact projection that keeps the bounds.

Source: F. Croce and M. Hein, "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers", ICML
2021, algorithm 1 and section 3, with radii that shrink from three times eps, as AutoAttack runs it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastadv.attacks.batch import AttackBatch, ValueOf
from fastadv.attacks.best import Best, where_images
from fastadv.attacks.projections import to_l1_ball
from fastadv.ops import random_start
from fastadv.ops.checks import rows

_RADII = (3.0, 2.0, 1.0)  # the radii, one after the other, in units of eps
_CHECK_AFTER = 0.04  # interval between checks, as a fraction of the steps at a radius
_FEWER = 1.5  # the number of elements that the best point has changed, divided by the number that a step moves
_SHRINK = 1.5  # divisor of the step size at a check
_MIN_STEP = 0.1  # smallest step size, in units of the first step size
_SPARSER = 0.95  # below this fraction of the elements of the last check, the step size starts again


def run_l1(batch: AttackBatch, value_of: ValueOf, steps: int, seed: int) -> Best:
    """One run from one start: larger balls first, each from the best point of the last."""
    point, best = _start(batch, seed), Best()
    for factor, count in zip(_RADII, steps_by_radius(steps), strict=True):
        if count > 0:
            wider = batch.with_radius(factor * batch.eps)
            point, best = _search(wider, value_of, count, _projected(wider, point))
    return best


def steps_by_radius(steps: int) -> tuple[int, int, int]:
    """The number of steps in each ball: 30 %, 30 % and the rest, which is at least 1."""
    wide = min(-(-3 * steps // 10), (steps - 1) // 2)
    return wide, wide, steps - 2 * wide


def _start(batch: AttackBatch, seed: int) -> Tensor:
    """The given start, or the image with Gaussian noise whose standard deviation is the width of the bounds."""
    if batch.given_start is not None:
        return batch.given_start
    low, high = batch.bounds
    length = (high - low) * math.sqrt(batch.x[:1].numel())
    # In many dimensions nearly all of a ball lies near its surface, so that this noise is nearly Gaussian.
    noise = random_start(
        torch.zeros_like(batch.x),
        length,
        "l2",
        (-length, length),
        seed,
        sample_ids=batch.sample_ids,
    )
    return batch.x + noise


def _projected(batch: AttackBatch, point: Tensor) -> Tensor:
    return to_l1_ball(point, batch.x, batch.eps, batch.bounds)


def _search(batch: AttackBatch, value_of: ValueOf, steps: int, adv: Tensor) -> tuple[Tensor, Best]:
    """Make the steps in one ball, and return the points of highest value and the attack's best points."""
    best, found = Best(), batch.gradient(adv, value_of)
    best.offer(adv, found.value, batch.succeeded(found.logits))
    schedule = SparseSchedule(batch, adv, found.value, found.grad)
    interval = max(int(_CHECK_AFTER * steps), 1)
    for step in range(1, steps + 1):
        batch.count(schedule.grad)
        adv = _projected(batch, adv + schedule.step())
        if step == steps:
            logits = batch.logits(adv)
            value = value_of(logits)
            best.offer(adv, value, batch.succeeded(logits))
            schedule.note(adv, value, schedule.grad)
            break
        found = batch.gradient(adv, value_of)
        best.offer(adv, found.value, batch.succeeded(found.logits))
        schedule.note(adv, found.value, found.grad)
        if step % interval == 0:
            adv = schedule.check(adv)
    return schedule.best, best


class SparseSchedule:
    """Step sizes and sparsities of all samples, and the best points; nothing here waits for the device.

    Attributes:
        grad: the gradient at the point from which the search goes on, [B, ...].
        alpha: step sizes [B].
        moved: number of elements that the next step moves, [B].
        best: the points of highest value, [B, ...].
    """

    def __init__(self, batch: AttackBatch, adv: Tensor, value: Tensor, grad: Tensor) -> None:
        self._x = batch.x
        self._first_alpha = torch.zeros_like(value, dtype=adv.dtype) + batch.eps
        self.alpha = self._first_alpha
        self.grad = grad.clone()  # an engine's gradient is valid until its next call only
        self.best, self._best_grad, self._best_value = adv, self.grad, value
        self._changed = self._count_changed()
        self.moved = self._changed / _FEWER

    def step(self) -> Tensor:
        """The change [B, ...] of length alpha that moves the elements of largest gradient by equal parts."""
        grad = rows(self.grad).to(self._x.dtype).nan_to_num(0.0, 0.0, 0.0)
        size = grad.abs()
        last = (self.moved.ceil().long() - 1).clamp(0, size.shape[1] - 1)
        least = size.sort(1, descending=True).values.gather(1, last[:, None])
        sign = torch.where(size >= least, grad.sign(), 0.0)
        count = sign.abs().sum(1).clamp(min=1)
        return (sign * (self.alpha / count)[:, None]).view(self._x.shape)

    def note(self, adv: Tensor, value: Tensor, grad: Tensor) -> None:
        """Record the next point [B, ...] with its value [B] and gradient [B, ...]."""
        self.grad = grad
        better = value > self._best_value
        self.best = where_images(better, adv, self.best)
        self._best_grad = where_images(better, grad, self._best_grad)
        self._best_value = torch.where(better, value, self._best_value)

    def check(self, adv: Tensor) -> Tensor:
        """Set sparsity and step size by the best point.

        If the best point has become sparser, the search goes on from it with the first step size. Otherwise the
        step size shrinks.

        Returns:
            The points [B, ...] from which to go on.
        """
        before, self._changed = self._changed, self._count_changed()
        sparser = self._changed < _SPARSER * before
        shrunk = torch.maximum(self.alpha / _SHRINK, _MIN_STEP * self._first_alpha)
        self.alpha = torch.where(sparser, self._first_alpha, shrunk)
        self.moved = self._changed / _FEWER
        self.grad = where_images(sparser, self._best_grad, self.grad)
        return where_images(sparser, self.best, adv)

    def _count_changed(self) -> Tensor:
        """The number of elements of an image that the best point has changed, [B]."""
        return rows(self.best != self._x).sum(1).to(self._x.dtype)
