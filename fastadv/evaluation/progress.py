"""The progress of an evaluation: bars on a terminal, one line per attack elsewhere, or nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from fastadv.bars import Bar, say, say_above
from fastadv.ops.values import check_bool

T = TypeVar("T")


class Advance(Protocol):
    """Moves a bar on."""

    def __call__(self, images: int, **shown: str) -> None:
        """Say that so many more images are done, and give the bar's other figures."""


class ProgressDisplay:
    """Progress on standard error, which keeps standard output free for the report."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = check_bool("progress", enabled)
        self.on_terminal = self.enabled and sys.stderr.isatty()

    def bar(self, items: Iterable[T], label: str, total: int) -> Iterator[T]:
        """Go through items with a bar that disappears at the end."""
        if not self.on_terminal:
            yield from items
            return
        yield from Bar([label], iterable=items, total=total, leave=False)

    @contextmanager
    def count(self, label: str, total: int) -> Iterator[Advance]:
        """A bar of images, with the time left; it is called with the number of new images and other figures."""
        if not self.on_terminal:
            yield lambda images, **shown: None
            return
        with Bar([label], total=total, leave=False) as bar:

            def advance(images: int, **shown: str) -> None:
                if shown:
                    bar.figures = [label, *(f"{name} {value}" for name, value in shown.items())]
                bar.update(images)

            yield advance

    def line(self, text: str) -> None:
        """Say one line that stays."""
        if not self.enabled:
            return
        if self.on_terminal:
            say_above(text)
        else:
            say(text)
