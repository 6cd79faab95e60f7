"""Training objectives on logits and features.

All are means over the batch unless `reduction="none"`, which returns one value per sample. They are
computed in at least float32, whatever the dtype of their inputs.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastadv.ops.angular_distance import angular_distance

Reduction = Literal["mean", "none"]


def cross_entropy(logits: Tensor, y: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Cross-entropy of logits in any floating-point dtype.

    Args:
        logits: [B, K].
        y: labels [B], int64.
        reduction: "mean" over the batch or "none".

    Returns:
        A scalar, or [B] with reduction "none".

    Raises:
        TypeError: if the logits are not floating point.
        ValueError: if shapes do not agree or the reduction is unknown.
    """
    _check_logits("logits", logits, y)
    return _reduce(F.cross_entropy(_at_least_float32(logits), y, reduction="none"), reduction)


class ArrestTerms(NamedTuple):
    """The two terms of ARREST's objective for each sample.

    Attributes:
        cross_entropy: [B].
        distance: angular distance of the features [B], not yet weighted.
    """

    cross_entropy: Tensor
    distance: Tensor


def arrest_terms(
    adv_logits: Tensor, y: Tensor, adv_features: Tensor, teacher_features: Tensor
) -> ArrestTerms:
    """Return the terms of `arrest` one by one, for logging; the arguments are the same."""
    return ArrestTerms(
        cross_entropy(adv_logits, y, reduction="none"),
        angular_distance(adv_features, teacher_features.detach()),
    )


def arrest(
    adv_logits: Tensor,
    y: Tensor,
    adv_features: Tensor,
    teacher_features: Tensor,
    lam: float,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """ARREST's objective: cross-entropy plus representation-guided knowledge distillation.

    `CE(f(x'), y) + lam * (1 - |h(x').h_std(x)| / (|h(x')| |h_std(x)|))`.

    Source: ARREST, equations 3 and 4.

    Args:
        adv_logits: f(x'), logits of the attacked (or replayed) images [B, K].
        y: labels [B], int64.
        adv_features: h(x'), the same images' features [B, ...].
        teacher_features: h_std(x), the frozen standard model's features of the clean images
            [B, ...]; no gradient flows to them.
        lam: weight of the distillation; 50 in the paper.
        reduction: "mean" over the batch or "none".

    Returns:
        A scalar, or [B] with reduction "none".

    Raises:
        TypeError: if a tensor is not floating point.
        ValueError: if shapes do not agree or the reduction is unknown.
    """
    terms = arrest_terms(adv_logits, y, adv_features, teacher_features)
    return _reduce(terms.cross_entropy + lam * terms.distance, reduction)


def _reduce(values: Tensor, reduction: Reduction) -> Tensor:
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    return values.mean() if reduction == "mean" else values


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _check_logits(name: str, logits: Tensor, y: Tensor) -> None:
    if not logits.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {logits.dtype}")
    if logits.dim() != 2 or y.shape != logits.shape[:1]:
        raise ValueError(
            f"{name} must be [B, K] and y [B], got {tuple(logits.shape)} and {tuple(y.shape)}"
        )
