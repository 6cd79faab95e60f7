"""Errors of models that do not accept channels-last images, with advice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastadv.engine.engines import Model
from fastadv.engine.frozen import frozen
from fastadv.engine.live_engines import as_model_takes

_CHANNELS = (1, 3, 4)  # of images that people keep with the channels last


@contextmanager
def naming_layout(name: str, model: Model, x: Tensor) -> Iterator[None]:
    """Let the error of a model that is given images [B, H, W, C] and takes [B, C, H, W] say so.

    Nothing is refused that the model takes: only after an error is it asked for its logits, of the images as they
    are and of those with the channels moved.

    Args:
        name: the caller's name for the images.
        model: the model that may fail.
        x: its images.

    Raises:
        ValueError: the model fails on these images and would take them with the channels moved.
    """
    try:
        yield
    except Exception as error:
        if not _looks_channels_last(x) or _takes(model, x):
            raise
        if not _takes(model, x.permute(0, 3, 1, 2)):
            raise
        raise ValueError(
            f"{name} must be images [B, C, H, W], got shape {tuple(x.shape)}, which looks like [B, H, W, C] and "
            f"which the model refuses; pass {name}.permute(0, 3, 1, 2)"
        ) from error


def _looks_channels_last(x: object) -> bool:
    return (
        isinstance(x, Tensor)
        and x.dim() == 4
        and x.shape[3] in _CHANNELS
        and x.shape[1] not in _CHANNELS
    )


def _takes(model: Model, x: Tensor) -> bool:
    """Whether a model has logits of images."""
    try:
        with frozen(model), torch.no_grad():
            logits = model(as_model_takes(model, x.detach()).clone())
    except Exception:
        return False
    return isinstance(logits, Tensor) and logits.dim() == 2
