"""The common part of recordings: a network's operations for any number of images.

A recording holds the numbers of one batch size. Two recordings of different sizes tell which of these numbers grow
with the batch, and how. A later recording of any size is then compared with the numbers expected for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastadv.engine.errors import DependsOnBatch, Unrecordable
from fastadv.engine.recording import RecordedOp, Recording, Ref, refs

_VARIES = "its operations depend on the number of images, or change from call to call"


class BatchNumber(NamedTuple):
    """An integer that depends on the batch size B: ``per_image * B + constant``."""

    per_image: int
    constant: int

    def at(self, batch: int) -> int:
        """Its value."""
        return self.per_image * batch + self.constant


@dataclass(frozen=True)
class Tape:
    """A network's operations.

    Attributes:
        ops: with a `BatchNumber` in place of each integer that depends on the batch size.
        dynamic: by place, whether a value is computed anew in every pass; else it comes from a recording.
        output: the place of the logits.
        external: place, shape, dtype and device of each tensor that no op computes.
        only_batch: the one batch size that the tape holds for; None where it holds for all.
        own_functions: as in `Recording`.
        autocast: as in `Recording`.
        comparisons: as in `Recording`, with None in place of each comparison that depends on the batch size; None
            alone if the number of comparisons depends on it.
        warmup: calls in which the model may do something else, before each recording.
        by_mode: whether the model's code asks whether gradients are computed. It may then do something else
            without them, though recordings, which have them, show no change.
        hashes_sizes: as in `Recording`. The model may then take another tensor from a cache where nothing watches.
    """

    ops: tuple[RecordedOp, ...]
    dynamic: tuple[bool, ...]
    output: int
    external: tuple[Any, ...]
    only_batch: int | None
    own_functions: bool
    autocast: bool
    comparisons: tuple[float | None, ...] | None
    warmup: int = 0
    by_mode: bool = False
    hashes_sizes: bool = False

    @property
    def decides_by_batch(self) -> bool:
        """Whether the model's code may decide by the batch size, so that few images do not tell for many."""
        return self.comparisons is None or None in self.comparisons

    @property
    def needs_plain_pass(self) -> bool:
        """Whether a proof also needs the logits of a pass without gradients, which nothing watches."""
        return self.by_mode or self.hashes_sizes

    @property
    def holds_for_any_batch(self) -> bool:
        """Whether few images tell what the model does with any number of images."""
        return self.only_batch is None and not self.decides_by_batch

    def describes(self, recording: Recording) -> bool:
        """Whether the network of a recording is this one."""
        batch = recording.images.shape[0]
        if self.only_batch not in (None, batch) or len(self.ops) != len(recording.ops):
            return False
        if self.output != recording.output or self.autocast != recording.autocast:
            return False
        if self.external != _external(recording) or not self._compares_alike(recording.comparisons):
            return False
        return all(
            _same_head(mine, theirs)
            and _same(mine.args, theirs.args, batch)
            and _same(mine.kwargs, theirs.kwargs, batch)
            for mine, theirs in zip(self.ops, recording.ops, strict=True)
        )

    def _compares_alike(self, comparisons: list[float]) -> bool:
        if self.comparisons is None:
            return True
        return len(comparisons) == len(self.comparisons) and all(
            mine in (None, theirs)
            for mine, theirs in zip(self.comparisons, comparisons, strict=True)
        )


def tape_of(first: Recording, second: Recording) -> Tape:
    """The tape of two recordings of one model on batches of different sizes and contents.

    Raises:
        Unrecordable: they do not describe one network.
    """
    sizes = (first.images.shape[0], second.images.shape[0])
    if len(first.ops) != len(second.ops) or first.output != second.output:
        raise DependsOnBatch(_VARIES)
    merged = []
    for a, b in zip(first.ops, second.ops, strict=True):
        if not _same_head(a, b):
            raise DependsOnBatch(_VARIES)
        args, kwargs = _merged((a.args, a.kwargs), (b.args, b.kwargs), sizes)
        merged.append(
            RecordedOp(a.function, args, kwargs, a.place, a.with_gradient, a.writes, a.result_dim)
        )
    if not same_tensors(first, second):
        raise DependsOnBatch(_VARIES)
    return _tape(
        first, tuple(merged), None, _merged_comparisons(first.comparisons, second.comparisons)
    )


def same_tensors(first: Recording, second: Recording) -> bool:
    """Whether two recordings of the same operations used the same tensors of the model.

    Of recordings of different images this also says that no tensor was made of the images unseen.
    """
    pairs = ((first.values[place], second.values[place]) for place in first.external())
    return all(one is other or _equal(one, other) for one, other in pairs)


def tape_for_one_size(recording: Recording) -> Tape:
    """The tape of one recording, which holds for its batch size alone.

    Raises:
        Unrecordable: no copy can be made of the recording.
    """
    return _tape(recording, tuple(recording.ops), recording.images.shape[0], None)


def _merged_comparisons(one: list[float], other: list[float]) -> tuple[float | None, ...] | None:
    if len(one) != len(other):
        return None
    return tuple(a if a == b else None for a, b in zip(one, other, strict=True))


def _external(recording: Recording) -> tuple[Any, ...]:
    tensors = ((place, recording.values[place]) for place in recording.external())
    return tuple((place, t.shape, t.dtype, t.device) for place, t in tensors)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    return torch.equal(one.nan_to_num(), other.nan_to_num())


