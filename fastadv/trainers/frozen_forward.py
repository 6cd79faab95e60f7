"""The passes of frozen models in training: teachers and extractors, whose weights do not change during a run."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastadv.engine.errors import Unrecordable
from fastadv.engine.forward_copy import ForwardCopy, Output


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """Return a model's result for images [B, C, H, W], its logits [B, K]."""
    return cast(Tensor, model(x))


def features_of(model: nn.Module, x: Tensor) -> Tensor:
    """Return the map before pooling [B, C', H', W'] of a model with the feature split."""
    return cast(Tensor, cast(Any, model).forward_features(x))


class FrozenForward:
    """Computes one result of a frozen model, such as its logits.

    In a bfloat16 run a faster copy of the model computes it. The copy is made at the first call: see
    `ForwardCopy`. A model that cannot be copied, or whose copy computes something else, runs itself, with one
    warning that says why. In float32 the model always runs itself, so that the results are the same to the bit.

    Args:
        name: the model's name in messages.
        model: the model, in evaluation mode.
        output: the function of the model and the images that gives the result.
        dtype: dtype of the run's passes; None is float32.

    Attributes:
        reason: why the model runs itself; None if a copy runs, and before the first call.
    """

    def __init__(
        self, name: str, model: nn.Module, output: Output, dtype: torch.dtype | None
    ) -> None:
        self._name, self._model, self._output, self._dtype = name, model, output, dtype
        self._copy: ForwardCopy | None = None
        self.reason: str | None = None

    def is_of(self, model: nn.Module) -> bool:
        """Whether this computes a result of this model object."""
        return self._model is model

    def __call__(self, x: Tensor) -> Tensor:
        """Return the result for images [B, C, H, W]; called without gradients and under the run's autocast."""
        copy = self._ready(x)
        return self._output(self._model, x) if copy is None else copy(x)

    def _ready(self, x: Tensor) -> ForwardCopy | None:
        """The copy, made again if the model has changed; None if the model runs itself."""
        if self._dtype is None or self.reason is not None or x.shape[0] == 0:
            return None
        if any(module.training for module in self._model.modules()):
            return None
        if self._copy is None or not self._copy.is_current:
            try:
                self._copy = None  # frees its memory before the next copy is made
                self._copy = ForwardCopy(self._model, self._output, x, self._dtype)
            except Unrecordable as error:
                self.reason = str(error)
                warnings.warn(
                    f"fastadv runs the frozen model {self._name!r} as it is, not a faster copy: {error}",
                    stacklevel=2,
                )
        return self._copy if self._copy is not None and self._copy.serves(x) else None
