"""A model's weights, and its logits for a few images: with both every change of its function shows.

A hash of weights alone does not see a change of the forward method, nor hooks, attributes, tensors that are no
buffers, and networks that are no submodules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastadv.engine.content import content
from fastadv.evaluation.context import Model, device_of, private_generators
from fastadv.evaluation.samples import Samples
from fastadv.evaluation.verify import logits_of

_ASKED = 8  # images
_ROUNDING = 1e-3  # of the largest logit


def answers_of(model: Model, samples: Samples) -> Tensor | None:
    """The logits of the first few images.

    Args:
        model: in evaluation mode.
        samples: the images.

    Returns:
        [B, classes] float32 on the CPU; None for a model that fails, or answers otherwise when it is asked again.
    """
    try:
        x, _ = samples.take(torch.arange(min(len(samples), _ASKED), device="cpu"), device_of(model))
        found = []
        for _ in range(2):
            with private_generators(0):
                found.append(logits_of(model, x.clone()).float().cpu())
    except Exception:  # the evaluation itself is to report the error
        return None
    return found[0] if are_alike(*found) else None


def are_alike(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether logits [B, classes] are the same up to the rounding of another machine or number of threads."""
    if one is None or other is None or one.shape != other.shape:
        return False
    size = float(torch.maximum(one.abs(), other.abs()).max())
    return float((one - other).abs().max()) <= _ROUNDING * size


def contents_of(model: Model) -> tuple[Any, ...]:
    """A value that differs once parameters or buffers have been changed, exchanged, added or taken away."""
    if not isinstance(model, nn.Module):
        return ()
    named = [*model.named_parameters(), *model.named_buffers()]
    names, tensors = [name for name, _ in named], [tensor for _, tensor in named]
    found = content(tensors)
    if found is None:  # on a GPU
        # torch's counters do not see a write through ``tensor.data``, so the sums are compared, too.
        versions = tuple((id(tensor), tensor.data_ptr(), tensor._version) for tensor in tensors)
        floats = (t.detach().double() for t in tensors if t.is_floating_point())
        sums = tuple(str(float(t.sum())) for t in floats)  # as text NaN equals NaN
        found = (versions, sums)
    return (names, found)
