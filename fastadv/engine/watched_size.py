"""Notice that a model's own code looks at a size, such as the number of images, and what it compares it with.

A rule such as ``if x.shape[0] >= 64`` leaves no trace among the operations of a few images. So a recording hands
the model its sizes as `WatchedSize`, integers that note each look at them.
"""

from __future__ import annotations

from typing import Any

import torch


class Looks:
    """What a model's code has looked at.

    Attributes:
        seen: by look, the size, or how far it is from the number with which it was compared.
        on: whether looks are noted now; torch's own code does not count.
    """

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.on = True

    def note(self, value: float) -> None:
        """Add a look."""
        if self.on:
            self.seen.append(value)


class WatchedSize(int):
    """An integer that notes when code decides by it; sums and products of it do so, too."""

    _looks: Looks

    @staticmethod
    def of(value: int, looks: Looks) -> WatchedSize:
        """Watch a size."""
        made = WatchedSize(value)
        made._looks = looks
        return made

    def plain(self) -> int:
        """The integer alone."""
        return int.__add__(self, 0)

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (self.plain(),)


def watched(result: Any, looks: Looks) -> Any:
    """Sizes, as torch returned them, to be handed to the model."""
    if type(result) is int:
        return WatchedSize.of(result, looks)
    if isinstance(result, tuple):
        return torch.Size([WatchedSize.of(value, looks) for value in result])
    return result


def _computes(name: str) -> Any:
    plain = getattr(int, name)

    def method(self: WatchedSize, *others: Any) -> Any:
        result = plain(self, *others)
        if type(result) is int:
            return WatchedSize.of(result, self._looks)
        if isinstance(result, tuple):
            return tuple(WatchedSize.of(part, self._looks) for part in result)
        if result is not NotImplemented:
            self._looks.note(self.plain())  # a float, which is not watched
        return result

    return method


def _compares(name: str) -> Any:
    plain = getattr(int, name)

    def method(self: WatchedSize, other: Any) -> Any:
        if isinstance(other, (int, float)):
            self._looks.note(
                int.__sub__(self, other) if isinstance(other, int) else self.plain() - other
            )
        return plain(self, other)

    return method


def _shows(name: str) -> Any:
    plain = getattr(int, name)

    def method(self: WatchedSize, *others: Any) -> Any:
        self._looks.note(self.plain())
        return plain(self, *others)

    return method


_COMPUTING = ["add", "sub", "mul", "floordiv", "mod", "divmod", "pow", "truediv"]
_COMPARING = ["eq", "ne", "lt", "le", "gt", "ge"]
_SHOWING = [
    "bool",
    "hash",
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

for _name in (*_COMPUTING, *(f"r{name}" for name in _COMPUTING), "neg", "pos", "abs"):
    setattr(WatchedSize, f"__{_name}__", _computes(f"__{_name}__"))
for _name in _COMPARING:
    setattr(WatchedSize, f"__{_name}__", _compares(f"__{_name}__"))
for _name in (*_SHOWING, *_BITWISE, *(f"r{name}" for name in _BITWISE)):
    setattr(WatchedSize, f"__{_name}__", _shows(f"__{_name}__"))
