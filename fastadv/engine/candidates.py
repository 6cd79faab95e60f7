"""The engines that may run a copy, in the order in which they are tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fastadv.engine import choice
from fastadv.engine.choice import Contender
from fastadv.engine.copy_engines import CopyEngine, EngineOnCopy, ProgramEngine
from fastadv.engine.cuda_graph import CudaRecorder, GraphCache
from fastadv.engine.errors import Unrecordable
from fastadv.engine.live_choice import live_rival
from fastadv.engine.live_engines import LiveEngine
from fastadv.engine.live_reference import LiveReference
from fastadv.engine.recording import Recording
from fastadv.engine.request import EngineRequest
from fastadv.engine.tape import Tape


def candidates(
    tape: Tape, recording: Recording, precision: str, request: EngineRequest
) -> Iterator[Callable[[], EngineOnCopy]]:
    """The engines that may run a copy, the narrowest precision first."""
    images = recording.images
    reason = "the model can be copied" if request.is_free else "asked for"
    if tape.autocast and precision == "fp32":
        raise Unrecordable("its forward enters autocast")
    # Programs are for bfloat16 and float32; images in float64 get copies in float64.
    programs = {"bf16", "fp32"} if images.dtype != torch.float64 else {"bf16"}
    for own in dict.fromkeys((precision, "fp32")):
        if tape.autocast and own == "fp32":
            continue
        if images.device.type == "cpu" and own in programs:
            yield partial(ProgramEngine, tape, recording, reason, own)
        yield partial(_under_autograd, tape, recording, own, reason, request)


def _under_autograd(
    tape: Tape, recording: Recording, precision: str, reason: str, request: EngineRequest
) -> CopyEngine:
    """A copy run by torch; on a GPU compiled, or its attacks recorded as CUDA graphs."""
    device, classes = recording.images.device, recording.logits.shape[-1]
    on_gpu = device.type == "cuda"
    inductor = on_gpu and request.engine in ("compiled", "graph")
    engine = CopyEngine(tape, recording, precision, reason, inductor)
    if on_gpu and request.engine != "compiled":
        required = request.engine == "graph"
        engine.name = "graph" if required else engine.name
        recorder = CudaRecorder(device)
        resting = engine.record_passes(recorder).resting
        engine.graphs = GraphCache(recorder, classes, required, around=resting)
    return engine


def rivals_of(
    first: EngineOnCopy, reference: LiveReference, precision: str, probes: Tensor
) -> dict[str, Callable[[], Contender]]:
    """Builds the other engines that may be faster than a copy's own, by name, as they are to be timed."""
    model, names = reference.model, choice.NAMES[precision]

    def copied() -> CopyEngine:
        return CopyEngine(reference.tape, reference.recording, precision, "", False)

    def live(channels_last: bool) -> LiveEngine:
        if names.contiguous is not None:
            return LiveEngine(precision, "", channels_last, reference.tape)
        return live_rival(model, probes, precision, reference.tape)

    rivals: dict[str, Callable[[], Contender]] = {}
    if choice.name_of(first) == names.program:
        rivals[names.copy] = copied
    rivals[names.live] = partial(live, True)
    if names.contiguous is not None:
        rivals[names.contiguous] = partial(live, False)
    return rivals
