"""The numbers in which a model's code may count its calls; they show whether a call changes the model."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

from fastadv.engine.networks import held_by, items_of, modules_of

_DEEPEST = 2  # containers or objects within a module's attribute
_NUMBERS = (bool, int, float, str)


def plain_state(model: nn.Module) -> list[object]:
    """Numbers and words that modules hold, also in containers and plain objects.

    Two states of a model that has not counted anything are equal. An iterator, whose state nobody can see, makes
    every two of them differ.
    """
    seen: set[int] = set()
    held = (value for module in modules_of(model) for value in vars(module).items())
    numbers = [pair for pair in held if issubclass(type(pair[1]), _NUMBERS)]
    objects = [item for module in modules_of(model) for item in held_by(module)]
    return [*numbers, *(number for item in objects for number in _within(item, seen, _DEEPEST))]


def _within(value: Any, seen: set[int], depth: int) -> Iterator[object]:
    if type(value) in weakref.ProxyTypes:
        return  # its object may be gone
    if isinstance(value, _NUMBERS):
        yield value
    elif any("__next__" in vars(kind) for kind in type(value).__mro__):
        yield object()
    elif depth > 0 and id(value) not in seen and not isinstance(value, nn.Module):
        seen.add(id(value))
        for item in items_of(value):
            yield from _within(item, seen, depth - 1)
