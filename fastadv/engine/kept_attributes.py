"""Putting back the plain attributes that a model's passes change."""

from __future__ import annotations

import collections
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastadv.engine.networks import SIMPLE, TORCHS_ATTRIBUTES

_CONTAINERS = (list, dict, set, collections.deque, collections.OrderedDict, collections.defaultdict)
_MAX_DEPTH = 3  # of containers in containers that are searched for tensors
_ABSENT = object()


@contextmanager
def kept_attributes(
    parts: Sequence[nn.Module], tensors_only: bool | Callable[[], bool]
) -> Iterator[None]:
    """Put back the plain attributes of modules, and the entries of the containers among them, on leaving.

    Args:
        parts: the modules.
        tensors_only: put back what held tensors, or holds them now, such as a neuron's voltage, with which the
            caller's next pass would begin. Other attributes stay as the passes leave them, such as a count of
            passes. A function is asked on leaving.
    """
    saved = [(module, dict(vars(module))) for module in parts]
    containers = [
        (container, container.copy())
        for _, attributes in saved
        for name, value in attributes.items()
        if type(value) not in SIMPLE and name not in TORCHS_ATTRIBUTES and _may_be_searched(value)
        for container in _containers(value)
    ]

    def goes_back(now: object, before: object) -> bool:
        return not only_tensors or _holds_tensor(now) or _holds_tensor(before)

    try:
        yield
    finally:
        only_tensors = tensors_only() if callable(tensors_only) else tensors_only
        for module, attributes in saved:
            current = vars(module)
            if _has_entries_of(current, attributes):
                continue
            for name in [n for n in current if n not in attributes]:
                if goes_back(current[name], None):
                    del current[name]
            for name, value in attributes.items():
                now = current.get(name, _ABSENT)
                if now is not value and goes_back(now, value):
                    current[name] = value
        for container, before in containers:
            if not _has_entries_of(container, before) and goes_back(container, before):
                container.clear()
                (container.extend if hasattr(container, "extend") else container.update)(before)


def _containers(value: object, depth: int = _MAX_DEPTH) -> Iterator[Any]:
    """A container and those among its entries, which a pass may change as well."""
    if type(value) in _CONTAINERS:
        yield value
    if depth > 0 and _holds_containers(value):
        for entry in _entries(value):
            yield from _containers(entry, depth - 1)


def _holds_containers(value: Any) -> bool:
    """Whether an entry of a container may be searched; asked of the types, as a memory bank has many entries."""
    if not _may_be_searched(value):
        return False
    if SIMPLE.issuperset(map(type, value)) and not isinstance(value, dict):
        return False  # most tuples: of numbers
    kinds = set(map(type, value))
    if isinstance(value, dict):
        kinds.update(map(type, value.values()))
    return any(kind in _CONTAINERS or issubclass(kind, tuple) for kind in kinds)


def _has_entries_of(container: Any, before: Any) -> bool:
    """Whether a container holds the same objects as before, in the same order."""
    if len(container) != len(before):
        return False
    same = all(map(operator.is_, container, before))
    if isinstance(container, dict):
        return same and all(map(operator.is_, container.values(), before.values()))
    return same


def _may_be_searched(value: object) -> bool:
    # The type is asked, because `isinstance` reads the class of the value, which a weak reference may have lost.
    return type(value) in _CONTAINERS or issubclass(type(value), tuple)


def _entries(container: Any) -> Iterator[object]:
    for entry in container:
        yield entry
        if isinstance(container, dict):
            yield container[entry]


def _holds_tensor(value: object, depth: int = _MAX_DEPTH) -> bool:
    """Whether a value is a tensor, or a container with one in it."""
    if issubclass(type(value), torch.Tensor):
        return True
    return (
        depth > 0
        and _may_be_searched(value)
        and any(_holds_tensor(one, depth - 1) for one in _entries(value))
    )
