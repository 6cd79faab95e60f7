"""What the objectives share: reductions and dtypes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastadv.ops import checks
from fastadv.ops.softmax_losses import REDUCTIONS

Reduction = Literal["mean", "none"]


def reduced(values: Tensor, reduction: Reduction) -> Tensor:
    """Values [B] as they are, or their mean."""
    checks.check_choice("reduction", reduction, REDUCTIONS)
    return values.mean() if reduction == "mean" else values


def at_least_float32(values: Tensor) -> Tensor:
    """The values in the dtype of computation."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
