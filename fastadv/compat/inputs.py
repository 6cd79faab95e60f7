"""Checks of the images and labels of a call in `fastadv.compat`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastadv.ops.checks import one_hot_hint
from fastadv.ops.values import shown


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


def check_channels(x: Tensor, mean: Tensor) -> None:
    """Check that images [B, C, H, W] have as many channels as a normalisation, of which one number serves all.

    Raises:
        ValueError: if they have not.
    """
    if x.dim() > 1 and mean.numel() not in (1, x.shape[1]):
        raise ValueError(
            f"inputs must have {mean.numel()} channels, as the mean and std of set_normalization_used, got "
            f"{tuple(x.shape)}"
        )


def target_classes(found: Any, labels: Tensor, by_label: bool) -> Tensor:
    """Return the classes that an attack is to reach, in int64 on the device of the labels.

    Args:
        found: the result of the function that chooses them.
        labels: the labels of the images [B].
        by_label: whether the labels of the call are the targets themselves.

    Raises:
        TypeError: if they are no integers.
    """
    if found is None:
        raise TypeError("target_map_function must return the target classes [B], got None")
    targets = integer_labels(found).to(labels.device)
    if not by_label and targets.shape == labels.shape:
        same = int((targets == labels).sum())
        if same:
            warnings.warn(
                f"target_map_function returned the label itself for {same} of {len(labels)} images; an attack "
                "towards the label makes the model's prediction right, and not wrong",
                stacklevel=4,
            )
    return targets


def integer_labels(labels: Tensor | np.ndarray[Any, Any] | Sequence[int]) -> Tensor:
    """Return labels of any integer width in int64.

    Raises:
        TypeError: if the labels are no integers.
    """
    try:
        found = (
            labels
            if isinstance(labels, Tensor)
            else torch.as_tensor(np.asarray(labels), device="cpu")
        )
    except (TypeError, ValueError) as error:  # text, a mapping, lists of several lengths
        raise TypeError(f"labels must be integers, got {shown(labels)}") from error
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise TypeError(
            f"labels must be integers, got {found.dtype}{one_hot_hint('labels', found)}"
        )
    return found.to(torch.int64)
