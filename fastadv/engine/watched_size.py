"""Noticing the comparisons of sizes, such as the number of images, in a model's own code.

A rule such as ``if x.shape[0] >= 64`` leaves no trace among the operations of a few images. So a recording hands
the model its sizes as `WatchedSize`, integers that note each comparison.
"""

from __future__ import annotations

from typing import Any

import torch


class SizeComparisons:
    """The comparisons of sizes by a model's code.

    Attributes:
        seen: for each comparison, the size, or its distance from the number with which it was compared.
        on: whether comparisons are noted now; torch's own code does not count.
        hashed: whether a size was the key of a cache. `functools.lru_cache` tells it from a plain integer.
    """

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.on, self.hashed = True, False

    def note(self, value: float) -> None:
        """Add a comparison."""
        if self.on:
            self.seen.append(value)


class WatchedSize(int):
    """An integer that notes when code decides by it; sums and products of it do so, too."""

    _comparisons: SizeComparisons

    @staticmethod
    def of(value: int, comparisons: SizeComparisons) -> WatchedSize:
        """Watch a size."""
        made = WatchedSize(value)
        made._comparisons = comparisons
        return made

    def plain(self) -> int:
        """The integer alone."""
        return int.__add__(self, 0)

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (self.plain(),)


def watched(result: Any, comparisons: SizeComparisons) -> Any:
    """Sizes, as torch returned them, to be handed to the model."""
    if type(result) is int:
        return WatchedSize.of(result, comparisons)
    if isinstance(result, tuple):
        return torch.Size([WatchedSize.of(value, comparisons) for value in result])
    return result


def _computes(name: str) -> Any:
    plain = getattr(int, name)

    def method(self: WatchedSize, *others: Any) -> Any:
        result = plain(self, *others)
        if type(result) is int:
            return WatchedSize.of(result, self._comparisons)
        if isinstance(result, tuple):
            return tuple(WatchedSize.of(part, self._comparisons) for part in result)
        if result is not NotImplemented:
            self._comparisons.note(self.plain())  # a float, which is not watched
        return result

    return method


def _compares(name: str) -> Any:
    plain = getattr(int, name)

    def method(self: WatchedSize, other: Any) -> Any:
        if isinstance(other, (int, float)):
            self._comparisons.note(
                int.__sub__(self, other) if isinstance(other, int) else self.plain() - other
            )
        return plain(self, other)

    return method


def _shows(name: str) -> Any:
    plain = getattr(int, name)

    def method(self: WatchedSize, *others: Any) -> Any:
        self._comparisons.note(self.plain())
        return plain(self, *others)

    return method


_COMPUTING = ["add", "sub", "mul", "floordiv", "mod", "divmod", "pow", "truediv"]
_COMPARING = ["eq", "ne", "lt", "le", "gt", "ge"]
_SHOWING = [
    "bool",
    "int",
    "float",
    "str",
    "repr",
    "format",
    "round",
    "trunc",
    "floor",
    "ceil",
    "invert",
]
_BITWISE = ["and", "or", "xor", "lshift", "rshift"]


def _hash(self: WatchedSize) -> int:
    comparisons = self._comparisons
    comparisons.note(self.plain())
    comparisons.hashed = comparisons.hashed or comparisons.on
    return int.__hash__(self)


for _name in (*_COMPUTING, *(f"r{name}" for name in _COMPUTING), "neg", "pos", "abs"):
    setattr(WatchedSize, f"__{_name}__", _computes(f"__{_name}__"))
for _name in _COMPARING:
    setattr(WatchedSize, f"__{_name}__", _compares(f"__{_name}__"))
for _name in (*_SHOWING, *_BITWISE, *(f"r{name}" for name in _BITWISE)):
    setattr(WatchedSize, f"__{_name}__", _shows(f"__{_name}__"))
setattr(WatchedSize, "__hash__", _hash)  # noqa: B010, to mypy it is no attribute of an instance
