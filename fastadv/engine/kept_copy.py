"""A copy that has been found right: the operations it is made of, its engines, and what is known of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastadv.engine import choice, proof
from fastadv.engine.cached_recording import Changes
from fastadv.engine.candidates import beforehand, rivals_of
from fastadv.engine.choice import Contender
from fastadv.engine.copy_engines import EngineOnCopy
from fastadv.engine.engines import Engine
from fastadv.engine.first_recordings import PROBES, finite
from fastadv.engine.live_reference import LiveReference
from fastadv.engine.recorder import record
from fastadv.engine.recording import Recording
from fastadv.engine.request import EngineRequest
from fastadv.engine.tape import Tape


@dataclass
class KeptCopy:
    """An engine on a copy: the operations it is made of, and the batch sizes at which they were the model's.

    Attributes:
        tape: the operations.
        engine: the first that was found right.
        reason: why it was taken.
        evidence: whether the images told anything about gradients; true of the live model.
        sizes: the batch sizes.
        changes: of the weights since the last proof.
        chosen: the engine in its place, or itself, and the reason, by group of batch sizes.
    """

    tape: Tape
    engine: Contender
    reason: str
    evidence: bool
    sizes: set[int] = field(default_factory=set)
    changes: Changes = field(default_factory=Changes)
    chosen: dict[int, tuple[Contender, str]] = field(default_factory=dict)

    def engine_for(self, batch: int) -> Contender:
        """The engine that runs batches of this size."""
        engine, reason = self.chosen.get(choice.group_of(batch), (self.engine, self.reason))
        engine.reason = reason
        return engine

    def choose(self, reference: LiveReference, precision: str, request: EngineRequest) -> None:
        """Let the fastest engine run batches of this size, where one is to be chosen.

        The copy's own engine must have the model's weights.
        """
        x, spent = reference.x, reference.spent
        first, group = self.engine, choice.group_of(x.shape[0])
        on_cpu = x.device.type == "cpu" and precision in ("bf16", "fp32")
        if request.engine != "auto" or not on_cpu or group in self.chosen or not self.evidence:
            return
        if not isinstance(first, EngineOnCopy) or not choice.is_open(first):
            return
        images = finite(x if self.tape.only_batch is not None else x[: choice.enough_images(spent)])
        rivals = rivals_of(first, reference, precision, images[:PROBES])
        key = choice.key_of(self.tape, x, precision)
        known = beforehand(first, reference, precision, len(images))
        found, engine = choice.choose(key, reference, images, first, rivals, known)
        self.chosen[group] = engine, f"{self.reason}; {found}"
        if engine is not first:
            engine.cached_recording = first.cached_recording
            first.rest()

    def is_unchanged(self, model: nn.Module, x: Tensor) -> bool:
        """Whether the copy was proven before and the model, weights included, has not changed since.

        Then its logits and gradients are right without another comparison.
        """
        engine = self.engine_for(x.shape[0])
        cached, engine.cached_recording = engine.cached_recording, None
        if cached is None or not self.evidence or self.changes.are_certain(model):
            return False
        if not cached.is_laid_out_like(x):  # a model may ask for the layout
            return False
        if not cached.is_unchanged(model):
            return False
        tape = self.tape
        same = not tape.needs_plain_pass or (
            not tape.hashes_sizes and cached.is_unchanged(model, gradients=False)
        )
        if not same and not proof.agrees_without_gradients(engine, model, cached.images):
            return False
        engine.cached_recording = cached
        self.changes.used()
        return True

    def with_gradients(self, model: nn.Module, x: Tensor, careful: bool) -> Recording | None:
        """A recording with a graph, of as few images as the copy serves; None where memory does not suffice."""
        tape = self.tape
        sizes = (PROBES, len(x)) if tape.only_batch is None else (len(x),)
        try:
            for size in sizes:
                recording = record(model, finite(x[:size]), careful=careful, warmup=tape.warmup)
                if tape.describes(recording):
                    return recording
        except torch.OutOfMemoryError:
            pass
        return None


def described(recording: Recording, copies: Sequence[KeptCopy]) -> KeptCopy | None:
    """The copy that is made of the operations recorded."""
    fitting = (copy for copy in copies if copy.evidence and copy.tape.describes(recording))
    return next(fitting, None)


def used(kept: list[KeptCopy], copy: KeptCopy, batch: int) -> Engine:
    """The engine of one of the copies kept, which the next use then tries first."""
    kept.remove(copy)
    kept.insert(0, copy)
    return copy.engine_for(batch)
