"""One step of projected gradient ascent: step, projection on the ball, clip to the bounds, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.ops import checks
from fastadv.ops.registry import Op, define

NORMS = ("linf", "l2")


def _reference(
    adv: Tensor,
    grad: Tensor,
    x: Tensor,
    eps: float,
    alpha: float,
    eps_per_sample: Tensor | None,
    alpha_per_sample: Tensor | None,
    norm: str,
    low: float,
    high: float,
) -> Tensor:
    dtype = checks.accumulate_dtype(adv)
    a, g, c = adv.to(dtype), grad.to(checks.accumulate_dtype(adv, grad)), x.to(dtype)
    radius = checks.broadcast_per_sample(eps, eps_per_sample, adv)
    step = checks.broadcast_per_sample(alpha, alpha_per_sample, adv)
    if adv.numel() == 0:
        return torch.empty_like(adv)
    if norm == "linf":
        moved = a + step * torch.sign(g).to(dtype)
        moved = torch.where(moved < c - radius, c - radius, moved)
        moved = torch.where(moved > c + radius, c + radius, moved)
    else:
        delta = a + step * _unit(g).to(dtype) - c
        length = _length(delta)
        shrink = torch.where(length > radius, radius / length, torch.ones_like(length))
        moved = c + delta * shrink
    clipped = torch.where(moved < low, low, moved)
    # Written into `adv`'s own strides: a pointwise result would follow the operands' mixed layouts.
    return torch.empty_like(adv).copy_(torch.where(clipped > high, high, clipped))


def _length(t: Tensor) -> Tensor:
    return checks.rows(t).square().sum(1).sqrt().view(-1, *[1] * (t.dim() - 1))


def _unit(grad: Tensor) -> Tensor:
    """The gradient over its length per sample; 0 where that is 0 or not finite.

    The gradient is first divided by its largest magnitude: squares of float32 gradients below 1e-23 would
    vanish, and such gradients are common at confident samples.
    """
    largest = checks.rows(grad).abs().amax(1).view(-1, *[1] * (grad.dim() - 1))
    usable = (largest > 0) & torch.isfinite(largest)
    scaled = torch.where(usable, grad / largest, torch.zeros_like(grad))
    return torch.where(usable, scaled / _length(scaled), torch.zeros_like(grad))


def _fake(
    adv: Tensor,
    grad: Tensor,
    x: Tensor,
    eps: float,
    alpha: float,
    eps_per_sample: Tensor | None,
    alpha_per_sample: Tensor | None,
    norm: str,
    low: float,
    high: float,
) -> Tensor:
    torch._check(adv.shape == grad.shape, lambda: "grad must have the shape of adv")
    torch._check(adv.shape == x.shape, lambda: "x must have the shape of adv")
    return torch.empty_like(adv)


def _reference_(
    adv: Tensor,
    grad: Tensor,
    x: Tensor,
    eps: float,
    alpha: float,
    eps_per_sample: Tensor | None,
    alpha_per_sample: Tensor | None,
    norm: str,
    low: float,
    high: float,
    counts: Tensor | None,
) -> None:
    if counts is not None:
        counts += torch.stack(((grad == 0).sum(), torch.isnan(grad).sum()))
    stepped = _reference(
        adv, grad, x, eps, alpha, eps_per_sample, alpha_per_sample, norm, low, high
    )
    adv.copy_(stepped)


def _fake_(
    adv: Tensor,
    grad: Tensor,
    x: Tensor,
    eps: float,
    alpha: float,
    eps_per_sample: Tensor | None,
    alpha_per_sample: Tensor | None,
    norm: str,
    low: float,
    high: float,
    counts: Tensor | None,
) -> None:
    _fake(adv, grad, x, eps, alpha, eps_per_sample, alpha_per_sample, norm, low, high)


_ARGUMENTS = (
    "Tensor grad, Tensor x, float eps, float alpha, Tensor? eps_per_sample, "
    "Tensor? alpha_per_sample, str norm, float low, float high"
)
_op = define(
    Op(
        "pgd_step",
        f"(Tensor adv, {_ARGUMENTS}) -> Tensor",
        reference=_reference,
        fake=_fake,
        triton="pgd_step:pgd_step",
        batched=("adv", "grad", "x", "eps_per_sample", "alpha_per_sample"),
    )
)
_op_ = define(
    Op(
        "pgd_step_",
        f"(Tensor(a!) adv, {_ARGUMENTS}, Tensor(b!)? counts) -> ()",
        reference=_reference_,
        fake=_fake_,
        triton="pgd_step:pgd_step_",
    )
)


def pgd_step(
    adv: Tensor,
    grad: Tensor,
    x: Tensor,
    eps: float | Tensor,
    alpha: float | Tensor,
    norm: str = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """One step of projected gradient ascent (Madry et al. 2018, section 2.1).

    * ``"linf"``: ``clip(clamp(adv + alpha * sign(grad), x - eps, x + eps), bounds)``.
    * ``"l2"``: ``clip(x + P(adv + alpha * grad / ||grad|| - x), bounds)``, P the projection on the ball
      of radius eps, norms per sample.

    A zero or NaN gradient element moves nothing in linf (``sign(0) = sign(NaN) = 0``), a sample whose
    gradient is zero or not finite is not moved in l2. Computed in float32 (float64 for float64 images).
    In float32 linf is bit-equal on every backend; in half precision the result is rounded to the nearest
    number of the dtype and can leave the ball by half a unit in the last place.

    Args:
        adv: the current point [B, ...], any dense layout.
        grad: gradient of the loss to be raised, [B, ...]; its dtype may differ from ``adv``'s.
        x: centre of the ball [B, ...], in ``adv``'s dtype.
        eps: radius, in the units of ``x``; a number or a tensor [B].
        alpha: step size, in the units of ``x``; a number or a tensor [B].
        norm: ``"linf"`` or ``"l2"``.
        bounds: lowest and highest allowed value.

    Returns:
        The next point [B, ...] in ``adv``'s dtype and layout. It carries no gradient.

    Raises:
        TypeError: a tensor is not floating point, ``x`` has another dtype than ``adv``, or eps or alpha is no
            number.
        ValueError: shapes or devices differ, eps or alpha is negative or not finite, unknown norm, bounds
            in the wrong order.
    """
    arguments = _checked(adv, grad, x, eps, alpha, norm, bounds)
    return torch.ops.fastadv.pgd_step(adv.detach(), *arguments)


def pgd_step_(
    adv: Tensor,
    grad: Tensor,
    x: Tensor,
    eps: float | Tensor,
    alpha: float | Tensor,
    norm: str = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    *,
    counts: Tensor | None = None,
) -> Tensor:
    """`pgd_step`, writing the next point into ``adv``.

    Args:
        adv: as in `pgd_step`; overwritten. Where gradients are recorded it must not require grad.
        grad: as in `pgd_step`.
        x: as in `pgd_step`.
        eps: as in `pgd_step`.
        alpha: as in `pgd_step`.
        norm: as in `pgd_step`.
        bounds: as in `pgd_step`.
        counts: int64 tensor [2] to which the numbers of zero and of NaN gradient elements are added. A
            large share of zeros is a sign of gradient masking.

    Returns:
        ``adv``.

    Raises:
        RuntimeError: ``adv`` requires grad, or its elements overlap in memory.
        TypeError: as in `pgd_step`, or ``counts`` is no tensor.
        ValueError: as in `pgd_step`, or ``counts`` is not a contiguous int64 tensor [2] on the device of ``adv``.
    """
    arguments = _checked(adv, grad, x, eps, alpha, norm, bounds)
    if adv.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "adv must not require grad, because the step has no gradient: pass adv.detach() or call "
            "within torch.no_grad()"
        )
    if counts is not None:
        _check_counts(counts, adv)
    torch.ops.fastadv.pgd_step_(adv, *arguments, counts)
    # A graph that has saved what is overwritten here must not be run backward.
    torch.autograd.graph.increment_version(adv if counts is None else (adv, counts))
    return adv


def _check_counts(counts: Tensor, adv: Tensor) -> None:
    checks.check_tensor("counts", counts)
    if counts.dtype != torch.int64 or counts.shape != (2,) or not counts.is_contiguous():
        raise ValueError(
            "counts must be a contiguous int64 tensor of shape (2,), "
            f"got {counts.dtype} of shape {tuple(counts.shape)}, strides {counts.stride()}"
        )
    checks.check_same_device("counts", counts, "adv", adv)


def _checked(
    adv: Tensor,
    grad: Tensor,
    x: Tensor,
    eps: float | Tensor,
    alpha: float | Tensor,
    norm: str,
    bounds: tuple[float, float],
) -> tuple[Tensor, Tensor, float, float, Tensor | None, Tensor | None, str, float, float]:
    for name, value in (("adv", adv), ("grad", grad), ("x", x)):
        checks.check_float(name, value)
    checks.check_same_shape("grad", grad, "adv", adv)
    checks.check_same_shape("x", x, "adv", adv)
    if x.dtype != adv.dtype:
        raise TypeError(f"x must have the dtype of adv, {adv.dtype}, got {x.dtype}")
    checks.check_choice("norm", norm, NORMS)
    low, high = checks.check_bounds(bounds)
    eps_number, eps_tensor = checks.per_sample("eps", eps, adv)
    alpha_number, alpha_tensor = checks.per_sample("alpha", alpha, adv)
    return (
        grad.detach(),
        x.detach(),
        eps_number,
        alpha_number,
        eps_tensor,
        alpha_tensor,
        norm,
        low,
        high,
    )
