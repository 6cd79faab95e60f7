"""The three norms of `fastadv.ops.pgd_step` in plain torch, as the compiled backends compute them.

Samples are rows [B, N] here, and radii, step sizes and thresholds columns [B, 1], so that everything broadcasts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastadv.ops import checks

_FRACTION = 52  # bits of a double's fraction


class Numbers(NamedTuple):
    """The arguments of the two ops after the images, in the order of their schema."""

    eps: float
    alpha: float
    eps_per_sample: Tensor | None
    alpha_per_sample: Tensor | None
    norm: str
    low: float
    high: float
    sparsity: float
    active: Tensor | None


@dataclass(frozen=True)
class Rows:
    """One step's operands.

    Attributes:
        adv: the points [B, N] in the dtype of computation.
        grad: gradients [B, N] in float32 or float64.
        x: centres [B, N] in the dtype of computation.
        eps: radii [B, 1] in the dtype of computation.
        alpha: step sizes [B, 1] in the dtype of computation.
        sparsity: the share of elements that an l1 step leaves alone.
    """

    adv: Tensor
    grad: Tensor
    x: Tensor
    eps: Tensor
    alpha: Tensor
    sparsity: float


def linf(rows: Rows) -> Tensor:
    """``clamp(adv + alpha * sign(grad), x - eps, x + eps)``; NaN stays NaN and -0.0 stays -0.0."""
    moved = rows.adv + rows.alpha * torch.sign(rows.grad).to(rows.adv.dtype)
    floor, ceiling = rows.x - rows.eps, rows.x + rows.eps
    moved = torch.where(moved < floor, floor, moved)
    return torch.where(moved > ceiling, ceiling, moved)


def l2(rows: Rows) -> Tensor:
    """``x + P(adv + alpha * grad / ||grad|| - x)``.

    ``||d + f g||**2 = d.d + 2 f g.d + f**2 g.g`` with d = adv - x gives the length after the step from three
    sums, so that the compiled backends need one pass before the one that writes.
    """
    dtype = rows.adv.dtype
    grad = _scaled(rows.grad)
    d = rows.adv.double() - rows.x.double()
    gg, gd, dd = ((a * b).sum(1, keepdim=True) for a, b in ((grad, grad), (grad, d), (d, d)))
    usable = (gg > 0) & torch.isfinite(gg)
    factor = torch.where(usable, rows.alpha.double() / gg.sqrt(), 0.0)
    if dtype == torch.float32:
        factor = rounded_to_float_precision(factor)
    squared = torch.where(usable, dd + 2 * factor * gd + factor * factor * gg, dd)
    length, radius = squared.clamp(min=0).sqrt(), rows.eps.double()
    shrink = torch.where(length > radius, radius / length, 1.0).to(dtype)
    step = torch.where(factor == 0, 0.0, grad * factor).to(dtype)
    return rows.x + (rows.adv + step - rows.x) * shrink


def _scaled(grad: Tensor) -> Tensor:
    """The gradient in float64; one that is float64 itself over its largest magnitude.

    In float64 squares of float32 numbers neither vanish nor overflow; squares of float64 numbers can.
    """
    if grad.dtype != torch.float64:
        return grad.double()
    largest = grad.abs().amax(1, keepdim=True)
    return torch.where(largest > 0, grad / largest, grad)


def rounded_to_float_precision(t: Tensor) -> Tensor:
    """Positive doubles rounded to 24 significant bits, in float64 for its range.

    Sums in another order differ in their last bits. This rounding, once per sample, removes the difference except
    for about one sample in ten million. In the products with every element the difference would be seen far more
    often.
    """
    dropped = 29  # of the 53 significant bits of a double
    bits = t.view(torch.int64) + (1 << (dropped - 1))
    return (bits >> dropped << dropped).view(torch.float64)


def l1(rows: Rows) -> Tensor:
    """The largest gradient elements move by equal parts of alpha; a soft threshold projects on the ball."""
    dtype = rows.adv.dtype
    chosen = _largest_elements(rows.grad.abs(), rows.sparsity)
    count = chosen.sum(1, keepdim=True).double()
    # Where no element is chosen, the share is infinite, and nothing uses it.
    share = (rows.alpha.double() / count).to(dtype)
    moved = rows.adv + torch.where(chosen, torch.where(rows.grad > 0, share, -share), 0.0)
    delta = moved - rows.x
    theta = soft_threshold(delta.abs(), rows.eps.double())
    left = (delta.abs().double() - theta).to(dtype)
    left = torch.where(left > 0, left, 0.0)
    projected = rows.x + torch.where(delta < 0, -left, left)
    return torch.where(theta > 0, projected, moved)


def elements_to_move(size: int, sparsity: float) -> int:
    """``ceil((1 - sparsity) * size)``, at least 1; as a difference, because 1 - 0.95 is more than 0.05."""
    return max(1, size - math.floor(sparsity * size))


def _largest_elements(magnitude: Tensor, sparsity: float) -> Tensor:
    """Which elements are as large as the k-th largest and not zero. No element is, where one is not finite."""
    k = elements_to_move(magnitude.shape[1], sparsity)
    threshold = magnitude.topk(k, dim=1).values[:, -1:]
    finite = torch.isfinite(magnitude).all(1, keepdim=True)
    return (magnitude >= threshold) & (magnitude > 0) & finite


def soft_threshold(magnitude: Tensor, radius: Tensor) -> Tensor:
    """The theta [B, 1] with ``sum(max(magnitude - theta, 0)) = radius``; 0 for a row inside the ball.

    It is 0 also where a magnitude is not finite. Source: Michelot 1986. Theta is (sum - radius) / number of the
    elements that exceed it. Each pass leaves out the elements that do not exceed the theta of the pass before,
    until every element left exceeds it. Theta only grows, so that at most N passes are needed, and mostly fewer
    than ten.
    """
    terms = _exactly_summable(magnitude)
    theta = torch.zeros_like(radius)
    total, count = _sum_above(terms, theta)
    outside = (total > radius) & torch.isfinite(total)
    going = outside
    while going.any():
        theta = torch.where(going, (total - radius) / count, theta)
        total, above = _sum_above(terms, theta)
        going, count = going & (above < count) & (above > 0), above
    return torch.where(outside & (radius == 0), torch.inf, theta)


def _sum_above(terms: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and number of the elements that exceed theta; NaN counts among them."""
    above = ~(terms <= theta)
    total = torch.where(above, terms, 0.0).sum(1, keepdim=True)
    return total, above.sum(1, keepdim=True).double()


