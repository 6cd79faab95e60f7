"""Checks that a model whose halves a method runs computes the same as these halves, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from fastadv.engine.compiled_parts import has_compiled_parts
from fastadv.engine.frozen import frozen
from fastadv.models.split import without_normalization

# By the model's name in messages: the model, and the function by which a method gets logits from its halves.
Halves: TypeAlias = Mapping[str, tuple[nn.Module, Callable[[Any, Tensor], Tensor]]]
_IMAGES = 2
_LARGEST = 1e-3  # relative difference; in float32 both ways round much less


def logits_of_halves(model: nn.Module, x: Tensor) -> Tensor:
    """Return the logits [B, K] of images [B, C, H, W] by the two halves of a model with the feature split."""
    split = cast(Any, model)
    return cast(Tensor, split.forward_head(split.forward_features(x)))


def are_maps(model: nn.Module, features: Tensor) -> bool:
    """Whether the features before a model's pooling are maps [B, C, H, W].

    Transformers have tokens [B, N, C], and some networks of timm maps [B, H, W, C].
    """
    width = getattr(without_normalization(model), "num_features", None)
    return features.dim() == 4 and width in (None, features.shape[1])


def check_halves(method: str, used: Halves, x: Tensor) -> None:
    """Check that models give the same logits as their halves.

    Attacks and evaluations call a model. A method on features calls its halves, which pass by the code of the
    model's own `forward` and by its hooks. A normalisation there would be missing in training alone.

    Args:
        method: the method's name, for messages.
        used: the models whose halves the method runs.
        x: images [B, C, H, W], of which some are used.

    Raises:
        ValueError: if a model and its halves differ. Models whose logits differ from pass to pass are left out.
    """
    for name, (model, halves) in used.items():
        whole, parts = _logits(model, model, x), _logits(model, partial(halves, model), x)
        apart = _difference(whole, parts)
        if apart <= _LARGEST or _difference(whole, _logits(model, model, x)) > 0:
            continue
        raise ValueError(
            f"{name} must compute forward_head(forward_features(x)), which {method} trains with, got a "
            f"{type(model).__name__} whose logits differ from that by {100 * apart:.2g} %: its own forward or a "
            "hook does more, such as a normalisation. Do it in forward_features, or wrap the network in "
            "fastadv.models.Normalized"
        )


def _logits(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The logits in evaluation mode and float32, in float64. Nothing is compiled for this one pass."""
    compiled = has_compiled_parts(model)
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    wide = torch.autocast(x.device.type, enabled=False)
    with eager, wide, frozen(model, seed=0), torch.no_grad():
        return call(x[:_IMAGES]).double()


def _difference(a: Tensor, b: Tensor) -> float:
    """The size of a - b in proportion to a; infinite for other shapes."""
    if a.shape != b.shape:
        return float("inf")
    return float((a - b).norm() / a.norm().clamp_min(torch.finfo(torch.float32).tiny))
