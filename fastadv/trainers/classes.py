"""The check, before the first iteration, that a model has a logit for every class of the data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastadv.data import ImageData, Splits
from fastadv.engine.frozen import frozen


def check_classes(
    model: nn.Module, splits: Splits, device: torch.device, dtype: torch.dtype | None
) -> None:
    """Check, by a pass over two images, that a model has a logit for every class of the training and test images.

    Args:
        model: the model to be trained, on its device.
        splits: the data.
        device: the model's device.
        dtype: dtype of autocast in training; None is float32.

    Raises:
        ValueError: if the model has fewer logits than classes, or its result does not have the shape [B, classes].
    """
    train, test = splits.train, splits.test
    seen = test if len(test) or not isinstance(train, ImageData) else train
    x = seen.images[:2].to(device, torch.float32) / 255
    if not len(x):
        return
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
    with frozen(model, seed=0), torch.no_grad(), autocast:
        logits = model(x)
    if not (isinstance(logits, Tensor) and logits.dim() == 2 and len(logits) == len(x)):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model must return logits of shape ({len(x)}, classes), got {found}")
    for data in (train, test):
        if data.num_classes > logits.shape[1]:
            raise ValueError(
                f"model must have the {data.num_classes} classes of {data.name!r}, got {logits.shape[1]} logits"
            )
