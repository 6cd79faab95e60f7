"""The choice of an engine for a model, and the proof, at every use, that it computes the same as the model.

A copy is made from recordings of the live model (`fastadv.engine.recorder`). Before every attack a few images go
through the live model again. The operations recorded then must be those that the copy was made of, the weights are
taken from them, and the copy's logits must be the model's. Where they are not, a copy is built anew, in the
narrowest precision whose gradients are the model's. Where no copy is right, the live model runs, and a warning
says why. Where several engines are right, `fastadv.engine.choice` says which one runs.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastadv.engine import proof, randomness
from fastadv.engine.cached_recording import CachedRecording
from fastadv.engine.callers_modes import callers_change
from fastadv.engine.candidates import candidates
from fastadv.engine.compiled_parts import unwrapped
from fastadv.engine.engines import Engine, Model
from fastadv.engine.errors import Unrecordable
from fastadv.engine.first_recordings import (
    PROBES,
    finite,
    is_steady,
    record_few,
    repeats,
    tape_now,
    whole,
)
from fastadv.engine.frozen import frozen
from fastadv.engine.kept_copy import KeptCopy, described, used
from fastadv.engine.live_choice import LiveChoice
from fastadv.engine.live_engines import LiveEngine, as_model_takes, naming_dtypes
from fastadv.engine.live_reference import LiveReference
from fastadv.engine.matrix_products import live_is_known_to_win
from fastadv.engine.precision import fast_bf16
from fastadv.engine.proof_schedule import ProofSchedule, Trial
from fastadv.engine.recorder import record
from fastadv.engine.replaced_functions import registered_kernels
from fastadv.engine.request import EngineRequest
from fastadv.float32 import full_float32

_CHANCES = 2  # number of copies in one precision that may turn out wrong in use, before the precision is left out
_COPIES = 4  # number of copies kept per kind of images: a model may alternate between several forms
_KINDS = 8  # number of kinds of images


class EngineCache:
    """The engines of one model."""

    def __init__(self) -> None:
        self._copies: dict[Hashable, list[KeptCopy]] = {}
        self._live = LiveChoice()
        self._schedule = ProofSchedule()
        self._told: set[str] = set()
        self._still = False
        self._last_proven: Engine | None = None  # proven since the model stands still
        # How often copies of a kind and precision were found to part from the model in use.
        self._parted: Counter[Hashable] = Counter()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are empty: engines are built where they are used."""
        return EngineCache, ()

    @contextmanager
    def still(self) -> Iterator[None]:
        """Within, the model does not change, so that one proof of a copy serves for all uses."""
        self._still = True
        try:
            yield
        finally:
            self._still, self._last_proven = False, None

    def ready(self, model: Model, x: Tensor, request: EngineRequest) -> Engine:
        """The engine for images like ``x``, proven and with the model's current weights.

        Args:
            model: the live model, or any callable.
            x: images to attack [B, ...], B >= 1, where the model is.
            request: the options that the caller has asked for.

        Raises:
            ValueError: the engine asked for cannot run this model; the message says why.
        """
        precision = _narrowest(request, model, x)
        change = callers_change()
        obstacle, kind = _obstacle(model, x, request, change), (*_kind(x, request), change)
        if obstacle is None and isinstance(model, nn.Module):
            waiting = self._live.waiting(kind, model) if request.is_free else None
            if waiting is not None:
                return waiting.engine(request.train_mode)
            try:
                with full_float32(), naming_dtypes(model, x):
                    images = as_model_takes(model, x)
                    engine = self._copy(unwrapped(model), images, precision, request)
                self._live.forget(kind)
                return engine
            except Unrecordable as error:
                obstacle = str(error)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # such as that of an operation which bears no watching
                if not _runs(model, x):
                    raise
                obstacle = f"recording it fails: {error}".splitlines()[0]
            if request.is_free:
                self._tell(f"fastadv attacks this model with the eager engine: {obstacle}")
        if not request.is_free and request.engine != "eager":
            raise ValueError(
                f"engine must be 'eager' or 'auto' for this model, got {request.engine!r}: {obstacle}"
            )
        live = self._live.found(
            kind,
            model,
            x,
            request.train_mode,
            precision,
            f"{obstacle}",
            request.precision == "auto",
        )
        return live.engine(request.train_mode)

    def trial(self, model: Model, x: Tensor, request: EngineRequest) -> Trial[Any]:
        """An attack on images like ``x`` that may do without `ready`; arguments as there."""
        return self._schedule.trial(model, (*_kind(x, request), len(x), callers_change()))

    def _tell(self, message: str) -> None:
        """Warn, once."""
        if message not in self._told:
            self._told.add(message)
            warnings.warn(message, stacklevel=7)

    def _copy(self, model: nn.Module, x: Tensor, precision: str, request: EngineRequest) -> Engine:
        """A copy that is the model, kept or new.

        Raises:
            Unrecordable: there is none.
        """
        kind = _kind(x, request)
        kept = self._copies.setdefault(kind, [])
        while len(self._copies) > _KINDS:
            del self._copies[next(iter(self._copies))]
        if kept:
            found = self._proven(model, x, kept, kind, precision, request)
            if found is not None:
                self._last_proven = found if self._still else None
                return found
        parted = {own for own in proof.LOGITS if self._parted[kind, own] >= _CHANCES}
        made, reference = _build(model, x, precision, request, parted)
        if made.engine.precision != precision and request.precision != "auto":
            self._tell(f"fastadv attacks in {made.engine.precision}: {made.engine.reason}")
        kept.insert(0, made)
        del kept[_COPIES:]
        if precision not in parted:
            made.choose(reference, precision, request)
        engine = made.engine_for(x.shape[0])
        self._last_proven = engine if self._still else None
        return engine

    def _proven(
        self,
        model: nn.Module,
        x: Tensor,
        kept: list[KeptCopy],
        kind: Hashable,
        precision: str,
        request: EngineRequest,
    ) -> Engine | None:
        """The kept copy whose operations and logits are the model's; None where there is no such copy."""
        batch, states = x.shape[0], randomness.shared_states()
        known = [copy for copy in kept if batch in copy.sizes]
        # Few images tell enough once a whole batch of this size has been seen.
        few = known and all(copy.tape.holds_for_any_batch for copy in known)
        careful = any(copy.tape.own_functions for copy in kept)
        warmup = max(copy.tape.warmup for copy in kept)
        proven = (
            c
            for c in known
            if few and (c.engine_for(batch) is self._last_proven or c.is_unchanged(model, x))
        )
        same = next(proven, None)
        careful |= randomness.shared_states() != states  # by the model, or by another thread
        if same is not None and not careful:
            return used(kept, same, batch)
        for size in dict.fromkeys((PROBES if few else batch, batch)):
            if size <= PROBES:
                recording = record(model, finite(x[:size]), careful=careful, warmup=warmup)
            else:
                recording = whole(model, x, careful, warmup)
            if not careful and randomness.shared_states() != states:
                record(model, finite(x[:PROBES]), careful=True)  # refuses a model that draws
            copy = described(recording, known if size < batch else kept)
            if copy is not None:
                engine, is_new = copy.engine_for(batch), batch not in copy.sizes
                engine.refresh(recording)
                with_gradient = is_new or copy.changes.gradients_are_due(model)
                shown = recording
                if with_gradient and not recording.gradients:
                    shown = copy.with_gradients(model, x, careful) or recording
                with engine.session(model, 0, current=True):
                    agrees = proof.agrees(
                        engine, shown, model, with_gradient, copy.tape.needs_plain_pass
                    )
                if not agrees:
                    kept.remove(copy)
                    self._parted[kind, engine.precision] += 1
                    return None
                copy.sizes.add(batch)
                worth = size == PROBES and copy.changes.worth_caching(model, recording)
                engine.cached_recording = CachedRecording.of(recording, warmup) if worth else None
                if is_new and self._parted[kind, precision] < _CHANCES:
                    copy.choose(LiveReference(model, x, copy.tape, precision), precision, request)
                return used(kept, copy, batch)
        kept[:] = [copy for copy in kept if copy.evidence]
        return None