def _tape(
    recording: Recording,
    ops: tuple[RecordedOp, ...],
    only_batch: int | None,
    comparisons: tuple[float | None, ...] | None,
) -> Tape:
    dynamic = _dynamic(recording, ops)
    if not dynamic[recording.output]:
        raise Unrecordable("its logits do not depend on the images")
    return Tape(
        ops,
        dynamic,
        recording.output,
        _external(recording),
        only_batch,
        recording.own_functions,
        recording.autocast,
        comparisons,
        hashes_sizes=recording.hashes_sizes,
    )


def _dynamic(recording: Recording, ops: tuple[RecordedOp, ...]) -> tuple[bool, ...]:
    """Which values are computed anew: those that depend on the images, on their number, or are overwritten."""
    dynamic = list(recording.depends)
    computed = {op.place for op in ops}
    for place in recording.overwritten:
        dynamic[place] = dynamic[place] or place in computed
    for op in ops:
        sources = [ref.place for ref in refs((op.args, op.kwargs))]
        if _has_batch_number((op.args, op.kwargs)) or any(dynamic[s] for s in sources):
            dynamic[op.place] = True
    for op in ops:
        for ref in refs((op.args, op.kwargs)):
            spoiled = ref.place in recording.overwritten and not dynamic[ref.place]
            if dynamic[op.place] and spoiled:
                raise Unrecordable("its forward writes into the model's own tensors")
    return tuple(dynamic)


def same_call(a: RecordedOp, b: RecordedOp, same_mode: bool = True) -> bool:
    """Whether two recordings of one number of images have the same op.

    Args:
        a: the op of one.
        b: the op of the other.
        same_mode: whether gradients must be enabled in both, or in neither.
    """
    return _same_head(a, b, same_mode) and _same(a.args, b.args, 0) and _same(a.kwargs, b.kwargs, 0)


def _same_head(a: RecordedOp, b: RecordedOp, same_mode: bool = True) -> bool:
    """Whether two ops call one function in the same way, whatever their arguments."""
    return (
        (a.function is b.function or a.function == b.function)
        and a.place == b.place
        and (a.with_gradient == b.with_gradient or not same_mode)
        and a.writes == b.writes
        and a.result_dim == b.result_dim
    )


def _same(mine: Any, theirs: Any, batch: int) -> bool:
    """Whether recorded arguments are those of the tape at this batch size."""
    if mine.__class__ in _COMPARABLE and mine.__class__ is theirs.__class__:
        return bool(mine == theirs)  # as most arguments can be
    if isinstance(mine, BatchNumber):
        return type(theirs) is int and theirs == mine.at(batch)
    if type(mine) is not type(theirs):
        return False
    if isinstance(mine, (tuple, list)):
        return len(mine) == len(theirs) and all(
            _same(a, b, batch) for a, b in zip(mine, theirs, strict=True)
        )
    if isinstance(mine, dict):
        return mine.keys() == theirs.keys() and all(_same(mine[k], theirs[k], batch) for k in mine)
    if isinstance(mine, slice):
        return all(
            _same(getattr(mine, part), getattr(theirs, part), batch)
            for part in ("start", "stop", "step")
        )
    return _same_number(mine, theirs)


_COMPARABLE = frozenset((int, bool, str, type(None), Ref))


def _same_number(mine: Any, theirs: Any) -> bool:
    if mine is theirs:
        return True
    try:
        return bool(mine == theirs) or (mine != mine and theirs != theirs)
    except (TypeError, ValueError, RuntimeError):  # arrays and other objects that do not compare
        return False


def _merged(a: Any, b: Any, sizes: tuple[int, int]) -> Any:
    """Arguments that two recordings share, their batch numbers found."""
    if type(a) is int and type(b) is int and a != b:
        slope, rest = divmod(b - a, sizes[1] - sizes[0])
        if rest:
            raise Unrecordable(
                "a number of its forward depends on the batch size in an unknown way"
            )
        return BatchNumber(slope, a - slope * sizes[0])
    if type(a) is not type(b):
        raise DependsOnBatch(_VARIES)
    if isinstance(a, Ref):
        if a != b:
            raise DependsOnBatch(_VARIES)
        return a
    if isinstance(a, (tuple, list)) and len(a) == len(b):
        items = [_merged(x, y, sizes) for x, y in zip(a, b, strict=True)]
        return items if isinstance(a, list) else tuple(items)
    if isinstance(a, dict) and a.keys() == b.keys():
        return {k: _merged(a[k], b[k], sizes) for k in a}
    if isinstance(a, slice):
        parts = ("start", "stop", "step")
        return slice(*(_merged(getattr(a, p), getattr(b, p), sizes) for p in parts))
    if _same_number(a, b):
        return a
    raise DependsOnBatch(_VARIES)


def _has_batch_number(value: Any) -> bool:
    if isinstance(value, BatchNumber):
        return True
    if isinstance(value, (tuple, list)):
        return any(_has_batch_number(item) for item in value)
    if isinstance(value, dict):
        return _has_batch_number(tuple(value.values()))
    return isinstance(value, slice) and _has_batch_number((value.start, value.stop, value.step))
