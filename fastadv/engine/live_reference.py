"""The logits and gradients of a few images that the live model has, while an engine is chosen for it."""

from __future__ import annotations

from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastadv.engine import proof
from fastadv.engine.engines import Engine
from fastadv.engine.first_recordings import PROBES, finite
from fastadv.engine.live_engines import LiveEngine
from fastadv.engine.proof import Evidence
from fastadv.engine.recorder import record
from fastadv.engine.recording import Recording
from fastadv.engine.tape import Tape

_LATER = 0.8  # of the time of a first pass, what a later one may take


class LiveReference:
    """The proof that engines must pass; recording and evidence are made at their first use unless they are given.

    Args:
        model: the live model.
        x: images to attack [B, ...].
        tape: the model's operations.
        precision: the narrowest precision of the engines.
        recording: a recording of a few images, or of all images if the operations hold for one batch size only.
        evidence: the evidence of that recording.
        first_alone: whether engines must also be right for a batch of only the first images.

    Attributes:
        spent: seconds of a gradient pass of the engine that was last proven, by the number of images.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        tape: Tape,
        precision: str,
        recording: Recording | None = None,
        evidence: Evidence | None = None,
        first_alone: bool = False,
    ) -> None:
        self.model, self.x, self.tape, self._precision = model, x, tape, precision
        self._recording, self._evidence = recording, evidence
        self._first_alone = first_alone
        self.spent: dict[int, float] = {}
        self._alone: Evidence | None = None  # of a pass of the first images alone
        # The numbers of images for which an engine was right in a pass whose time was taken.
        self._seen_right: WeakKeyDictionary[Engine, set[int]] = WeakKeyDictionary()

    @cached_property
    def recording(self) -> Recording:
        """The recording, with the weights that the model has just used."""
        if self._recording is not None:
            return self._recording
        few = self.x if self.tape.only_batch is not None else self.x[:PROBES]
        return self._recorded(few)

    @cached_property
    def evidence(self) -> Evidence:
        """The model's logits and gradients on the recorded images."""
        return self._evidence or proof.evidence_of(self.recording, self.model, self._precision)

    def fault_of(self, engine: Engine) -> str | None:
        """In words, what is wrong with an engine; None where it is right.

        It must be right for the recorded batch, and for the few images that every later use begins with. These
        are the first of the recorded ones, so that their logits and gradients are there already, unless the
        model mixes the images of a batch.

        The live model in float32 computes the same function by its own code. On images as they come it is what has
        been recorded. The few images show whether its code accepts images of another memory layout.
        """
        self.spent = {}
        if isinstance(engine, LiveEngine) and engine.precision == "fp32" and self._first_alone:
            if not engine.channels_last:
                return None
            if max(self._seen_right.get(engine, ()), default=0) >= PROBES:
                return None
            with engine.session(self.model, 0, current=True):
                fault = self.evidence.first(PROBES).against(engine)
            if fault is None:
                return None  # else it may be a model that mixes the images of a batch
        right = self._seen_right.get(engine, set())
        with engine.session(self.model, 0, current=True):
            fault = None
            if len(self.evidence.images) not in right:
                fault = self.evidence.against(engine, self.spent)
            if fault is not None or not self._first_alone:
                return fault
            count = min(PROBES, self.x.shape[0])
            if count in right:
                return None
            if self._alone is None:
                if self.evidence.first(count).against(engine, self.spent) is None:
                    return None
                alone = self._recorded(self.x[:count])
                self._alone = proof.evidence_of(alone, self.model, self._precision)
            return self._alone.against(engine, self.spent)

    def seconds_of(self, engine: Engine, images: Tensor) -> float:
        """Seconds of a gradient pass of an engine, which may spare `fault_of` the same pass.

        Args:
            engine: the engine.
            images: the first of the batch [B, ...].
        """
        evidence = self._evidence_for(images)
        value_of = proof.weighted_sum if evidence is None else evidence.values[0]
        with engine.session(self.model, 0, current=True):
            shown = engine.images(images)
            began = proof.seconds()
            found = engine.gradient(shown, value_of)
            spent = proof.seconds() - began
            if evidence is not None:
                fault = proof.difference(found, evidence.gradients[0], engine.precision)
                right = self._seen_right.setdefault(engine, set())
                (right.add if fault is None else right.discard)(len(images))
        return spent

    def least_seconds(self, count: int) -> float:
        """Seconds that a gradient pass of the model takes at least for so many images, in the layout recorded.

        Its first passes tell, which have been made for other reasons, and may take longer than later ones.
        """
        if self._evidence is None or self._evidence.seconds is None:
            return 0.0
        backward = self._evidence.seconds / len(self._evidence.images)
        forward = self.recording.forward_seconds
        return count * (backward + forward) * (_LATER if forward else 1.0)

    def _evidence_for(self, images: Tensor) -> Evidence | None:
        """Evidence of the first images that one pass gives; None where there is no such evidence."""
        evidence, count = self._evidence, len(images)
        if evidence is None or not evidence.in_turn or count > len(evidence.images):
            return None
        return evidence.first(count) if torch.equal(evidence.images[:count], images) else None

    def _recorded(self, images: Tensor) -> Recording:
        tape = self.tape
        return record(self.model, finite(images), careful=tape.own_functions, warmup=tape.warmup)