def _kind(x: Tensor, request: EngineRequest) -> tuple[Hashable, ...]:
    return (x.device, x.dtype, x.shape[1:], request, registered_kernels())


def _narrowest(request: EngineRequest, model: Model, x: Tensor) -> str:
    """The narrowest precision to be tried: ``"auto"`` is bf16 for modules where the hardware has it."""
    if request.precision != "auto":
        return request.precision
    narrow = isinstance(model, nn.Module) and x.dtype != torch.float64 and fast_bf16(x.device)
    return "bf16" if narrow else "fp32"


def _runs(model: nn.Module, x: Tensor) -> bool:
    """Whether a model by itself takes images, so that an error was that of its recording."""
    try:
        with frozen(model, seed=0), torch.no_grad():
            model(as_model_takes(model, x).detach().clone())
    except Exception:
        return False
    return True


def _obstacle(model: Model, x: Tensor, request: EngineRequest, change: str | None) -> str | None:
    """Why no copy is to be made; None when a recording will tell."""
    if request.engine == "eager":
        return "asked for"
    if request.engine == "graph" and x.device.type != "cuda":
        return f"a CUDA graph needs images on a CUDA device, got {x.device}"
    if request.train_mode:
        return "train mode needs the live model"
    if not isinstance(model, nn.Module):
        return "it is a plain callable"
    if change is not None:
        return f"{change} may change what torch's functions compute"
    free = request.precision == "auto" and x.device.type == "cpu" and x.dtype != torch.float64
    if request.is_free and not free and _narrowest(request, model, x) == "fp32":
        return "in fp32 the model's own operations run, bit for bit"
    return None


