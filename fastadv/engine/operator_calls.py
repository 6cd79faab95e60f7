"""The operators that a pass of a program calls, recorded once, so that later passes call them and nothing else.

A program's Python code finds memory, shapes and the order of the operators anew in each pass, and autograd builds
a graph for some steps. For images of the same shape and layout the same calls come out each time. For small
networks finding them takes longer than the operators themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fastadv.engine.operands import storage_of, tensors_in

_KNOWN = frozenset(("aten", "prims", "mkldnn", "fastadv"))
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_REFUSED = (
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.inplace_view,
    torch.Tag.nondeterministic_seeded,
)


@dataclass(frozen=True)
class Place:
    """Stands in recorded arguments for a tensor that each pass makes anew."""

    number: int


@dataclass
class Call:
    """One call of an operator.

    Attributes:
        operator: the operator.
        args: its arguments, with a `Place` for each tensor of the pass.
        kwargs: in the same way.
        holes: position and number of each place, if all are positional arguments; None where one lies deeper.
        result: the number of the result's place, or a list for several results; None for results without a place.
        last: the places that no later call reads.
    """

    operator: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    holes: tuple[tuple[int, int], ...] | None
    result: int | list[int | None] | None
    last: tuple[int, ...] = ()

    def run(self, values: list[Any]) -> None:
        """Call the operator on the values of a pass, by place, and put its results there."""
        if self.holes is None:
            args = _mapped(self.args, lambda a: values[a.number] if type(a) is Place else a)
            kwargs = _mapped(self.kwargs, lambda a: values[a.number] if type(a) is Place else a)
            result = self.operator(*args, **kwargs)
        else:
            filled = list(self.args)
            for position, number in self.holes:
                filled[position] = values[number]
            result = self.operator(*filled, **self.kwargs)
        if type(self.result) is int:
            values[self.result] = result
        elif isinstance(self.result, list):
            for place, part in zip(self.result, result, strict=True):
                if place is not None:
                    values[place] = part
        for number in self.last:
            values[number] = None


class CallRecorder(TorchDispatchMode):
    """Records the operators that run while it is entered. It changes no result.

    Tensors that are no result of a recorded call are constants, such as weights, and so are views of constants.

    Args:
        in_memory: whether a tensor lies in memory whose contents each pass replaces.

    Attributes:
        fault: why the calls cannot stand for another pass; None while they can.
        calls: in their order.
        places: the number of places.
    """

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """As in `fastadv.engine.unseen_operations.UnseenOperations`."""
        return False

    def __init__(self, in_memory: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.fault: str | None = None
        self.calls: list[Call] = []
        self.places = 0
        self._in_memory = in_memory
        self._constants: dict[int, Tensor] = {}  # by id, alive
        # By storage, and then by the elements that a tensor has of it, as autograd wraps its saved tensors anew.
        # No tensor is kept, so that a recorded pass takes no more memory than another.
        self._places: dict[int, dict[Hashable, Place]] = {}
        self._known: list[StorageWeakRef | Tensor] = []  # so that no new storage takes over a key

    @property
    def constants(self) -> Collection[Tensor]:
        """The tensors that the calls hold."""
        return self._constants.values()

    def add(self, tensor: Tensor) -> Place:
        """The place of a tensor that is new in each pass."""
        place = Place(self.places)
        self.places += 1
        self._stands(place, tensor)
        return place

    def source_of(self, tensor: Tensor) -> Place | Tensor | None:
        """The place of a tensor, or the tensor itself if it is a constant; None if it is neither."""
        if id(tensor) in self._constants:
            return tensor
        places = self._places.get(storage_of(tensor))
        if places is not None:
            return places.get(_elements_of(tensor))
        self._constants[id(tensor)] = tensor
        return tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operator, and record it."""
        kwargs = kwargs or {}
        self.fault = self.fault or _fault_of(func, types)
        if self.fault is not None:
            return func(*args, **kwargs)
        sources = {id(t): self.source_of(t) for t in tensors_in((args, kwargs))}
        written = [sources[id(t)] for t in tensors_in(_written(func, args, kwargs))]
        result = func(*args, **kwargs)
        if None in sources.values():
            self.fault = f"{func} takes a view that no call has made"
        elif any(isinstance(t, Tensor) and not self._in_memory(t) for t in written):
            self.fault = f"{func} writes to a constant"
        else:
            self._record(func, args, kwargs, result, sources)
        return result

    def _record(
        self, func: Any, args: Any, kwargs: Any, result: Any, sources: Mapping[int, Any]
    ) -> None:
        several = isinstance(result, (tuple, list))
        parts = list(result) if several else [result]
        if not all(part is None or isinstance(part, Tensor) for part in parts):
            self.fault = f"{func} returns no tensor"
            return
        if func.is_view and all(isinstance(source, Tensor) for source in sources.values()):
            self._constants |= {id(part): part for part in parts}
            return
        if func is torch.ops.aten.detach.default:
            self._stands(sources[id(args[0])], result)
            return
        numbers = [
            None if part is None or self._has(part) else self.add(part).number for part in parts
        ]
        args, kwargs = (
            _mapped(given, lambda a: sources[id(a)] if isinstance(a, Tensor) else a)
            for given in (args, kwargs)
        )
        holes = tuple((i, a.number) for i, a in enumerate(args) if isinstance(a, Place))
        are_all = len(holes) == len(list(_numbers_in((args, kwargs))))
        self.calls.append(
            Call(func, args, kwargs, holes if are_all else None, numbers if several else numbers[0])
        )

    def _has(self, tensor: Tensor) -> bool:
        places = self._places.get(storage_of(tensor), {})
        return id(tensor) in self._constants or _elements_of(tensor) in places

    def _stands(self, place: Place, tensor: Tensor) -> None:
        storage = storage_of(tensor)
        if storage not in self._places:
            has_one = tensor.layout == torch.strided
            self._known.append(StorageWeakRef(tensor.untyped_storage()) if has_one else tensor)
        self._places.setdefault(storage, {}).setdefault(_elements_of(tensor), place)


