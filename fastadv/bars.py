"""A progress bar for narrow terminals: the figures that have no room are left out, the least important first."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from tqdm import tqdm

_PERCENT = len(" 100%")
_MIN_WIDTH = len("||") + 4  # a bar shorter than this says nothing
_USUAL = 80


class Bar(tqdm):
    """A progress bar on standard error.

    Args:
        figures: the figures that it shows, the most important first.
        options: the options of tqdm.

    Attributes:
        figures: the same figures, which may be changed while the bar runs.
        rest: texts to the right of the remaining time, shown where there is room.
    """

    def __init__(self, figures: Sequence[str], **options: Any) -> None:
        self.figures = list(figures)
        self.rest: list[str] = []
        super().__init__(file=sys.stderr, dynamic_ncols=True, **options)

    def display(self, *args: Any, **options: Any) -> bool | None:
        """Show the bar as tqdm does; nothing more is shown once the terminal is gone."""
        try:
            return super().display(*args, **options)
        except OSError:
            self.disable = True
            return None

    def close(self) -> None:
        """Take the bar away, if the terminal is still there."""
        with suppress(OSError):
            super().close()

    @property
    def format_dict(self) -> dict[str, Any]:
        """The values from which tqdm writes the line."""
        found = super().format_dict
        width = columns(self.fp) - 1  # the last column would break the line on some terminals
        head = fitted(self.figures, width - _PERCENT)
        layout = "{desc} {percentage:3.0f}%" if found.get("total") else "{desc} {n_fmt}"
        room = width - len(head) - _PERCENT - _MIN_WIDTH
        if found.get("total") and room >= 0:
            tail = fitted(["", "{remaining} left", *self.rest], room)
            layout += "|{bar}|" + tail.replace(", ", " ", 1)
        return {**found, "ncols": width, "prefix": head, "bar_format": layout}


def say(text: str) -> None:
    """Print a line on standard error, and go on where nobody is there to read it: the work is worth more."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def say_above(text: str) -> None:
    """Print a line above the bars, likewise."""
    with suppress(OSError, ValueError):
        Bar.write(text, file=sys.stderr)


def fitted(parts: Sequence[str], width: int) -> str:
    """Join as many parts with commas as a width has room for. The first part is cut where it is longer."""
    text = ""
    for number, part in enumerate(parts):
        longer = f"{text}, {part}" if number else part
        if number and len(longer) > width:
            break
        text = longer
    return text[: max(width, 0)]


def columns(stream: Any) -> int:
    """Return the width of a terminal: COLUMNS of the environment, else the width of the terminal itself."""
    given = os.environ.get("COLUMNS", "")
    if given.isdecimal() and int(given) > 0:
        return int(given)
    try:
        return os.get_terminal_size(stream.fileno()).columns or _USUAL
    except (AttributeError, OSError, ValueError):
        return _USUAL
