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

from fastadv.engine.copy import AttackCopy
from fastadv.engine.cpu_program import Program
from fastadv.engine.cuda_graph import CudaRecorder, GraphCache
from fastadv.engine.frozen import frozen
from fastadv.engine.precision import COMPUTE_DTYPES
from fastadv.engine.tracing import Untraceable, stand_in
from fastadv.float32 import full_float32

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
    graphs: GraphCache | None = None  # recorded attacks, where there may be some
    _narrow_range = False  # computes in float16

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
        """Value, logits and the gradient of the summed value with respect to ``x``.

        In fp16 each sample's gradient comes out scaled by a positive number of its own; the steps of
        attacks depend on its direction alone.
        """
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            logits = self._forward(leaf)
            check_logits(logits, x.shape[0])
            _check_gradient(logits.requires_grad)
            if self._narrow_range:
                value, at_logits = _at_logits(logits, value_of)
                # Confident samples have gradients that float16 would round to 0.
                largest = at_logits.abs().amax(1, keepdim=True)
                at_logits = torch.where(largest > 0, at_logits / largest, 0.0).to(logits.dtype)
                found = torch.autograd.grad(logits, leaf, at_logits, allow_unused=True)
            else:
                value = value_of(logits)
                found = torch.autograd.grad(value.sum(), leaf, allow_unused=True)
        _check_gradient(found[0] is not None)
        return Gradient(value.detach(), logits.detach(), found[0])


def check_logits(logits: object, batch: int) -> None:
    """Check what the model returned.

    Raises:
        TypeError: no tensor.
        ValueError: not of shape [B, classes].
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"model must return a tensor of logits, got {type(logits).__name__}")
    if logits.dim() != 2 or logits.shape[0] != batch or logits.shape[1] < 2:
        raise ValueError(
            f"model must return logits of shape ({batch}, classes) with at least 2 classes, "
            f"got {tuple(logits.shape)}"
        )


def _at_logits(output: Tensor, value_of: ValueOfLogits) -> tuple[Tensor, Tensor]:
    """The value, and the gradient of its sum at the logits [B, C] float32."""
    with torch.enable_grad():
        logits = output.detach().float().requires_grad_()
        value = value_of(logits)
        (at_logits,) = torch.autograd.grad(value.sum(), logits)
    return value.detach(), at_logits


def _check_gradient(found: bool) -> None:
    if not found:
        raise ValueError(
            "model must return logits with a gradient in x, got logits without one; does its "
            "forward detach them or run under torch.no_grad?"
        )


class EagerEngine(Engine):
    """Runs the live model as it stands, frozen; in a narrow precision through autocast."""

    name = "eager"

    def __init__(self, precision: str, reason: str, train_mode: bool = False) -> None:
        self._dtype, self.reason = COMPUTE_DTYPES[precision], reason
        self._narrow_range = precision == "fp16"
        self._train_mode = train_mode
        self._model: Model | None = None

    @contextmanager
    def session(self, model: Model, seed: int) -> Iterator[None]:
        """Freeze the live model; it is as before on leaving."""
        # Held for the session only, so that a cached engine keeps no model alive.
        self._model = model
        try:
            with frozen(model, train_mode=self._train_mode, seed=seed):
                yield
        finally:
            self._model = None

    def _forward(self, x: Tensor) -> Tensor:
        assert self._model is not None
        if self._dtype == torch.float32:
            return self._model(x)
        with torch.autocast(x.device.type, self._dtype):
            return self._model(x)


class _OnACopy(Engine):
    """What the engines on an attack copy share."""

    name = "compiled"
    _copy: AttackCopy

    @contextmanager
    def session(self, model: Model, seed: int) -> Iterator[None]:
        """Bring the live weights over."""
        assert isinstance(model, nn.Module)
        self._copy.refresh(model)
        yield

    def images(self, x: Tensor) -> Tensor:
        """As in `Engine.images`, channels-last."""
        return _channels_last(super().images(x))


class CopyEngine(_OnACopy):
    """Runs the attack copy under autograd, on a GPU compiled by ``torch.compile``."""

    def __init__(self, model: nn.Module, precision: str, reason: str, inductor: bool) -> None:
        self._copy = AttackCopy(model, COMPUTE_DTYPES[precision])
        self._narrow_range = precision == "fp16"
        self._run: Callable[[Tensor], Tensor] = (
            torch.compile(self._copy) if inductor else self._copy
        )
        self.reason = reason

    def _forward(self, x: Tensor) -> Tensor:
        return self._run(x)


class ProgramEngine(_OnACopy):
    """Runs the attack copy as a program of fused steps: bfloat16 on the CPU."""

    def __init__(self, model: nn.Module, reason: str) -> None:
        self._copy = AttackCopy(model, torch.bfloat16, pack=True)
        self._program = Program(self._copy)
        self.reason = reason

    def logits(self, x: Tensor) -> Tensor:
        """Logits [B, C] without gradient."""
        logits, _ = self._program.forward(x)
        check_logits(logits, x.shape[0])
        return logits.float()

    def gradient(self, x: Tensor, value_of: ValueOfLogits) -> Gradient:
        """As in `Engine.gradient`; ``grad`` is bfloat16 and valid until the engine's next call."""
        output, run = self._program.forward(x)
        check_logits(output, x.shape[0])
        value, at_logits = _at_logits(output, value_of)
        grad = self._program.backward(run, at_logits)
        _check_gradient(grad is not None)
        assert grad is not None
        return Gradient(value, output.float(), grad)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def make_engine(
    model: Model, x: Tensor, precision: str, engine: str, train_mode: bool = False
) -> Engine:
    """Build the engine for a model.

    A copy is used only after it has been compared with the live model on two of the images.

    Args:
        model: the live model, or any callable.
        x: images to attack [B, ...], B >= 1, where the model is.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        engine: the engine asked for, or ``"auto"``.
        train_mode: attack in train mode.

    Raises:
        ValueError: the engine asked for cannot run this model; the message says why.
    """
    if engine == "eager":
        return EagerEngine(precision, "asked for", train_mode)
    obstacle = _obstacle(model, x, engine, train_mode)
    if engine == "auto" and obstacle is not None:
        return EagerEngine(precision, obstacle, train_mode)
    if engine == "auto" and precision == "fp32":
        return EagerEngine(precision, "in fp32 the model's own operations run, bit for bit")
    if obstacle is None and isinstance(model, nn.Module):
        reason = "asked for" if engine != "auto" else "the model can be copied"
        try:
            return _checked_copy(model, x[:2], precision, engine, reason)
        except Untraceable as error:
            obstacle = str(error)
    if engine != "auto":
        raise ValueError(
            f"engine must be 'eager' or 'auto' for this model, got {engine!r}: {obstacle}"
        )
    warnings.warn(f"fastadv attacks this model with the eager engine: {obstacle}", stacklevel=5)
    return EagerEngine(precision, f"{obstacle}")


