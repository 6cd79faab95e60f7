"""A pass of a model that computes no operation on the images which is that of an earlier recording.

All of the model's own code runs, and so do operations on its weights. A call of torch with the arguments of the
recorded call at its place passes each check that the recorded call has passed. So such a call is compared with the
recorded one, and is not checked again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadv.engine import ragged
from fastadv.engine import recorded_functions as functions
from fastadv.engine.operands import count_write
from fastadv.engine.recorder import Recorder
from fastadv.engine.recording import RecordedOp, Ref
from fastadv.engine.tape import same_call
from fastadv.engine.watched_size import WatchedSize


class MadeTensor(NamedTuple):
    """What an operation on the images makes, which is one tensor in memory of its own.

    Attributes:
        shape: a tensor without memory, of the same shape and order of elements.
        requires_grad: whether it requires grad.
        is_all: whether the operation can do nothing else, and the shape depends on no values.
    """

    shape: Tensor
    requires_grad: bool
    is_all: bool

    @staticmethod
    def of(op: RecordedOp, value: Tensor) -> MadeTensor:
        """The result of an operation."""
        shape = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        name = functions.name_of(op.function)
        is_all = not functions.may_write(name, op.kwargs) and not ragged.may_decide(name)
        return MadeTensor(shape, value.requires_grad, is_all)

    def blank(self, device: torch.device) -> Tensor:
        """Memory for such a result, whatever it holds; whole numbers are 0."""
        like = self.shape
        made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
        return made if made.is_floating_point() else made.zero_()


class Repeat(Recorder):
    """Records, and computes no operation on the images that is that of an earlier recording.

    Args:
        images: of that recording.
        ops: its operations.
        results: the results, by place, of operations on the images that make new memory.
        gradients: whether gradients are computed in this pass. They were in the recording.
    """

    def __init__(
        self,
        images: Tensor,
        ops: Sequence[RecordedOp],
        results: dict[int, MadeTensor],
        gradients: bool = True,
    ) -> None:
        super().__init__(images)
        self._ops, self._results, self._gradients = ops, results, gradients
        # Made here, where nothing watches torch's functions.
        self._blanks = {place: result.blank(images.device) for place, result in results.items()}
        self._compared, self._alike = 0, True  # operations so far; whether they are those recorded

    def is_complete(self) -> bool:
        """Whether the pass has shown the recorded operations, all of them and no others."""
        return self._is_alike() and len(self.recording.ops) == len(self._ops)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """As in `Recorder.__torch_function__`."""
        number = len(self.recording.ops)
        if number < len(self._ops) and not self.inside:
            then = self._ops[number]
            if func is then.function and self._is_repeated(then, args, kwargs or {}):
                self._note_surroundings()
                result = self._blank(then.place)
                self.recording.ops.append(then)
                self._places.add(result, depends=True)
                return result
        return super().__torch_function__(func, types, args, kwargs)

    def _is_repeated(self, then: RecordedOp, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call does what the recorded one did, which was to make a tensor of the images, and no more."""
        result = self._results.get(then.place)
        if result is None or not result.is_all or self._ragged:
            return False
        if self._gradients and then.with_gradient != torch.is_grad_enabled():
            return False
        if len(args) != len(then.args) or kwargs.keys() != then.kwargs.keys():
            return False
        recorded = map(then.kwargs.__getitem__, kwargs)
        if not self._is_alike() or not self._are(args, then.args):
            return False
        return self._are(kwargs.values(), recorded) and then.place == len(self.recording.values)

    def _are(self, values: Iterable[Any], then: Iterable[Any]) -> bool:
        """Whether arguments are those recorded; weights get their places, as in `Recorder.referred`."""
        return all(map(self._is, values, then))

    def _is(self, value: Any, then: Any) -> bool:
        kind, wanted = value.__class__, then.__class__
        if wanted is Ref:
            return isinstance(value, Tensor) and self._place(value) == then.place
        if kind is WatchedSize:
            return wanted is int and bool(value.plain() == then)
        if kind is not wanted:
            return False
        if kind in functions.KEPT:
            return bool(value == then)
        if kind is tuple or kind is list:
            return len(value) == len(then) and self._are(value, then)
        return False

    def _is_alike(self) -> bool:
        """Whether all operations so far are those recorded."""
        ops = self.recording.ops
        while self._alike and self._compared < len(ops):
            number = self._compared
            self._alike = number < len(self._ops) and (
                ops[number] is self._ops[number]
                or same_call(ops[number], self._ops[number], self._gradients)
            )
            self._compared += 1
        return self._alike

    def _blank(self, place: int) -> Tensor:
        result = self._results[place]
        tracked = result.requires_grad and (self._gradients or torch.is_grad_enabled())
        made = self._blanks.pop(place)
        return made.requires_grad_() if tracked else made

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As in `Recorder.call`."""
        number = len(self.recording.ops)
        then = self._ops[number] if number < len(self._ops) else None
        if then is None or func is not then.function:
            return super().call(func, args, kwargs)
        known = then.place in self._blanks
        writes = then.writes and bool(args) and self._places.depends(args[0])
        if not known and not writes:
            return super().call(func, args, kwargs)
        self._referred = self.referred(args), self.referred(kwargs)
        same = self._referred == (then.args, then.kwargs)
        if not same or (self._gradients and then.with_gradient != torch.is_grad_enabled()):
            return super().call(func, args, kwargs)
        if known:
            return self._blank(then.place)
        count_write(args[0])
        return args[0]
