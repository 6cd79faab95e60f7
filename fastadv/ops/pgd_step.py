"""One step of projected gradient ascent: step, projection on the ball, clip to the bounds, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastadv.ops import checks
from fastadv.ops.pgd_step_per_channel import Bounds, channel_limits, varies_by_channel
from fastadv.ops.pgd_step_reference import Numbers, add_counts, chosen, take_step
from fastadv.ops.registry import Op, define
from fastadv.ops.traced import call


def _reference(adv: Tensor, grad: Tensor, x: Tensor, *numbers: Any) -> Tensor:
    step = Numbers(*numbers)
    # Written into `adv`'s own strides: a pointwise result would follow the operands' mixed layouts.
    out = torch.empty_like(adv)
    if adv.numel() == 0:
        return out
    out.copy_(take_step(adv, grad, x, step))
    return chosen(step.active, out, adv)


def _reference_(adv: Tensor, grad: Tensor, x: Tensor, *numbers_and_counts: Any) -> None:
    *numbers, counts = numbers_and_counts
    add_counts(counts, grad, Numbers(*numbers).active)
    adv.copy_(_reference(adv, grad, x, *numbers))


_ARGUMENTS = (
    "Tensor grad, Tensor x, float eps, float alpha, Tensor? eps_per_sample, "
    "Tensor? alpha_per_sample, str norm, float low, float high, float sparsity, Tensor? active"
)
_op = define(
    Op(
        "pgd_step",
        f"(Tensor adv, {_ARGUMENTS}) -> Tensor",
        reference=_reference,
        triton="pgd_step:pgd_step",
        batched=("adv", "grad", "x", "eps_per_sample", "alpha_per_sample", "active"),
    )
)
_op_ = define(
    Op(
        "pgd_step_",
        f"(Tensor(a!) adv, {_ARGUMENTS}, Tensor(b!)? counts) -> ()",
        reference=_reference_,
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
    bounds: Bounds = (0.0, 1.0),
    *,
    sparsity: float = 0.95,
    active: Tensor | None = None,
) -> Tensor:
    """One step of projected gradient ascent (Madry et al. 2018, section 2.1).

    * ``"linf"``: ``clip(clamp(adv + alpha * sign(grad), x - eps, x + eps), bounds)``.
    * ``"l2"``: ``clip(x + P(adv + alpha * grad / ||grad|| - x), bounds)``, P the projection on the ball
      of radius eps, norms per sample.
    * ``"l1"``: the same with the sparse step of SLIDE (Tramer and Boneh 2019), ``alpha * s / m``: s is
      ``sign(grad)`` where ``|grad|`` is at least its k-th largest value in the sample and not 0, m the number of
      these elements, ``k = max(1, ceil((1 - sparsity) * n))`` for n elements. Ties all move, so that the choice
      depends on no order; m is k where there are no ties. P takes theta off each magnitude, down to 0, so that the
      sum is eps (Duchi et al. 2008).

    A zero or NaN gradient element moves nothing in linf (``sign(0) = sign(NaN) = 0``); a sample whose gradient is
    zero or has an element that is not finite is not moved in l2 and l1, only projected and clipped.

    The step is computed in float32 (float64 for float64 images), its sums in float64. For images in float32 and
    half precision linf and l1 are bit-equal on every backend, layout and thread count. l2 is so except for about
    one sample in ten million: there the last bits of its sums, which depend on their order, decide how a float32
    number that all its elements share is rounded. In float32, ``||result - x||`` exceeds eps by at most 1e-5 of
    it, plus the rounding of each element of the result (half a unit in the last place, 3e-8 just below 1). In
    half precision the result is rounded to the nearest number of the dtype, and can leave the ball by that
    rounding.

    Args:
        adv: the current point [B, ...], any dense layout.
        grad: gradient of the loss to be raised, [B, ...]; its dtype may differ from ``adv``'s.
        x: centre of the ball [B, ...], in ``adv``'s dtype.
        eps: radius, in the units of ``x``; a number or a tensor [B]. In linf also a tensor per channel, for images
            [B, C, H, W] of shape [C, 1, 1], [1, C, 1, 1] or [B, C, 1, 1].
        alpha: step size, in the units of ``x``; as ``eps``. In l1 it is the length of the whole step, not of its
            elements.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``, also as "Linf", "L2", np.inf, 2 and the like.
        bounds: lowest and highest allowed value; ``x`` should lie within, else clipping can leave the ball. In
            linf each may be a tensor, as ``eps``.
        sparsity: the share of elements that an l1 step leaves alone, 0 <= sparsity < 1; other norms ignore it.
        active: bool [B]; where False the sample is returned as it is in ``adv``, and its elements of ``grad``
            and ``x`` do not matter. None is all True.

    Returns:
        The next point [B, ...] in ``adv``'s dtype and layout. It carries no gradient.

    Raises:
        TypeError: a tensor is not floating point, ``x`` has another dtype than ``adv``, eps, alpha or sparsity is
            no number, or ``active`` is no bool tensor.
        ValueError: shapes or devices differ, eps or alpha is negative or not finite, unknown norm, bounds
            in the wrong order, a tensor per channel in l2 or l1, sparsity out of range.
    """
    name, arguments = _checked(adv, grad, x, eps, alpha, norm, bounds, sparsity, active)
    return call(name, adv.detach(), *arguments)


def pgd_step_(
    adv: Tensor,
    grad: Tensor,
    x: Tensor,
    eps: float | Tensor,
    alpha: float | Tensor,
    norm: str = "linf",
    bounds: Bounds = (0.0, 1.0),
    *,
    sparsity: float = 0.95,
    active: Tensor | None = None,
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
        sparsity: as in `pgd_step`.
        active: as in `pgd_step`; where False the sample stays as it is.
        counts: int64 tensor [2] to which the numbers of gradient elements of the active samples that are zero, and
            that are NaN or infinite, are added. A large share of zeros is a sign of gradient masking.

    Returns:
        ``adv``.

    Raises:
        RuntimeError: ``adv`` requires grad, or its elements overlap in memory.
        TypeError: as in `pgd_step`, or ``counts`` is no tensor.
        ValueError: as in `pgd_step`, or ``counts`` is not a contiguous int64 tensor [2] on the device of ``adv``.
    """
    name, arguments = _checked(adv, grad, x, eps, alpha, norm, bounds, sparsity, active)
    checks.check_written("adv", adv)
    if counts is not None:
        _check_counts(counts, adv)
    elif torch.autograd.graph._allow_mutation_on_saved_tensors_enabled:
        # Inside that context of torch an op fails if a tensor that it may write is None.
        counts = adv.new_zeros(2, dtype=torch.int64)
    call(f"{name}_", adv, *arguments, counts)
    # A graph that has saved the tensor overwritten here must not be run backward.
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
    bounds: Bounds,
    sparsity: float,
    active: Tensor | None,
) -> tuple[str, tuple[Any, ...]]:
    """The op to call, and its arguments from ``grad`` on."""
    for name, value in (("adv", adv), ("grad", grad), ("x", x)):
        checks.check_float(name, value)
    checks.check_same_shape("grad", grad, "adv", adv)
    checks.check_same_shape("x", x, "adv", adv)
    if x.dtype != adv.dtype:
        raise TypeError(f"x must have the dtype of adv, {adv.dtype}, got {x.dtype}")
    norm = checks.norm_name(norm)
    sparsity = checks.number("sparsity", sparsity)
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    checks.check_active(active, adv)
    if varies_by_channel(eps, alpha, bounds, adv):
        limits = channel_limits(eps, alpha, bounds, norm, adv)
        return "pgd_step_per_channel", (grad.detach(), x.detach(), limits, active)
    low, high = checks.check_bounds(bounds)
    eps_number, eps_tensor = checks.per_sample("eps", eps, adv)
    alpha_number, alpha_tensor = checks.per_sample("alpha", alpha, adv)
    values = (eps_number, alpha_number, eps_tensor, alpha_tensor)
    numbers = Numbers(*values, norm, low, high, sparsity, active)
    return "pgd_step", (grad.detach(), x.detach(), *numbers)
