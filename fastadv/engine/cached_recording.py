"""Checking at little cost that a model has not changed since the proof of its copy.

A recording costs a forward pass of two images. Most of the time nothing has changed since the last one, and every
operation would give the same numbers again. So the model runs on the images of that recording: all of its own code
runs, and so do operations on its weights. An operation on the images whose arguments are those of the recording is
not computed; its result is memory of the same shape. The model is unchanged if this pass shows the recorded
operations, and if all weights that they use have the recorded content, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastadv.engine import proof
from fastadv.engine.content import content
from fastadv.engine.hidden_draws import is_torchs
from fastadv.engine.networks import modules_of
from fastadv.engine.operands import version_of
from fastadv.engine.outline import makes_new
from fastadv.engine.recording import Recording
from fastadv.engine.recording_mode import recording_mode, warm_up
from fastadv.engine.repeat import MadeTensor, Repeat

_MOST_WASTED = 2  # proofs in a row that are cached though the weights change before each use
_WITHOUT_GRADIENTS = 15  # proofs in a row by logits alone, while the weights change before each use


class CachedRecording:
    """One recording on the CPU, without its model.

    Args:
        recording: of a few images.
        weights: the `content` of the tensors that no operation computes.
        warmup: as in `fastadv.engine.recorder.record`.

    Attributes:
        seconds: of the first `is_unchanged`, as far as it has been timed.
    """

    def __init__(self, recording: Recording, weights: tuple[Any, ...], warmup: int = 0) -> None:
        self.images = recording.images.detach().clone()
        self._weights, self._warmup = weights, warmup
        results = {
            op.place: MadeTensor.of(op, recording.values[op.place])
            for op in recording.ops
            if recording.depends[op.place] and not op.writes and makes_new(op, recording)
        }
        self._outcome = (recording.output, tuple(recording.comparisons), recording.autocast)
        self._ops, self._results = list(recording.ops), results
        self._default_dtype = torch.get_default_dtype()
        self.seconds = 0.0

    @staticmethod
    def of(recording: Recording, warmup: int = 0) -> CachedRecording | None:
        """None where it cannot be cached: on a GPU, and of a model with other people's operators."""
        if recording.autocast or recording.own_functions:
            return None
        if not all(is_torchs(op.function) for op in recording.ops):
            return None
        began = proof.seconds()
        weights = content([recording.values[place] for place in recording.external()])
        spent = proof.seconds() - began
        if weights is None or recording.images.device.type != "cpu":
            return None
        made = CachedRecording(recording, weights, warmup)
        made.seconds = spent
        return made

    def is_laid_out_like(self, x: Tensor) -> bool:
        """Whether the images in memory have the layout that other images [B, ...] have."""
        return torch.empty_like(x[:1], device="meta").stride()[1:] == self.images.stride()[1:]

    def is_unchanged(self, model: nn.Module, gradients: bool = True) -> bool:
        """Whether the model calls the recorded operations, no others, on the same numbers and weights.

        Args:
            model: the model.
            gradients: False lets it run, without warming up, where no gradients are computed.
        """
        with recording_mode(model):
            warm_up(model, self.images, self._warmup if gradients else 0)
            return self.again(model, gradients=gradients)

    def again(
        self,
        model: nn.Module,
        unchanged: Sequence[tuple[Tensor, int]] = (),
        gradients: bool = True,
    ) -> bool:
        """As `is_unchanged`, of a model that is in `recording_mode` and has warmed up.

        Args:
            model: the model.
            unchanged: weights, with torch's counts of their changes, that are taken to be as they were recorded.
            gradients: as in `is_unchanged`.
        """
        if torch.get_default_dtype() != self._default_dtype:
            return False
        repeat = Repeat(self.images, self._ops, self._results, gradients)
        try:
            with torch.set_grad_enabled(gradients):
                now = repeat.run(model)
        except Exception:  # if it is the model's own, the pass that comes instead raises it again
            return False
        outcome = (now.output, tuple(now.comparisons), now.autocast)
        alike = repeat.is_complete() and outcome == self._outcome
        return alike and self._has_weights_of(now, unchanged)

    def _has_weights_of(
        self, recording: Recording, unchanged: Sequence[tuple[Tensor, int]]
    ) -> bool:
        """Whether the weights of a pass have the recorded content; ``unchanged`` as in `again`."""
        weights = [recording.values[place] for place in recording.external()]
        known = {id(tensor) for tensor, version in unchanged if tensor._version == version}
        if len(weights) != len(self._weights):
            return False
        numbers = [number for number, tensor in enumerate(weights) if id(tensor) not in known]
        now = content([weights[number] for number in numbers])
        return now == tuple(self._weights[number] for number in numbers)


def counted_weights(recording: Recording) -> list[tuple[Tensor, int]]:
    """The weights that a recording has used, each with torch's count of its changes."""
    tensors = (recording.values[place] for place in recording.external())
    return [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]


class Changes:
    """Whether a model's weights have changed since the last proof of its copy, as far as torch counts it.

    In training they have at every use. A look at torch's counters then saves the pass that `CachedRecording`
    repeats, and the hash of all weights is not taken for nothing. Writing past the counters is seen by that pass.
    """

    def __init__(self) -> None:
        # By id, since torch cannot swap the contents of a tensor that has weak references.
        self._versions: dict[int, int] = {}
        self._wasted = 0  # proofs in a row that were cached for nothing
        self._by_logits = 0  # proofs since gradients were compared

    def are_certain(self, model: nn.Module) -> bool:
        """Whether a weight of the model has been written to since the last proof."""
        versions = self._versions
        for part in modules_of(model) if versions else ():
            for tensor in (*part._parameters.values(), *part._buffers.values()):
                version = versions.get(id(tensor))
                if version is not None and tensor is not None and version_of(tensor) != version:
                    return True
        return False

    def used(self) -> None:
        """Note that a cached recording has served."""
        self._wasted = -1  # the next change does not come too early

    def gradients_are_due(self, model: nn.Module) -> bool:
        """Whether the next proof is to compare gradients; asked once for each proof.

        In a narrow precision other weights can have right logits and wrong gradients. In training the weights
        change a little before each use, so that some proofs in a row may do without.
        """
        in_training = self._wasted + 1 >= _MOST_WASTED and self.are_certain(model)
        due = not in_training or self._by_logits >= _WITHOUT_GRADIENTS
        self._by_logits = 0 if due else self._by_logits + 1
        return due

    def worth_caching(self, model: nn.Module, recording: Recording) -> bool:
        """Note a new proof; whether one like it is likely to serve again."""
        self._wasted = self._wasted + 1 if self.are_certain(model) else 0
        tensors = (recording.values[place] for place in recording.external())
        self._versions = {id(tensor): version_of(tensor) for tensor in tensors}
        return self._wasted < _MOST_WASTED
