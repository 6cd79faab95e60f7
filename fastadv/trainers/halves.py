"""Checks that a model whose halves a method runs computes the same as these halves, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fastadv.engine.compiled_parts import has_compiled_parts
from fastadv.engine.frozen import frozen
from fastadv.models.split import Halves, refuse_other_halves, without_normalization

# By the model's name in messages: the model, and the function by which a method gets logits from its halves.
UsedHalves: TypeAlias = Mapping[str, tuple[nn.Module, Halves]]
_IMAGES = 2


def are_maps(model: nn.Module, features: Tensor) -> bool:
    """Whether the features before a model's pooling are maps [B, C, H, W].

    Transformers have tokens [B, N, C], and some networks of timm maps [B, H, W, C].
    """
    width = getattr(without_normalization(model), "num_features", None)
    return features.dim() == 4 and width in (None, features.shape[1])


def check_halves(method: str, used: UsedHalves, x: Tensor) -> None:
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
        refuse_other_halves(name, model, partial(_logits, model, x), method, halves)


def _logits(model: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
    """The logits of some images, in evaluation mode and float32. Nothing is compiled for this one pass."""
    compiled = has_compiled_parts(model)
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    wide = torch.autocast(x.device.type, enabled=False)
    with eager, wide, frozen(model, seed=0), torch.no_grad():
        return call(x[:_IMAGES])
