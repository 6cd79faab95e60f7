"""The common parts of the losses: reduction over the batch, checks of pairs of tensors, and dtypes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastadv.ops import checks
from fastadv.ops.softmax_losses import REDUCTIONS

Reduction = Literal["mean", "none"]


def reduced(values: Tensor, reduction: Reduction) -> Tensor:
    """The mean of values [B], or the values as they are for "none"."""
    checks.check_choice("reduction", reduction, REDUCTIONS)
    return values.mean() if reduction == "mean" else values


def check_pair(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Require two floating-point tensors of one shape on one device, under the names that the caller knows.

    Raises:
        TypeError: one is no tensor, or of another dtype.
        ValueError: their shapes or devices differ.
    """
    checks.check_float(name, value)
    checks.check_float(other_name, other)
    checks.check_same_shape(other_name, other, name, value)


def at_least_float32(values: Tensor) -> Tensor:
    """The values in the dtype of computation."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
