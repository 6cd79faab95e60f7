"""Detecting changes of a model, by its weights and by its logits for a few images.

A hash of weights alone does not see changes of the forward method, of hooks and attributes, of tensors that are
not buffers, and of networks that are not submodules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastadv.engine.content import content
from fastadv.evaluation.context import Model, device_of, private_generators
from fastadv.evaluation.samples import Samples
from fastadv.evaluation.verify import logits_of

_PROBED = 8  # number of images
_ROUNDING = 1e-3  # allowed difference, relative to the largest logit


def probe_logits(model: Model, samples: Samples) -> Tensor | None:
    """The logits of the first few images.

    Args:
        model: the model, in evaluation mode.
        samples: the images.

    Returns:
        [B, classes] float32 on the CPU; None for a model that raises, or whose logits differ in a second pass.
    """
    try:
        x, _ = samples.take(
            torch.arange(min(len(samples), _PROBED), device="cpu"), device_of(model)
        )
        found = []
        for _ in range(2):
            with private_generators(0):
                found.append(logits_of(model, x.clone()).float().cpu())
    except Exception:  # the evaluation itself reports the error
        return None
    return found[0] if are_alike(*found) else None


def are_alike(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether logits [B, classes] are the same up to the rounding of another machine or number of threads."""
    if one is None or other is None or one.shape != other.shape:
        return False
    size = float(torch.maximum(one.abs(), other.abs()).max())
    return float((one - other).abs().max()) <= _ROUNDING * size


def contents_of(model: Model) -> tuple[Any, ...]:
    """A value that differs after parameters or buffers were changed, replaced, added or removed."""
    if not isinstance(model, nn.Module):
        return ()
    named = [*model.named_parameters(), *model.named_buffers()]
    names, tensors = [name for name, _ in named], [tensor for _, tensor in named]
    found = content(tensors)
    if found is None:  # on a GPU
        # torch's version counters do not see a write through ``tensor.data``, so sums are compared as well.
        versions = tuple((id(tensor), tensor.data_ptr(), tensor._version) for tensor in tensors)
        floats = (tensor.detach().double() for tensor in tensors if tensor.is_floating_point())
        sums = tuple(
            str(float(values.sum())) for values in floats
        )  # as text, so that NaN equals NaN
        found = (versions, sums)
    return (names, found)
