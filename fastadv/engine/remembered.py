"""See at little cost that a model has not changed since the proof of its copy.

A recording costs a forward pass of two images. Most of the time nothing has changed since the last one, and every
convolution would give the same numbers again. So the model runs on the images of that recording. All of its own
code runs, and so do small operations. A costly operation whose arguments are those of the recording is not
computed; its recorded result is returned. The model is unchanged if this pass shows the recorded operations, and
if all weights that they use have the recorded content, bit for bit.
"""

from __future__ import annotations

import types
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.engine.content import content
from fastadv.engine.holding import held
from fastadv.engine.recorder import Recorder, storage_of
from fastadv.engine.recording import RecordedOp, Recording, item

# Functions of their arguments alone, built into torch. All others run.
_COSTLY = frozenset(
    (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose2d, F.conv_transpose3d, F.linear,
     F.scaled_dot_product_attention, torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__)
)  # fmt: skip
_MOST_BYTES = 2**27  # of results that are kept: two images of 224 x 224 in ConvNeXt-T are 103 MB
_MOST_WASTED = 2  # proofs in a row that are remembered though the weights change before each use
_WITHOUT_GRADIENTS = 15  # proofs in a row by logits alone, while the weights change before each use


class Remembered:
    """One recording on the CPU, without its model.

    Args:
        recording: of a few images.
        results: of its costly operations, by place.
        weights: the `content` of the tensors that no operation computes.
    """

    def __init__(
        self, recording: Recording, results: dict[int, Tensor], weights: tuple[Any, ...]
    ) -> None:
        self._images = recording.images.detach().clone()
        self._ops, self._results, self._weights = list(recording.ops), results, weights
        self._default_dtype = torch.get_default_dtype()

    @staticmethod
    def of(recording: Recording) -> Remembered | None:
        """None where it cannot be remembered: on a GPU, of a large network, with other people's operators."""
        if recording.autocast or recording.own_functions:
            return None
        if not all(_is_torchs(op.function) for op in recording.ops):
            return None
        weights = content([recording.values[place] for place in recording.external()])
        if weights is None or recording.images.device.type != "cpu":
            return None
        overwritten = {storage_of(recording.values[place]) for place in recording.overwritten}
        results = {}
        for op in recording.ops:
            value = recording.values[op.place]
            costly = op.function in _COSTLY and type(value) is Tensor
            if costly and storage_of(value) not in overwritten:
                results[op.place] = value.detach().requires_grad_(value.requires_grad)
        if sum(result.nbytes for result in results.values()) > _MOST_BYTES:
            return None
        return Remembered(recording, results, weights)

    def repeated(self, model: nn.Module) -> Recording | None:
        """A recording of now, of the same images; None where weights differ or the model fails.

        Where the recording shows another network, this object must not be used again: an operation that was not
        there may have written into the results.
        """
        with held(model):
            return self.again(model)

    def again(self, model: nn.Module) -> Recording | None:
        """As `repeated`, of a model that is `held`."""
        if torch.get_default_dtype() != self._default_dtype:
            return None
        try:
            with torch.enable_grad():
                recording = _Repeat(self._images, self._ops, self._results).run(model)
        except Exception:  # if it is the model's own, the pass that comes instead raises it again
            return None
        now = content([recording.values[place] for place in recording.external()])
        return recording if now == self._weights else None


def _is_torchs(function: Any) -> bool:
    """Whether the result of a function depends only on its arguments.

    Operators and autograd functions that others have added to torch may look at whatever they like.
    """
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return False
    if isinstance(function, (types.FunctionType, types.MethodType)):
        return function is item or function.__module__.startswith("torch.")
    return True  # built in


class Changes:
    """Whether a model's weights have changed since the last proof of its copy, as far as torch counts it.

    In training they have at every use. A look at torch's counters then saves the pass that `Remembered` repeats,
    and the hash of all weights is not taken for nothing. Writing past the counters is seen by that pass.
    """

    def __init__(self) -> None:
        self._versions: list[tuple[weakref.ref[Tensor], int]] = []
        self._wasted = 0  # proofs in a row that were remembered for nothing
        self._by_logits = 0  # proofs since gradients were compared

    def are_certain(self) -> bool:
        """Whether a tensor of the last proof has been written to."""
        for place, version in self._versions:
            tensor = place()
            if tensor is not None and tensor._version != version:
                return True
        return False

    def used(self) -> None:
        """Note that a remembered proof has served."""
        self._wasted = -1  # the next change does not come too early

    def gradients_are_due(self) -> bool:
        """Whether the next proof is to compare gradients; asked once for each proof.

        In a narrow precision other weights can have right logits and wrong gradients. In training the weights
        change a little before each use, so that some proofs in a row may do without.
        """
        in_training = self._wasted + 1 >= _MOST_WASTED and self.are_certain()
        due = not in_training or self._by_logits >= _WITHOUT_GRADIENTS
        self._by_logits = 0 if due else self._by_logits + 1
        return due

    def worth_remembering(self, recording: Recording) -> bool:
        """Note a new proof; whether one like it is likely to serve again."""
        self._wasted = self._wasted + 1 if self.are_certain() else 0
        tensors = (recording.values[place] for place in recording.external())
        self._versions = [(weakref.ref(t), t._version) for t in tensors if not t.is_inference()]
        return self._wasted < _MOST_WASTED


class _Repeat(Recorder):
    """Records, and takes the results of costly operations from an earlier recording of the same images."""

    def __init__(self, images: Tensor, ops: list[RecordedOp], results: dict[int, Tensor]) -> None:
        super().__init__(images)
        self._ops, self._results = ops, results

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As in `Recorder.call`."""
        number = len(self.recording.ops)
        then = self._ops[number] if number < len(self._ops) else None
        kept = self._results.get(then.place) if then is not None else None
        if then is None or kept is None or func is not then.function:
            return super().call(func, args, kwargs)
        same = then.args == self.referred(args) and then.kwargs == self.referred(kwargs)
        if not same or then.with_gradient != torch.is_grad_enabled():
            return super().call(func, args, kwargs)
        return kept.view_as(kept)  # the kept tensor is a leaf, for which a model may ask