def _obstacle(model: Model, x: Tensor, engine: str, train_mode: bool) -> str | None:
    """Why no copy of the model can be attacked; None when tracing will tell."""
    if engine == "graph" and x.device.type != "cuda":
        return f"a CUDA graph needs images on a CUDA device, got {x.device}"
    if train_mode:
        return "train mode needs the live model"
    return None if isinstance(model, nn.Module) else "it is a plain callable"


def _checked_copy(model: nn.Module, x: Tensor, precision: str, engine: str, reason: str) -> Engine:
    """An engine on a copy that gives the live model's logits and gradients.

    Raises:
        Untraceable: there is none.
    """
    wide = CopyEngine(model, "fp32", "", inductor=False)
    # By TF32, the default on GPUs, the gradients of a deep net would be off by more than is allowed here.
    with full_float32():
        try:
            live = _probe(EagerEngine("fp32", ""), stand_in(model), x)
        except Exception as error:
            # The model itself fails. Its own message is to come from the real call.
            return EagerEngine(precision, f"the model fails: {error}")
        if not _agree(_probe(wide, model, x), live, 0.99):
            raise Untraceable(
                "its copy computes something else; it may write in place or depend on state"
            )
    if x.device.type == "cpu" and precision == "bf16":
        try:
            program = ProgramEngine(model, reason)
            if _agree(_probe(program, model, x), live, 0.5):
                return program
        except Untraceable:
            pass
    on_gpu = x.device.type == "cuda"
    inductor = on_gpu and engine in ("compiled", "graph")
    made = (
        wide if precision == "fp32" and not inductor else CopyEngine(model, precision, "", inductor)
    )
    made.reason = reason
    if engine == "graph":
        made.name = engine
    if on_gpu and engine != "compiled":
        recorder, classes = CudaRecorder(x.device), live.logits.shape[1]
        made.graphs = GraphCache(recorder, classes, required=engine == "graph")
    return made


def _probe(engine: Engine, model: nn.Module, x: Tensor) -> Gradient:
    """Logits and gradient of an arbitrary value.

    Raises:
        Untraceable: the copy fails on this model; an error of the live model itself is passed on.
    """

    def weighted_sum(logits: Tensor) -> Tensor:
        return logits @ torch.linspace(-1, 1, logits.shape[1], device=x.device, dtype=logits.dtype)

    images = engine.images(x)
    try:
        with engine.session(model, 0):
            return engine.gradient(images, weighted_sum)
    except Exception as error:  # a copy may fail in any way that the model's own code allows
        if isinstance(engine, EagerEngine):
            raise
        raise Untraceable(f"its copy fails: {error}") from error


def _agree(found: Gradient, wanted: Gradient, cosine: float) -> bool:
    """Whether logits are close, and gradients point the same way; narrow ones may do so roughly."""
    tolerance = 1e-3 if cosine > 0.9 else 0.2
    logits, right = found.logits.double(), wanted.logits.double()
    close = (logits - right).norm() <= tolerance * right.norm() + 1e-6
    a, b = found.grad.double().flatten(), wanted.grad.double().flatten()
    lengths = a.norm() * b.norm()
    return bool(close and (lengths == 0 or a @ b >= cosine * lengths))
