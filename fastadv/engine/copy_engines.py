"""Engines that run an attack copy of the model: under autograd, or as a program of fused steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from fastadv.engine.cached_recording import CachedRecording
from fastadv.engine.compiled_parts import unwrapped
from fastadv.engine.copy import AttackCopy
from fastadv.engine.cpu_program import Program
from fastadv.engine.cpu_steps import ProgramStep
from fastadv.engine.cuda_graph import WorkRecorder
from fastadv.engine.engines import (
    Engine,
    InputGradient,
    Model,
    ValueOfLogits,
    channels_last,
    check_gradient,
    check_logits,
    enlarged,
    gradient_at_logits,
)
from fastadv.engine.graphed_passes import GraphedPasses
from fastadv.engine.hidden_draws import is_torchs
from fastadv.engine.precision import COMPUTE_DTYPES
from fastadv.engine.recorder import record
from fastadv.engine.recording import Recording
from fastadv.engine.replayed_program import ReplayedProgram
from fastadv.engine.tape import Tape


class EngineOnCopy(Engine):
    """Base of the engines that run an attack copy."""

    name = "compiled"
    cached_recording: CachedRecording | None = None  # the proof of the copy, its weights included
    _copy: AttackCopy
    _example: Tensor
    tape: Tape  # the operations of the copy

    def __init__(self, tape: Tape, recording: Recording, precision: str, reason: str) -> None:
        self.precision, self.reason = precision, reason
        self.tape, self._careful = tape, tape.own_functions
        self.any_batch = tape.holds_for_any_batch
        images = recording.images.detach()
        self._example = (images[:2] if tape.only_batch is None else images).clone()

    @property
    def copy(self) -> AttackCopy:
        """The copy, with the weights of the last refresh."""
        return self._copy

    def refresh(self, recording: Recording) -> None:
        """Copy the weights that the live model has used in a recording."""
        self.cached_recording = None
        self._copy.refresh(recording)

    def rest(self) -> None:
        """Free memory that the next use allocates again."""

    @contextmanager
    def session(self, model: Model, seed: int, current: bool = False) -> Iterator[None]:
        """Copy the live weights, unless the copy has them already."""
        if not current:
            assert isinstance(model, nn.Module)
            warmup = self.tape.warmup
            live = record(unwrapped(model), self._example, careful=self._careful, warmup=warmup)
            self.refresh(live)
        yield

    def images(self, x: Tensor) -> Tensor:
        """As in `Engine.images`, channels-last."""
        return channels_last(super().images(x))


class CopyEngine(EngineOnCopy):
    """Runs the attack copy under autograd, on a GPU compiled by ``torch.compile`` or by recorded passes.

    Attributes:
        passes: the passes that are recorded as CUDA graphs; None on a CPU.
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
        # The engine's own method would close a cycle of references, in which a dropped engine keeps its memory.
        self.passes = GraphedPasses(partial(_passed, self._run), recorder, self.any_batch)
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
        logits, turn = output.clone(), self.passes.turn  # before the loss
        value, at_logits = gradient_at_logits(output, value_of)
        # The loss may have attacked the same network, whose passes have then overwritten the activations.
        if self.passes.turn != turn and self.passes.forward(x) is None:
            return super().gradient(x, value_of)
        if self._narrow_range:
            at_logits = enlarged(at_logits)
        grad = self.passes.backward(at_logits)
        return InputGradient(value, logits, grad)

    def _forward(self, x: Tensor) -> Tensor:
        return _passed(self._run, x)


def _passed(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Logits of a copy that may be compiled."""
    try:
        return run(x)
    except torch._dynamo.exc.TorchDynamoException as error:
        raise ValueError(
            "engine must be 'auto' or 'eager' for this model, got 'compiled': torch.compile "
            f"fails: {error}"
        ) from error


class ProgramEngine(EngineOnCopy):
    """Runs the attack copy as a program of fused steps: bfloat16 or float32 on the CPU.

    Attributes:
        passes: the program's passes, some of them replayed.
    """

    def __init__(
        self, tape: Tape, recording: Recording, reason: str, precision: str = "bf16"
    ) -> None:
        super().__init__(tape, recording, precision, reason)
        self._copy = AttackCopy(tape, recording, COMPUTE_DTYPES[precision], pack=True)
        self._program = Program(self._copy)
        own = tape.own_functions or not all(is_torchs(op.function) for op in tape.ops)
        self.passes = ReplayedProgram(
            self._program, "the model calls code of others" if own else None
        )

    @property
    def steps(self) -> Sequence[ProgramStep]:
        """The steps of the program, in the order in which they run forward."""
        return self._program.steps

    def rest(self) -> None:
        """As in `EngineOnCopy.rest`."""
        self.passes.release()

    def refresh(self, recording: Recording) -> None:
        """As in `EngineOnCopy.refresh`."""
        super().refresh(recording)
        self.passes.refresh()

    def logits(self, x: Tensor) -> Tensor:
        """Logits [B, C] without gradient."""
        logits, _ = self.passes.forward(x, with_gradient=False)
        check_logits(logits, x.shape[0])
        return logits.to(torch.float32, copy=True)

    def gradient(self, x: Tensor, value_of: ValueOfLogits) -> InputGradient:
        """As in `Engine.gradient`; ``grad`` is in the program's dtype and valid until the engine's next call."""
        output, started = self.passes.forward(x, with_gradient=True)
        check_logits(output, x.shape[0])
        # Copied before the loss, which may attack the same network.
        logits = output.to(torch.float32, copy=True)
        value, at_logits = gradient_at_logits(output, value_of)
        grad = self.passes.backward(started, at_logits)
        check_gradient(grad is not None)
        assert grad is not None
        return InputGradient(value, logits, grad)
