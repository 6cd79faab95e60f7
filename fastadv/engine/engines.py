"""How an attack computes logits and input gradients: the live model, or a compiled copy of it.

An engine is prepared once for a model and used for many batches. ``session()`` brings the weights up to date and
holds the model still; inside it ``logits`` and ``gradient`` are called as often as the attack needs. Which engine
serves, and whether it still agrees with the model, is decided in `fastadv.engine.selection`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from fastadv.engine.compiled_parts import is_compiled_wrapper
from fastadv.engine.copy import AttackCopy
from fastadv.engine.cpu_program import Program
from fastadv.engine.cpu_steps import ProgramStep
from fastadv.engine.cuda_graph import GraphCache, WorkRecorder
from fastadv.engine.frozen import frozen
from fastadv.engine.graphed_passes import GraphedPasses
from fastadv.engine.precision import COMPUTE_DTYPES
from fastadv.engine.recorder import record
from fastadv.engine.recording import Recording
from fastadv.engine.remembered import Remembered
from fastadv.engine.tape import Tape

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
            seed: of random numbers that the model draws.
            current: the engine has the model's weights already, as `fastadv.engine.selection` hands it out.
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
            _check_gradient(logits.requires_grad)
            if self._narrow_range:
                value, at_logits = _at_logits(logits, value_of)
                at_logits = _enlarged(at_logits).to(logits.dtype)
                found = differentiate(logits, leaf, at_logits, allow_unused=True)
            else:
                value = value_of(logits)
                found = differentiate(value.sum(), leaf, allow_unused=True)
        _check_gradient(found[0] is not None)
        return InputGradient(value.detach(), logits.detach(), found[0])


def _by_backward(
    output: Tensor, leaf: Tensor, at: Tensor | None = None, allow_unused: bool = True
) -> tuple[Tensor | None]:
    """As `torch.autograd.grad`, for models with reentrant checkpointing, which refuses that function.

    The model is frozen, so that no gradient is left in its parameters.
    """
    output.backward(at)
    return (leaf.grad,)


def check_logits(logits: object, batch: int) -> None:
    """Check the model's result.

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
    """The value, and the gradient of its sum at the logits [B, C] float32.

    Values that know their gradient by a formula have a method `value_and_gradient`, which saves autograd's time.
    """
    by_formula = getattr(value_of, "value_and_gradient", None)
    if by_formula is not None:
        with torch.no_grad():
            found: tuple[Tensor, Tensor] = by_formula(output.detach().float())
        return found
    with torch.enable_grad():
        logits = output.detach().float().requires_grad_()
        value = value_of(logits)
        (at_logits,) = torch.autograd.grad(value.sum(), logits)
    return value.detach(), at_logits


def _enlarged(at_logits: Tensor) -> Tensor:
    """Each sample's gradient [C] scaled to a largest entry of 1.

    Confident samples have gradients that float16 would round to 0.
    """
    largest = at_logits.abs().amax(1, keepdim=True)
    return torch.where(largest > 0, at_logits / largest, 0.0)


def _check_gradient(found: bool) -> None:
    if not found:
        raise ValueError(
            "model must return logits with a gradient in x, got logits without one; does its "
            "forward detach them or run under torch.no_grad?"
        )


Draws: TypeAlias = Literal["never", "unlikely", "watched", "assumed"]


class EagerEngine(Engine):
    """Runs the live model as it stands, frozen; in a narrow precision through autocast.

    Args:
        precision: of the passes.
        reason: why no copy runs.
        train_mode: run in train mode; ``"moving"`` leaves the buffers as the passes have moved them.
        draws: whether the model draws random numbers, which then follow the session's seed: "watched" where
            that is to be seen when it does so; "unlikely" is as "watched", of one that did not.
        channels_last: run on channels-last images, which some models' own code cannot take.
    """

    name = "eager"

    def __init__(
        self,
        precision: str,
        reason: str,
        train_mode: bool | str = False,
        draws: Draws = "assumed",
        channels_last: bool = False,
    ) -> None:
        self._dtype, self.reason, self.precision = COMPUTE_DTYPES[precision], reason, precision
        self._narrow_range = precision == "fp16"
        self._train_mode, self._draws = train_mode, draws
        self.any_batch = draws in ("never", "unlikely")
        self._channels_last = channels_last
        self._model: Model | None = None
        self._weights = torch.float32

    @contextmanager
    def session(self, model: Model, seed: int, current: bool = False) -> Iterator[None]:
        """Freeze the live model; it is as before on leaving."""
        # Held for the session only, so that a cached engine keeps no model alive.
        self._model, self._weights = model, _weights_dtype(model)
        try:
            with frozen(
                model,
                train_mode=bool(self._train_mode),
                keep_buffers=self._train_mode != "moving",
                seed=seed if self._draws != "never" else None,
                watch=self._draws in ("watched", "unlikely"),
            ):
                yield
        finally:
            self._model = None

    def images(self, x: Tensor) -> Tensor:
        """As in `Engine.images`, channels-last where the model takes that."""
        images = super().images(x)
        return _channels_last(images) if self._channels_last else images

    def _forward(self, x: Tensor) -> Tensor:
        """Logits; the model gets images of its own, so that it may write to them."""
        assert self._model is not None
        if self._dtype == torch.float32:
            with naming_dtypes(self._model, x):
                return self._model(_in_dtype_of(self._weights, x).clone())
        with torch.autocast(x.device.type, self._dtype), naming_dtypes(self._model, x):
            return self._model(x.clone())