def _exactly_summable(magnitude: Tensor) -> Tensor:
    """float32 magnitudes as doubles that add up without rounding, and so to the same sum in every order.

    They are rounded to multiples of ``2**(head - 52)`` times the largest magnitude's power of two, with
    ``2**head >= N``. To round, a number whose last bit has that value is added and subtracted. All partial sums
    then fit a double. float64 magnitudes, which need all their bits, stay as they are.
    """
    if magnitude.dtype == torch.float64:
        return magnitude
    largest = magnitude.amax(1, keepdim=True).double()
    exponent = largest.view(torch.int64) >> _FRACTION
    head = sum_bits(magnitude.shape[1])
    grid = ((exponent + 1 + head << _FRACTION) + (1 << (_FRACTION - 1))).view(torch.float64)
    rounded = (magnitude.double() + grid) - grid
    return torch.where(torch.isfinite(largest), rounded, torch.nan)


def sum_bits(size: int) -> int:
    """Bits by which a sum of ``size`` numbers can be longer than the largest of them; at least 2."""
    return max(2, (size - 1).bit_length())


NORMS = {"linf": linf, "l2": l2, "l1": l1}


def take_step(adv: Tensor, grad: Tensor, x: Tensor, step: Numbers) -> Tensor:
    """The stepped, projected and clipped points, in the dtype of computation and the shape of ``adv``.

    No tensor may be empty; ``active`` does not matter.
    """
    dtype = checks.accumulate_dtype(adv)
    operands = Rows(
        checks.rows(adv).to(dtype),
        checks.rows(grad).to(checks.accumulate_dtype(grad)),
        checks.rows(x).to(dtype),
        _column(step.eps, step.eps_per_sample, adv),
        _column(step.alpha, step.alpha_per_sample, adv),
        step.sparsity,
    )
    moved = NORMS[step.norm](operands)
    clipped = torch.where(moved < step.low, step.low, moved)
    return torch.where(clipped > step.high, step.high, clipped).view(adv.shape)


def chosen(active: Tensor | None, stepped: Tensor, adv: Tensor) -> Tensor:
    """``stepped``, in which the samples that are not active have been put back to where they were."""
    if active is not None:
        stepped.copy_(torch.where(checks.over_samples(active, adv), stepped, adv))
    return stepped


def add_counts(counts: Tensor | None, grad: Tensor, active: Tensor | None) -> None:
    """Add to ``counts`` how many gradient elements of the active samples are zero, and how many are not finite."""
    if counts is not None:
        seen = grad if active is None else grad[active]
        counts += torch.stack(((seen == 0).sum(), (~torch.isfinite(seen)).sum()))


def _column(number: float, values: Tensor | None, like: Tensor) -> Tensor:
    """The number of each sample [B, 1] in the dtype of computation."""
    dtype = checks.accumulate_dtype(like)
    if values is not None:
        return values.to(dtype).view(-1, 1)
    return torch.full((like.shape[0], 1), number, dtype=dtype, device=like.device)
