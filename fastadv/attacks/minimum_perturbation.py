"""The smallest radius at which an attack succeeds, image by image."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from fastadv.attacks.arguments import check_batch
from fastadv.attacks.attack import Attack
from fastadv.attacks.attack_warnings import nan_logits_warning
from fastadv.attacks.options import names_checked
from fastadv.engine.engines import Model
from fastadv.engine.frozen import frozen
from fastadv.ops.values import check_radius, integer, limit
from fastadv.seeding import draw_seed


@names_checked
def minimum_perturbation(
    attack: Attack,
    x: Tensor,
    y: Tensor,
    *,
    max_eps: float,
    iterations: int = 12,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
    judge: Model | None = None,
) -> Tensor:
    """Bisect for the smallest eps at which an attack succeeds, each image for itself.

    The live model decides about success, in eval mode and in the precision of its weights, whatever the precision
    of the attack. Points at which a logit is NaN are no success, and there is a warning. Bisection assumes that
    success is monotone in eps. Otherwise it finds one of the radii at which success begins. Images that need no
    attack have 0. Only images that ``max_eps`` breaks are attacked again.

    Args:
        attack: any attack on an eps-ball, such as ``fastadv.PGD(model, eps, alpha, steps)``; its own eps
            only sets the ratio of the step size to the radius.
        x: images [B, ...] within the bounds of the attack.
        y: labels, or targets, [B], int64 or another integer dtype.
        max_eps: largest radius to try, in the units of ``x``, > 0.
        iterations: bisections; the result is at most ``max_eps / 2**iterations`` too large.
        seed: seed of every call of the attack; None takes the attack's own seed, or draws a seed.
        sample_ids: int64 [B], which random numbers each sample gets; default 0 .. B-1.
        judge: the model that decides about success; None is the attacked model.

    Returns:
        [B] float32 (float64 for float64 images): radii at which the attack succeeded, inf where it did not at
        ``max_eps``.

    Raises:
        TypeError: ``attack`` is no attack of this package, or has no eps.
        ValueError: ``max_eps`` is not positive or ``iterations`` below 1, or as the attack says.
    """
    if not isinstance(attack, Attack):
        raise TypeError(f"attack must be an attack of fastadv, got {type(attack).__name__}")
    max_eps = limit("max_eps", max_eps)
    iterations = integer("iterations", iterations, at_least=1)
    if not max_eps > 0:
        raise ValueError(f"max_eps must be > 0, got {max_eps}")
    y = check_batch(x, y, sample_ids, attack.model, "for minimum_perturbation")
    if attack.eps < math.inf:  # else it has no ball, and will say so
        check_radius("max_eps", max_eps, attack.norm, attack.bounds, x.shape[1:].numel())
    if seed is None:
        seed = draw_seed() if attack.seed is None else attack.seed
    if sample_ids is None:
        sample_ids = torch.arange(x.shape[0], device=x.device)
    search = Bisection(attack, attack.model if judge is None else judge, x, y, seed, sample_ids)
    radii = search.radii(max_eps, iterations)
    if search.nan_points:
        warnings.warn(nan_logits_warning(search.nan_points), stacklevel=3)
    return radii


class Bisection:
    """The search of one call of `minimum_perturbation`, whose arguments are checked.

    Attributes:
        nan_points: number of judged points with a NaN among their logits.
        nan_gradients: elements of the gradients that the attack followed that were NaN or infinite.
    """

    def __init__(
        self, attack: Attack, judge: Model, x: Tensor, y: Tensor, seed: int, sample_ids: Tensor
    ) -> None:
        self._attack, self._judge = attack, judge
        self._x, self._y, self._seed, self._ids = x, y, seed, sample_ids
        self.nan_points = self.nan_gradients = 0

    def radii(self, max_eps: float, iterations: int) -> Tensor:
        """The smallest radii [B]; infinite for images that ``max_eps`` does not break."""
        x = self._x
        wide = torch.promote_types(x.dtype, torch.float32)
        result = torch.full((x.shape[0],), torch.inf, dtype=wide, device=x.device)
        if x.shape[0] == 0:
            return result
        every_row = torch.arange(x.shape[0], device=x.device)
        result[self._breaks(every_row, torch.full_like(result, max_eps))] = max_eps
        result[self._succeeds(x, self._y)] = 0.0
        rows = ((result > 0) & result.isfinite()).nonzero().flatten()
        if rows.numel() == 0:
            return result
        low, high = torch.zeros_like(result[rows]), result[rows]
        for _ in range(iterations):
            middle = (low + high) / 2
            found = self._breaks(rows, middle)
            low, high = torch.where(found, low, middle), torch.where(found, middle, high)
        return result.index_copy(0, rows, high)

    def _breaks(self, rows: Tensor, eps: Tensor) -> Tensor:
        """Which of some images the attack breaks at their radii, [R] bool."""
        x, y, ids = self._x[rows], self._y[rows], self._ids[rows]
        adv = self._attack(x, y, seed=self._seed, sample_ids=ids, eps=eps)
        self.nan_gradients += self._attack.last.nan_gradients
        return self._succeeds(adv, y)

    @torch.no_grad()
    def _succeeds(self, images: Tensor, y: Tensor) -> Tensor:
        """Whether the judge's class is as the attack wants, [R] bool; NaN logits are no success."""
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        with frozen(self._judge), torch.autocast(images.device.type, enabled=False):
            logits = self._judge(images)
        nan, reached = logits.isnan().any(1), logits.argmax(1) == y
        self.nan_points += int(nan.sum())
        return (reached if self._attack.settings.targeted else ~reached) & ~nan