@contextmanager
def naming_dtypes(model: Model, x: Tensor) -> Iterator[None]:
    """Let the error of a model that cannot take the images' dtype say so.

    Raises:
        TypeError: the model fails, and its weights have another dtype than ``x``.
    """
    try:
        yield
    except RuntimeError as error:
        weights = _weights_dtype(model)
        if not isinstance(model, nn.Module) or x.dtype in (weights, *_SIXTEEN_BITS):
            raise
        raise TypeError(
            f"x must have a dtype that the model takes, whose weights are {weights}, got {x.dtype}: "
            f"{error}"
        ) from error


def as_model_takes(model: Model, x: Tensor) -> Tensor:
    """Images in 16 bits where the model's weights are, else in float32 or float64."""
    return _in_dtype_of(_weights_dtype(model), x)


def _in_dtype_of(weights: torch.dtype, x: Tensor) -> Tensor:
    if weights in _SIXTEEN_BITS:
        return x.to(weights)
    return x.float() if x.dtype in _SIXTEEN_BITS else x


_SIXTEEN_BITS = (torch.float16, torch.bfloat16)


def _weights_dtype(model: Model) -> torch.dtype:
    """The dtype of a module's weights; float32 of other callables."""
    if isinstance(model, nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                return tensor.dtype
    return torch.float32


class EngineOnCopy(Engine):
    """The common part of the engines that run on an attack copy."""

    name = "compiled"
    remembered: Remembered | None = None  # the proof of the copy, its weights included
    _copy: AttackCopy
    _example: Tensor
    tape: Tape  # the operations of the copy

    def __init__(self, tape: Tape, recording: Recording, precision: str, reason: str) -> None:
        self.precision, self.reason = precision, reason
        self.tape, self._careful = tape, tape.own_functions
        self.any_batch = tape.only_batch is None and not tape.decides_by_batch
        images = recording.images.detach()
        self._example = (images[:2] if tape.only_batch is None else images).clone()

    @property
    def copy(self) -> AttackCopy:
        """The copy, with the weights of the last refresh."""
        return self._copy

    def refresh(self, recording: Recording) -> None:
        """Bring over the weights that the live model has used."""
        self.remembered = None
        self._copy.refresh(recording)

    def rest(self) -> None:
        """Give memory back that the next use takes anew."""

    @contextmanager
    def session(self, model: Model, seed: int, current: bool = False) -> Iterator[None]:
        """Bring the live weights over, unless they are here."""
        if not current:
            assert isinstance(model, nn.Module)
            settling = self.tape.settling
            live = record(unwrapped(model), self._example, careful=self._careful, settling=settling)
            self.refresh(live)
        yield

    def images(self, x: Tensor) -> Tensor:
        """As in `Engine.images`, channels-last."""
        return _channels_last(super().images(x))


class LiveEngine(EagerEngine):
    """The live model, which runs because it is faster than a copy that is right.

    Args:
        precision: of the passes.
        reason: why no copy runs.
        channels_last: run on channels-last images, which some models' own code cannot take.
    """

    remembered: Remembered | None = None  # its proof

    def __init__(self, precision: str, reason: str, channels_last: bool) -> None:
        super().__init__(precision, reason, draws="never", channels_last=channels_last)
        self.channels_last = channels_last

    def refresh(self, recording: Recording) -> None:
        """It has the live weights."""
        self.remembered = None

    @contextmanager
    def session(self, model: Model, seed: int, current: bool = False) -> Iterator[None]:
        """Freeze the network itself, which was measured without the wrappers around it."""
        inner = unwrapped(model) if isinstance(model, nn.Module) else model
        with super().session(inner, seed, current):
            yield


class CopyEngine(EngineOnCopy):
    """Runs the attack copy under autograd, on a GPU compiled by ``torch.compile`` or by recorded passes.

    Attributes:
        passes: recorded as CUDA graphs; None on a CPU.
    """

    passes: GraphedPasses | None = None

    def __init__(
        self, tape: Tape, recording: Recording, precision: str, reason: str, inductor: bool
    ) -> None:
        super().__init__(tape, recording, precision, reason)
        dtype = COMPUTE_DTYPES[precision]
        if recording.images.dtype == torch.float64:
            dtype = torch.float64
        self._copy = AttackCopy(tape, recording, dtype)
        self._narrow_range = precision == "fp16"
        self._run: Callable[[Tensor], Tensor] = (
            torch.compile(self._copy, fullgraph=True) if inductor else self._copy
        )

    @contextmanager
    def session(self, model: Model, seed: int, current: bool = False) -> Iterator[None]:
        """As in `EngineOnCopy.session`."""
        if self.passes is not None:
            self.passes.begin()
        with super().session(model, seed, current):
            yield

    def record_passes(self, recorder: WorkRecorder) -> GraphedPasses:
        """Have the passes of long attacks recorded."""
        self.passes = GraphedPasses(self._forward, recorder, self.any_batch)
        return self.passes

    def logits(self, x: Tensor) -> Tensor:
        """Logits [B, C] without gradient."""
        found = None if self.passes is None else self.passes.logits(x)
        return super().logits(x) if found is None else found.clone()

    def gradient(self, x: Tensor, value_of: ValueOfLogits) -> InputGradient:
        """As in `Engine.gradient`; ``grad`` is valid until the engine's next call."""
        output = None if self.passes is None else self.passes.forward(x)
        if output is None:
            return super().gradient(x, value_of)
        assert self.passes is not None
        value, at_logits = _at_logits(output, value_of)
        if self._narrow_range:
            at_logits = _enlarged(at_logits)
        grad = self.passes.backward(at_logits)
        return InputGradient(value, output.clone(), grad)

    def _forward(self, x: Tensor) -> Tensor:
        try:
            return self._run(x)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise ValueError(
                "engine must be 'auto' or 'eager' for this model, got 'compiled': torch.compile "
                f"fails: {error}"
            ) from error


class ProgramEngine(EngineOnCopy):
    """Runs the attack copy as a program of fused steps: bfloat16 or float32 on the CPU."""

    def __init__(
        self, tape: Tape, recording: Recording, reason: str, precision: str = "bf16"
    ) -> None:
        super().__init__(tape, recording, precision, reason)
        self._copy = AttackCopy(tape, recording, COMPUTE_DTYPES[precision], pack=True)
        self._program = Program(self._copy)

    @property
    def steps(self) -> Sequence[ProgramStep]:
        """The program's, in the order in which they run forward."""
        return self._program.steps

    def rest(self) -> None:
        """As in `EngineOnCopy.rest`."""
        self._program.release()

    def logits(self, x: Tensor) -> Tensor:
        """Logits [B, C] without gradient."""
        logits, _ = self._program.forward(x)
        check_logits(logits, x.shape[0])
        return logits.to(torch.float32, copy=True)

    def gradient(self, x: Tensor, value_of: ValueOfLogits) -> InputGradient:
        """As in `Engine.gradient`; ``grad`` is in the program's dtype and valid until the engine's next call."""
        output, run = self._program.forward(x)
        check_logits(output, x.shape[0])
        value, at_logits = _at_logits(output, value_of)
        grad = self._program.backward(run, at_logits)
        _check_gradient(grad is not None)
        assert grad is not None
        return InputGradient(value, output.to(torch.float32, copy=True), grad)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


_WRAPPERS = (
    nn.DataParallel,
    nn.parallel.DistributedDataParallel,
    torch.optim.swa_utils.AveragedModel,
)


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside wrappers that only hand images on to it, and inside `torch.compile`'s."""
    while not (model._forward_hooks or model._forward_pre_hooks):
        if is_compiled_wrapper(model):
            model = cast(nn.Module, model._orig_mod)
        elif type(model) in _WRAPPERS:
            model = cast(nn.Module, model.module)
        else:
            break
    return model
