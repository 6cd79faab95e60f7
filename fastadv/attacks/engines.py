"""How an attack computes logits and input gradients: the live model, or a compiled copy of it.

An engine is prepared once for a model and used for many batches. ``session()`` brings the weights up to date and
holds the model still; inside it ``logits`` and ``gradient`` are called as often as the attack needs.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastadv.attacks.arguments import COMPUTE_DTYPES, check_logits
from fastadv.attacks.copy import AttackCopy, Untraceable
from fastadv.attacks.frozen import frozen
from fastadv.attacks.program import Program

Model = nn.Module | Callable[[Tensor], Tensor]
ValueOfLogits = Callable[[Tensor], Tensor]  # logits [B, C] -> [B] or scalar, to be raised


@dataclass(frozen=True)
class Gradient:
    """What one backward pass gives: value [B] or scalar, logits [B, C] and the input gradient [B, ...]."""

    value: Tensor
    logits: Tensor
    grad: Tensor


class Engine(ABC):
    """Computes logits and input gradients of one model."""

    name: str
    reason: str  # why this engine was chosen

    @abstractmethod
    def session(self, model: Model, seed: int) -> AbstractContextManager[None]:
        """A context in which the model's weights are current and it is held still.

        Args:
            model: the live model the engine was made for.
            seed: of random numbers that modules draw in train mode.
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

    def gradient(self, x: Tensor, value_of: ValueOfLogits) -> Gradient:
        """Value, logits and the gradient of the summed value with respect to ``x``."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            logits = self._forward(leaf)
            check_logits(logits, x.shape[0])
            value = value_of(logits)
            (grad,) = torch.autograd.grad(value.sum(), leaf)
        return Gradient(value.detach(), logits.detach(), grad)


class EagerEngine(Engine):
    """Runs the live model as it stands, frozen; in a narrow precision through autocast."""

    name = "eager"

    def __init__(self, precision: str, reason: str, train_mode: bool = False) -> None:
        self._dtype, self.reason = COMPUTE_DTYPES[precision], reason
        self._train_mode = train_mode
        self._model: Model | None = None

    @contextmanager
    def session(self, model: Model, seed: int) -> Iterator[None]:
        """Freeze the live model; it is as before on leaving."""
        self._model = (
            model  # held for the session only, so that a cached engine keeps no model alive
        )
        try:
            with frozen(model, train_mode=self._train_mode, seed=seed):
                yield
        finally:
            self._model = None

    def images(self, x: Tensor) -> Tensor:
        """As in `Engine.images`; channels-last for narrow convolutions."""
        images = super().images(x)
        return _channels_last(images) if self._dtype != torch.float32 else images

    def _forward(self, x: Tensor) -> Tensor:
        assert self._model is not None
        if self._dtype == torch.float32:
            return self._model(x)
        with torch.autocast(x.device.type, self._dtype):
            return self._model(x)


class CopyEngine(Engine):
    """Runs the attack copy under autograd, on a GPU compiled by ``torch.compile``."""

    name = "compiled"

    def __init__(self, model: nn.Module, precision: str, reason: str, inductor: bool) -> None:
        self._copy = AttackCopy(model, COMPUTE_DTYPES[precision])
        self._run: Callable[[Tensor], Tensor] = (
            torch.compile(self._copy) if inductor else self._copy
        )
        self.reason = reason

    @contextmanager
    def session(self, model: Model, seed: int) -> Iterator[None]:
        """Bring the live weights over."""
        assert isinstance(model, nn.Module)
        self._copy.refresh(model)
        yield

    def images(self, x: Tensor) -> Tensor:
        """As in `Engine.images`, channels-last."""
        return _channels_last(super().images(x))

    def _forward(self, x: Tensor) -> Tensor:
        return self._run(x)


class ProgramEngine(Engine):
    """Runs the attack copy as a program of fused steps: bfloat16 on the CPU."""

    name = "compiled"

    def __init__(self, model: nn.Module, reason: str) -> None:
        self._copy = AttackCopy(model, torch.bfloat16, pack=True)
        self._program = Program(self._copy)
        self.reason = reason

    @contextmanager
    def session(self, model: Model, seed: int) -> Iterator[None]:
        """Bring the live weights over."""
        assert isinstance(model, nn.Module)
        self._copy.refresh(model)
        yield

    def images(self, x: Tensor) -> Tensor:
        """As in `Engine.images`, channels-last."""
        return _channels_last(super().images(x))

    def logits(self, x: Tensor) -> Tensor:
        """Logits [B, C] without gradient."""
        logits, _ = self._program.forward(x)
        check_logits(logits, x.shape[0])
        return logits.float()

    def gradient(self, x: Tensor, value_of: ValueOfLogits) -> Gradient:
        """As in `Engine.gradient`; ``grad`` is bfloat16 and valid until the engine's next call."""
        output, run = self._program.forward(x)
        with torch.enable_grad():
            logits = output.float().requires_grad_()
            check_logits(logits, x.shape[0])
            value = value_of(logits)
            (at_logits,) = torch.autograd.grad(value.sum(), logits)
        return Gradient(value.detach(), logits.detach(), self._program.backward(run, at_logits))


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return False


def resolve_precision(precision: str, model: object, x: Tensor) -> str:
    """The precision that ``"auto"`` stands for: bf16 for modules where the hardware has it."""
    if precision != "auto":
        return precision
    narrow = isinstance(model, nn.Module) and x.dtype != torch.float64 and fast_bf16(x.device)
    return "bf16" if narrow else "fp32"


def make_engine(
    model: Model, device: torch.device, precision: str, engine: str, train_mode: bool
) -> Engine:
    """Build the engine for a model.

    Args:
        model: the live model, or any callable.
        device: where model and images are.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        engine: the engine asked for, or ``"auto"``.
        train_mode: attack in train mode.

    Raises:
        ValueError: the engine asked for cannot run this model; the message says why.
    """
    if engine == "eager":
        return EagerEngine(precision, "asked for", train_mode)
    obstacle = _obstacle(model, train_mode)
    if engine == "auto" and obstacle is None and precision == "fp32":
        return EagerEngine(precision, "in fp32 the model's own operations run, bit for bit")
    if obstacle is None and isinstance(model, nn.Module):
        reason = "asked for" if engine != "auto" else "the model can be copied"
        try:
            if device.type == "cpu" and precision == "bf16":
                return ProgramEngine(model, reason)
            inductor = device.type == "cuda" and engine == "compiled"
            return CopyEngine(model, precision, reason, inductor)
        except Untraceable as error:
            obstacle = str(error)
    if engine != "auto":
        raise ValueError(
            f"engine must be 'eager' or 'auto' for this model, got {engine!r}: {obstacle}"
        )
    warnings.warn(f"fastadv attacks this model with the eager engine: {obstacle}", stacklevel=4)
    return EagerEngine(precision, f"{obstacle}", train_mode)


def _obstacle(model: Model, train_mode: bool) -> str | None:
    """Why no copy of the model can be attacked; None when tracing will tell."""
    if train_mode:
        return "train mode needs the live model"
    return None if isinstance(model, nn.Module) else "it is a plain callable"