def unrecorded() -> AbstractContextManager[None]:
    """Within, a `CallRecorder` sees no operator, so that their results are constants of the pass.

    This is for memory and packed weights, which a program makes in one pass and uses in many.
    """
    context: AbstractContextManager[None] = torch._C._DisableTorchDispatch()
    return context


def drop_early(calls: Sequence[Call], kept: Collection[int]) -> None:
    """Let each call drop the tensors of the places that no later call reads, but for the places that are kept."""
    seen = set(kept)
    for call in reversed(calls):
        used = {*_numbers_in((call.args, call.kwargs)), *_results_of(call)}
        call.last = tuple(used - seen)
        seen |= used


def _results_of(call: Call) -> list[int]:
    results = call.result if isinstance(call.result, list) else [call.result]
    return [number for number in results if number is not None]


def _fault_of(func: Any, types: Any) -> str | None:
    """Why a call of an operator cannot be recorded."""
    if not _PLAIN.issuperset(types):
        return "a subclass of Tensor has operators of its own"
    if not isinstance(func, torch._ops.OpOverload) or func.namespace not in _KNOWN:
        return f"{func} is an operator of others"
    tags = [tag.name for tag in _REFUSED if tag in func.tags]
    return f"{func} is marked {tags[0]}" if tags else None


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that an operator writes to."""
    return [
        args[position] if position < len(args) else kwargs.get(argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _elements_of(tensor: Tensor) -> Hashable:
    """Equal for two tensors of one storage that are the same elements in the same order."""
    if tensor.layout != torch.strided:
        return tensor.layout
    place = tensor.storage_offset(), tensor.shape, tensor.stride()
    return tensor.dtype, *place, tensor.is_conj(), tensor.is_neg()


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Nested arguments with each value changed."""
    if type(value) in (tuple, list):
        return type(value)(_mapped(part, change) for part in value)
    if type(value) is dict:
        return {name: _mapped(part, change) for name, part in value.items()}
    return change(value)


def _numbers_in(value: Any) -> Iterator[int]:
    """The places in nested arguments."""
    if type(value) in (tuple, list):
        for part in value:
            yield from _numbers_in(part)
    elif type(value) is dict:
        yield from _numbers_in(list(value.values()))
    elif type(value) is Place:
        yield value.number
