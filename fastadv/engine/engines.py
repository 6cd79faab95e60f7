"""The base of the engines, which compute logits and input gradients of one model.

An engine is prepared once for a model and used for many batches. ``session()`` brings the weights up to date
and holds the model still; inside it ``logits`` and ``gradient`` are called as often as the attack needs. Engines
run the live model (`fastadv.engine.live_engines`) or a copy of it (`fastadv.engine.copy_engines`). Which engine
serves, and whether it still agrees with the model, is decided in `fastadv.engine.selection`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastadv.engine.cuda_graph import GraphCache

Model = nn.Module | Callable[[Tensor], Tensor]
ValueOfLogits = Callable[[Tensor], Tensor]  # logits [B, C] -> [B] or scalar, to be raised


@dataclass(frozen=True)
class InputGradient:
    """The result of one backward pass: value [B] or scalar, logits [B, C] and the input gradient [B, ...]."""

    value: Tensor
    logits: Tensor
    grad: Tensor


class Engine(ABC):
    """Computes logits and input gradients of one model."""

    name: str
    precision: str  # of the network's passes
    reason: str  # why this engine was chosen
    graphs: GraphCache | None = None  # recorded attacks, where there may be some
    proof_seconds = 0.0  # of the shorter proof of an unchanged model, where it was first made
    # The passes draw no random numbers, and are the same for every number of images.
    any_batch = True
    _narrow_range = False  # computes in float16

    @abstractmethod
    def session(
        self, model: Model, seed: int, current: bool = False
    ) -> AbstractContextManager[None]:
        """A context in which the model's weights are current and it is held still.

        Args:
            model: the live model the engine was made for.
            seed: seed of the random numbers that the model draws.
            current: whether the engine has the model's weights already, as after `EngineCache.ready`.
        """

    def _forward(self, x: Tensor) -> Tensor:
        """Logits of a batch, differentiable in ``x``; called inside a session."""
        raise NotImplementedError

    def images(self, x: Tensor) -> Tensor:
        """The images in the dtype and layout in which the attack moves them; ``x`` itself if they fit."""
        return x if x.dtype in (torch.float32, torch.float64) else x.float()

    def logits(self, x: Tensor) -> Tensor:
        """Logits [B, C] without gradient."""
        with torch.no_grad():
            logits = self._forward(x)
        check_logits(logits, x.shape[0])
        return logits

    def gradient(self, x: Tensor, value_of: ValueOfLogits) -> InputGradient:
        """Value, logits and the gradient of the summed value with respect to ``x``.

        In fp16 each sample's gradient comes out scaled by a positive number of its own; the steps of
        attacks depend on its direction alone.
        """
        try:
            return self._differentiated(x, value_of, torch.autograd.grad)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
        return self._differentiated(x, value_of, _by_backward)

    def _differentiated(
        self, x: Tensor, value_of: ValueOfLogits, differentiate: Callable[..., Any]
    ) -> InputGradient:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            logits = self._forward(leaf)
            check_logits(logits, x.shape[0])
            check_gradient(logits.requires_grad)
            if self._narrow_range:
                value, at_logits = gradient_at_logits(logits, value_of)
                at_logits = enlarged(at_logits).to(logits.dtype)
                found = differentiate(logits, leaf, at_logits, allow_unused=True)
            else:
                value = value_of(logits)
                found = differentiate(value.sum(), leaf, allow_unused=True)
        check_gradient(found[0] is not None)
        return InputGradient(value.detach(), logits.detach(), found[0])


def _by_backward(
    output: Tensor, leaf: Tensor, at: Tensor | None = None, allow_unused: bool = True
) -> tuple[Tensor | None]:
    """Compute `torch.autograd.grad` by `backward`, for models whose reentrant checkpointing refuses that function.

    The model is frozen, so that no gradient is left in its parameters.
    """
    output.backward(at)
    return (leaf.grad,)


def check_logits(logits: object, batch: int) -> None:
    """Check the model's result.

    Raises:
        TypeError: if it is no tensor, or holds complex numbers.
        ValueError: if its shape is not [B, classes].
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"model must return a tensor of logits, got {type(logits).__name__}")
    if logits.is_complex():
        raise TypeError(f"model must return real logits, got {logits.dtype}")
    if logits.dim() != 2 or logits.shape[0] != batch or logits.shape[1] < 2:
        raise ValueError(
            f"model must return logits of shape ({batch}, classes) with at least 2 classes, "
            f"got {tuple(logits.shape)}"
        )


def gradient_at_logits(output: Tensor, value_of: ValueOfLogits) -> tuple[Tensor, Tensor]:
    """The value, and the gradient of its sum at the logits [B, C] float32.

    Values that know their gradient by a formula have a method `value_and_gradient`, which saves autograd's time.
    """
    by_formula = getattr(value_of, "value_and_gradient", None)
    if by_formula is not None:
        with torch.no_grad():
            found: tuple[Tensor, Tensor] = by_formula(output.detach().float())
        return found
    with torch.enable_grad():
        # A copy: the loss may keep it, write to it, or attack the same network, whose passes overwrite the output.
        logits = output.detach().to(torch.float32, copy=True).requires_grad_()
        value = value_of(logits)
        (at_logits,) = torch.autograd.grad(value.sum(), logits)
    return value.detach(), at_logits


def enlarged(at_logits: Tensor) -> Tensor:
    """Each sample's gradient [C] scaled to a largest entry of 1.

    Confident samples have gradients that float16 would round to 0.
    """
    largest = at_logits.abs().amax(1, keepdim=True)
    return torch.where(largest > 0, at_logits / largest, 0.0)


def check_gradient(found: bool) -> None:
    """Check that the model's logits have a gradient with respect to the images.

    Raises:
        ValueError: if they have none.
    """
    if not found:
        raise ValueError(
            "model must return logits with a gradient in x, got logits without one; does its "
            "forward detach them or run under torch.no_grad?"
        )


def channels_last(x: Tensor) -> Tensor:
    """Return images [B, C, H, W] in channels-last memory; tensors with other axes unchanged."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