def _build(
    model: nn.Module, x: Tensor, precision: str, request: EngineRequest, parted: Collection[str]
) -> tuple[KeptCopy, LiveReference]:
    """A copy in the narrowest precision whose gradients are the model's, ``parted`` left out, and the proof.

    Raises:
        Unrecordable: there is none.
    """
    tape, recording = tape_now(model, x)
    wins = live_is_known_to_win(tape, recording, precision, request)
    live = None if wins else proof.evidence_of(recording, model, precision)
    few = None if tape.only_batch else record_few(model, x, tape, recording)
    cached = None if few is None else CachedRecording.of(few, tape.warmup)
    if cached is not None:
        steady = is_steady(model, tape, cached, few)
    else:
        steady = repeats(model, tape, recording if few is None else few, recording)
    if not steady:
        raise Unrecordable("its operations change from call to call")
    reference = LiveReference(model, x, tape, precision, recording, live, few is not None)
    failures = []
    for make in candidates(tape, recording, precision, request):
        try:
            engine = make()
            if engine.precision in parted:
                failures.append(f"in {engine.precision} its copies parted from it in use")
                continue
            fault = reference.fault_of(engine)
        except Exception as error:  # a copy may fail in any way that the model's own code allows
            failures.append(f"its copy fails: {error}")
            continue
        if fault is None:
            engine.cached_recording = cached
            engine.proof_seconds = 0.0 if cached is None else cached.seconds
            if engine.precision != precision:
                engine.reason += f"; {failures[-1]}"
            conclusive = isinstance(engine, LiveEngine) or reference.evidence.is_conclusive()
            return KeptCopy(tape, engine, engine.reason, conclusive, {x.shape[0]}), reference
        failures.append(f"in {engine.precision} {fault}")
    raise Unrecordable(failures[-1] if failures else "no copy serves it")
