"""The engines that may run a copy, in the order in which they are tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadv.engine import choice
from fastadv.engine.choice import Contender
from fastadv.engine.copy_engines import CopyEngine, EngineOnCopy, ProgramEngine
from fastadv.engine.cuda_graph import CudaRecorder, GraphCache
from fastadv.engine.errors import Unrecordable
from fastadv.engine.live_choice import live_rival
from fastadv.engine.live_engines import LiveEngine
from fastadv.engine.live_reference import LiveReference
from fastadv.engine.matrix_products import convolves_features, live_is_known_to_win
from fastadv.engine.recording import Recording
from fastadv.engine.request import EngineRequest
from fastadv.engine.tape import Tape


def candidates(
    tape: Tape, recording: Recording, precision: str, request: EngineRequest
) -> Iterator[Callable[[], Contender]]:
    """The engines that may run, those on a copy in the order of their precisions, the narrowest first."""
    images = recording.images
    if live_is_known_to_win(tape, recording, precision, request):
        channels_last = convolves_features(recording)
        obstacle = "no copy computes matrix products faster"
        yield partial(LiveEngine, "fp32", obstacle, channels_last, tape)
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
    """Builds the other engines that may be faster than a copy's own, by name, as they are to be timed.

    In float32 a copy under autograd runs the operations of the live model, unless it folds BatchNorm or need not
    compute weights anew. It is timed last, because it needs proofs that the live model does not.
    """
    model, names, tape = reference.model, choice.NAMES[precision], reference.tape

    def copied() -> CopyEngine:
        return CopyEngine(tape, reference.recording, precision, "", False)

    def live(channels_last: bool) -> LiveEngine:
        if names.contiguous is not None:
            return LiveEngine(precision, "", channels_last, tape)
        return live_rival(model, probes, precision, tape)

    rivals: dict[str, Callable[[], Contender]] = {names.live: partial(live, True)}
    if names.contiguous is not None:
        rivals[names.contiguous] = partial(live, False)
    if choice.name_of(first) != names.program:
        return rivals
    if names.contiguous is None:
        return {names.copy: copied} | rivals
    return rivals | ({names.copy: copied} if _copy_saves_work(tape) else {})


def _copy_saves_work(tape: Tape) -> bool:
    """Whether a copy has fewer operations than the live model: folded ones, or constants that it keeps."""
    kept = (op for op in tape.ops if not tape.dynamic[op.place] and not choice.is_view(op.function))
    return any(op.function is F.batch_norm for op in tape.ops) or any(kept)


def beforehand(
    first: EngineOnCopy, reference: LiveReference, precision: str, count: int
) -> choice.Beforehand:
    """What is known of the times of engines; ``count`` is the number of images on which they are to be timed."""
    spent, names = reference.spent.get(count, 0.0), choice.NAMES[precision]
    if names.contiguous is None:
        return choice.Beforehand(spent)
    least = {names.contiguous: reference.least_seconds(count)}
    if LiveEngine(precision, "", False, reference.tape).may_skip_proofs:
        return choice.Beforehand(spent, first.proof_seconds, choice.HANDICAP, least)
    return choice.Beforehand(spent, least=least)
