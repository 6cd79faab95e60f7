"""Checks of the images and labels of a call in `fastadv.compat`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastadv.ops.checks import one_hot_hint


def check_normalised(x: Tensor) -> None:
    """Check that images [B, C, H, W], after the normalisation was undone, are in 0..1.

    Raises:
        ValueError: if a value is more than half a grey level outside 0..1.
    """
    slack = max(8 * torch.finfo(x.dtype).eps, 0.5 / 255)
    if x.numel() and not (-slack <= x.min() and x.max() <= 1 + slack):  # also where one is NaN
        raise ValueError(
            "inputs must be normalised by the mean and std of set_normalization_used; without the normalisation "
            f"their values go from {float(x.min()):.4g} to {float(x.max()):.4g}, and not from 0 to 1"
        )


def integer_labels(labels: Tensor | np.ndarray[Any, Any] | Sequence[int]) -> Tensor:
    """Return labels of any integer width in int64.

    Raises:
        TypeError: if the labels are no integers.
    """
    found = (
        labels if isinstance(labels, Tensor) else torch.as_tensor(np.asarray(labels), device="cpu")
    )
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise TypeError(
            f"labels must be integers, got {found.dtype}{one_hot_hint('labels', found)}"
        )
    return found.to(torch.int64)
