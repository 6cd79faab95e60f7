"""A program's passes, replayed from the operators that an earlier pass has called.

For images of one shape and layout the first pass is the program's own. So is the second, whose calls are recorded.
The third is both. If the replay gives the numbers of the program's own pass, later passes are replays.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fastadv.engine.cpu_pass import Pass
from fastadv.engine.cpu_program import Program
from fastadv.engine.operator_calls import Call, CallRecorder, Place, drop_early

_KINDS = 8  # of passes, by shape and layout, that are kept at a time
# A replay saves about so many seconds per call, and has to save at least such a share of a pass.
_SECONDS_PER_CALL, _WORTH = 10e-6, 0.005
_SLOWED = 5  # the most that recording slows a pass down by; code that has not run before takes its time, too
_TOO_LITTLE = "a replay would save too little"
NOT_YET = "too few passes have run"


@dataclass
class _Recording:
    """The calls of a pass.

    Attributes:
        calls: forward, and then backward.
        turn: how many of them are forward.
        places: how many places there are; the images have the first one.
        logits: their place, or the tensor in the program's memory that they are written to.
        at_logits: the place of the gradient at the logits; None for a pass without gradients.
        gradient: as `logits`, for the gradient in the images.
        holds_replaced: whether a constant is in a layout of its own, such as oneDNN's or a sparse one. A refresh
            of the weights gives such tensors new memory.
    """

    calls: list[Call]
    turn: int
    places: int
    logits: Place | Tensor
    at_logits: Place | None
    gradient: Place | Tensor | None
    holds_replaced: bool

    def pays(self, seconds: float) -> bool:
        """Whether a replay saves a part worth having of a pass of so many seconds."""
        return len(self.calls) * _SECONDS_PER_CALL >= seconds * _WORTH

    def begin(self, x: Tensor) -> tuple[Any, list[Any]]:
        """The logits, and the values of the pass by place."""
        values: list[Any] = [None] * self.places
        values[0] = x
        with torch.no_grad():
            for call in self.calls[: self.turn]:
                call.run(values)
        return _value(self.logits, values), values

    def fault_at(
        self, x: Tensor, at_logits: Tensor | None, own: tuple[Tensor, Tensor | None]
    ) -> str | None:
        """Why a replay does not give a pass's own results; None if it does.

        Some of torch's operators, such as the gradient of an LSTM, do not take what they were seen to take.
        """
        try:
            logits, values = self.begin(x)
            gradient = None if at_logits is None else self.complete(values, at_logits)
        except Exception as error:
            return f"a replay fails: {error}"
        same = _equal(logits, own[0]) and _equal(gradient, own[1])
        return None if same else "a replay has other results"

    def complete(self, values: list[Any], at_logits: Tensor) -> Any:
        """The gradient in the images."""
        assert self.at_logits is not None
        values[self.at_logits.number] = at_logits
        with torch.no_grad():
            for call in self.calls[self.turn :]:
                call.run(values)
        return _value(self.gradient, values)


def _value(source: Place | Tensor | None, values: list[Any]) -> Any:
    return values[source.number] if isinstance(source, Place) else source


@dataclass
class _Kind:
    """What is known of the passes of one shape and layout, with or without gradients.

    Attributes:
        is_warm: whether the program has its memory and its packed weights from a pass before.
        recording: the calls of a pass.
        is_checked: whether a later pass has shown that a replay serves.
        fault: why passes of this kind are not replayed.
    """

    is_warm: bool = False
    recording: _Recording | None = None
    is_checked: bool = False
    fault: str | None = None


@dataclass
class ProgramPass:
    """A pass between forward and backward."""

    kind: _Kind
    x: Tensor
    logits: Any
    began: float
    run: Pass | None = None  # of the program's own pass
    recorder: CallRecorder | None = None
    turn: int = 0  # calls forward, if they are recorded
    values: list[Any] | None = None  # of a replay, by place


class ReplayedProgram:
    """A program, with replays of its passes.

    Args:
        program: the program.
        fault: why its passes may not be replayed, as where code of others decides in each pass what to compute.
    """

    def __init__(self, program: Program, fault: str | None = None) -> None:
        self._program, self._fault = program, fault
        self._kinds: dict[Any, _Kind] = {}
        self._most = 0  # images of a pass
        self._latest: ProgramPass | None = None

    def release(self) -> None:
        """Let go of the memory kept between passes."""
        self._kinds.clear()
        self._program.release()

    def refresh(self) -> None:
        """Note that the weights have changed."""
        for kind in self._kinds.values():
            if kind.recording is not None and kind.recording.holds_replaced:
                kind.recording, kind.is_warm = None, False

    def forward(self, x: Tensor, with_gradient: bool) -> tuple[Any, ProgramPass]:
        """As `Program.forward`; ``with_gradient`` says whether `backward` follows."""
        logits, started = self._forward(x, with_gradient)
        self._latest = started if with_gradient else None
        return logits, started

    def _forward(self, x: Tensor, with_gradient: bool) -> tuple[Any, ProgramPass]:
        kind, began = self._kind_of(x, with_gradient), perf_counter()
        if kind.is_checked and kind.recording is not None:
            logits, values = kind.recording.begin(x)
            return logits, ProgramPass(kind, x, logits, began, values=values)
        if kind.fault is not None or not kind.is_warm or kind.recording is not None:
            logits, run = self._program.forward(x)
            started = ProgramPass(kind, x, logits, began, run)
        else:
            started = self._recorded_forward(kind, x, began)
            logits = started.logits
        if with_gradient or kind.fault is not None:
            return logits, started
        return self._learn(started, None, None)[0], started

    def backward(self, started: ProgramPass, at_logits: Tensor) -> Tensor | None:
        """As `Program.backward`. The logits of the pass may be overwritten.

        A loss may attack the same network. Its passes lie in the same memory, so the forward pass is made again.
        """
        at_logits = at_logits.contiguous()
        if started is not self._latest:
            _, started = self._forward(started.x, with_gradient=True)
        self._latest = None  # what it holds is not kept until the next pass
        if started.values is not None:
            assert started.kind.recording is not None
            return started.kind.recording.complete(started.values, at_logits)
        assert started.run is not None
        if started.recorder is None:
            gradient = self._program.backward(started.run, at_logits)
        else:
            gradient = self._recorded_backward(started, at_logits)
        if started.kind.fault is not None:
            return gradient
        return self._learn(started, at_logits, gradient)[1]

    def why_not_replayed(self, x: Tensor, with_gradient: bool) -> str | None:
        """Why the next pass of such images is the program's own; None if it is a replay."""
        kind = self._kind_of(x, with_gradient)
        if kind.is_checked and kind.recording is not None:
            return None
        return kind.fault or NOT_YET

    def _recorded_forward(self, kind: _Kind, x: Tensor, began: float) -> ProgramPass:
        """The first half of a pass, recorded unless recording it fails."""
        recorder = CallRecorder(self._program.memory.holds)
        recorder.add(x)
        try:
            with recorder:
                logits, run = self._program.forward(x)
        except Exception as error:  # if it is the program's own, it comes again
            kind.fault = f"recording a pass fails: {error}"
            logits, run = self._program.forward(x)
            return ProgramPass(kind, x, logits, began, run)
        return ProgramPass(kind, x, logits, began, run, recorder, len(recorder.calls))

    def _recorded_backward(self, started: ProgramPass, at_logits: Tensor) -> Tensor | None:
        """The second half; where recording it fails, that of a pass that nothing watches."""
        assert started.recorder is not None and started.run is not None
        started.recorder.add(at_logits)
        try:
            with started.recorder:
                return self._program.backward(started.run, at_logits)
        except Exception as error:
            started.kind.fault = f"recording a pass fails: {error}"
        _, run = self._program.forward(started.x)
        return self._program.backward(run, at_logits)

    def _kind_of(self, x: Tensor, with_gradient: bool) -> _Kind:
        if x.shape[0] > self._most:
            self._kinds.clear()  # the program takes new memory, and recordings would keep the old one
            self._most = x.shape[0]
        key = (x.shape, x.stride(), x.dtype, with_gradient)
        kind = self._kinds.get(key)
        if kind is None:
            if len(self._kinds) == _KINDS:
                del self._kinds[next(iter(self._kinds))]
            kind = self._kinds[key] = _Kind(fault=self._fault)
        return kind

    def _learn(
        self, started: ProgramPass, at_logits: Tensor | None, gradient: Tensor | None
    ) -> tuple[Any, Tensor | None]:
        """What a pass of the program's own tells about its kind; its results, which stay as they are."""
        kind, logits, seconds = started.kind, started.logits, perf_counter() - started.began
        if started.recorder is not None:
            recording, kind.fault = _recorded(started, at_logits, gradient)
            if recording is not None and not recording.pays(seconds / _SLOWED):
                recording, kind.fault = None, _TOO_LITTLE
            kind.recording = recording
        elif kind.recording is None:
            kind.is_warm = True
        elif not kind.recording.pays(seconds):
            kind.recording, kind.fault = None, _TOO_LITTLE
        else:
            kind.is_checked = True
            own = logits.clone(), None if gradient is None else gradient.clone()
            kind.fault = kind.recording.fault_at(started.x, at_logits, own)
            if kind.fault is not None:
                kind.recording = None
            return own
        return logits, gradient


def _recorded(
    started: ProgramPass, at_logits: Tensor | None, gradient: Tensor | None
) -> tuple[_Recording | None, str | None]:
    """The calls of a recorded pass, or why they do not serve."""
    recorder = started.recorder
    assert recorder is not None
    if recorder.fault is not None:
        return None, recorder.fault
    sources: list[Any] = [None, None, None]
    for number, tensor in enumerate((started.logits, at_logits, gradient)):
        if isinstance(tensor, Tensor):
            sources[number] = recorder.source_of(tensor)
    logits, at, found = sources
    if logits is None or (at is None) != (found is None):
        return None, "a result is no tensor that a call has made"
    calls = recorder.calls
    drop_early(calls, {source.number for source in sources if isinstance(source, Place)})
    replaced = any(constant.layout is not torch.strided for constant in recorder.constants)
    made = _Recording(calls, started.turn, recorder.places, logits, at, found, replaced)
    return made, None


def _equal(one: Any, other: Any) -> bool:
    """Whether two results have the same numbers; NaN equals NaN."""
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())
