"""The display of an evaluation's progress: bars on a terminal, one line per attack elsewhere, or nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from fastadv.bars import Bar, say, say_above
from fastadv.ops.values import check_bool

T = TypeVar("T")


class Advance(Protocol):
    """A function that advances a bar."""

    def __call__(self, images: int, **shown: str) -> None:
        """Advance the bar by a number of images, and set its other figures."""


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
        """Show a bar of images with the time left, and yield the function that advances it."""
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
        """Write one line that stays on the screen."""
        if not self.enabled:
            return
        if self.on_terminal:
            say_above(text)
        else:
            say(text)
