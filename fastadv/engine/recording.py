"""The content of a recording of a forward pass: every torch function that the model called, with its arguments.

Two recordings that are equal describe the same network, and this is how a copy is proven at every use. Results
that do not depend on the images (weights, and tensors that the forward pass derives from weights) are taken from
the recording without changes. So a copy gets the weights that the live model has just used. See
`fastadv.engine.recorder`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Ref(NamedTuple):
    """A tensor in a recording, by its place: 0 is the batch of images."""

    place: int


@dataclass(frozen=True)
class ArrayArgument:
    """An array of numpy's among the arguments of a function, by its content."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes

    @staticmethod
    def of(array: np.ndarray[Any, Any]) -> ArrayArgument:
        """The content that an array has now."""
        return ArrayArgument(array.dtype.str, array.shape, array.tobytes())

    def entries(self) -> list[Any]:
        """Its entries as nested lists."""
        array = np.frombuffer(self.content, self.dtype).reshape(self.shape)
        entries: list[Any] = array.tolist()
        return entries


@dataclass(frozen=True)
class RecordedOp:
    """One call of a torch function.

    Attributes:
        function: the function, as `torch.overrides` names it.
        args: the positional arguments, with a `Ref` in place of each tensor.
        kwargs: the arguments by keyword, with a `Ref` in place of each tensor.
        place: place of the result.
        with_gradient: whether gradients were enabled.
        writes: whether it changes its first argument in place; the result is then this argument's new value.
        result_dim: number of axes of the result; None if it is not a single tensor.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int
    with_gradient: bool
    writes: bool
    result_dim: int | None


@dataclass
class Recording:
    """One forward pass.

    Attributes:
        ops: in the order of the calls.
        values: every tensor by its place. A tensor that no op computes is a weight or another tensor of the model.
        depends: by place, whether the tensor depends on the images.
        overwritten: places of tensors whose values an op has changed since.
        images: the images, a leaf that requires grad.
        logits: the model's result, with its autograd graph.
        output: the place of the result.
        gradients: whether the autograd graph was kept.
        autocast: whether the forward pass enters autocast.
        own_functions: whether it calls an autograd function of its own.
        comparisons: comparisons of sizes by the model's code, as in `SizeComparisons.seen`.
        hashes_sizes: as in `SizeComparisons.hashed`.
        forward_seconds: of a plain forward pass of the model, for each image; 0 if none was timed.
    """

    ops: list[RecordedOp] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    depends: list[bool] = field(default_factory=list)
    overwritten: set[int] = field(default_factory=set)
    images: Tensor = field(
        default_factory=lambda: torch.empty(0, device="cpu", dtype=torch.float32)
    )
    logits: Tensor = field(
        default_factory=lambda: torch.empty(0, device="cpu", dtype=torch.float32)
    )
    output: int = -1
    gradients: bool = True
    autocast: bool = False
    own_functions: bool = False
    comparisons: list[float] = field(default_factory=list)
    hashes_sizes: bool = False
    forward_seconds: float = 0.0

    def external(self) -> list[int]:
        """Places of the tensors that no op computes, the images aside."""
        computed = {op.place for op in self.ops}
        return [p for p in range(1, len(self.values)) if p not in computed]


def item(values: Any, number: int) -> Any:
    """One of several results."""
    return values[number]


_PLAIN = frozenset((int, float, bool, str, type(None)))  # most arguments


def refs(value: Any) -> Iterator[Ref]:
    """The references in nested arguments."""
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            if item.__class__ is Ref:
                yield item
            elif item.__class__ not in _PLAIN:
                yield from refs(item)
    elif isinstance(value, dict):
        yield from refs(tuple(value.values()))
    elif isinstance(value, slice):
        yield from refs((value.start, value.stop, value.step))
