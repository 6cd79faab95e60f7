"""Soft labels: for each image a probability of each class, as in mixup and distillation."""

from __future__ import annotations

import torch
from torch import Tensor

SUM_WITHIN = 1e-3  # largest difference of an image's sum of probabilities from 1; half precision has such sums


def is_soft(y: object) -> bool:
    """Whether labels are soft: floating point [B, C], in place of class indices [B]."""
    return isinstance(y, Tensor) and y.is_floating_point() and y.dim() == 2


def hard(y: Tensor) -> Tensor:
    """Return class indices [B]: the likeliest classes of soft labels, or the labels themselves."""
    return y.argmax(1) if is_soft(y) else y


def soft_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """``-sum_k y_k log p_k`` of each sample, [B].

    Args:
        logits: [B, C].
        y: soft labels [B, C].
    """
    return -(y.to(logits.dtype) * logits.log_softmax(1)).sum(1)


def soft_divergence(logits: Tensor, y: Tensor) -> Tensor:
    """KL(y || softmax(logits)) of each sample, [B]: the cross-entropy less the entropy of ``y``."""
    y = y.to(logits.dtype)
    return soft_cross_entropy(logits, y) + torch.special.xlogy(y, y).sum(1)


def are_probabilities(logits: Tensor) -> bool:
    """Whether a model's results [B, C] are likely the output of a softmax, in place of logits."""
    apart = 8 * torch.finfo(torch.bfloat16).eps  # passes in bfloat16 round each probability
    least, away = torch.stack((logits.amin(), (logits.sum(1) - 1).abs().amax())).tolist()
    return bool(least >= 0 and away <= apart)


def check_soft_labels(y: Tensor, batch: int, obstacle: str | None) -> Tensor:
    """Check the shape of soft labels, and that the attack takes them.

    Args:
        y: soft labels.
        batch: number of images, B.
        obstacle: the reason why the attack accepts only class indices; None if it accepts soft labels.

    Raises:
        ValueError: if the attack does not accept them, or their number differs from the number of images.
    """
    if obstacle is not None:
        raise ValueError(
            f"y must hold class indices [B] {obstacle}, got soft labels of shape {tuple(y.shape)}; "
            "of one-hot labels pass y.argmax(1)"
        )
    if y.shape[0] != batch:
        raise ValueError(f"y must have shape ({batch}, classes), got {tuple(y.shape)}")
    return y.detach() if y.dtype in (torch.float32, torch.float64) else y.detach().float()


def check_probabilities(y: Tensor, num_classes: int) -> None:
    """Check the values of soft labels; on a GPU this waits for the device once.

    Raises:
        ValueError: if their number of classes differs from the model's, if a probability is negative or not
            finite, or if the probabilities of an image do not add up to 1.
    """
    if y.shape[1] != num_classes:
        raise ValueError(
            f"y must have shape ({y.shape[0]}, {num_classes}), a probability of each of the model's classes, "
            f"got {tuple(y.shape)}"
        )
    least, apart = torch.stack((y.amin(), (y.sum(1) - 1).abs().amax())).tolist()
    if not (least >= 0 and apart <= SUM_WITHIN):  # also where one of them is NaN
        raise ValueError(
            "y must hold probabilities >= 0 that add up to 1 in each row, got a smallest one of "
            f"{least:.4g} and a sum that is {apart:.4g} away from 1"
        )
