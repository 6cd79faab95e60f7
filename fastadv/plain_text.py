"""Text that others wrote, such as names of runs, as terminals and tables show it without taking it for signs."""

from __future__ import annotations

import re
from typing import Any

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
# What begins emphasis, code, a link, a formula, struck text, a task or an escape in Markdown. An underscore after
# a letter does not, nor does a bracket, such as an interval's, after which no target follows.
_MARKDOWN = re.compile(r"[\\`*$~|]|(?<![^\W_])_|^\[(?=[ xX]\])|\](?=[(\[:])")
_ENTITY = re.compile(r"&(?=#?\w+;)")


def csv_cell(value: Any) -> Any:
    """Return a value as it goes into a CSV file.

    None becomes an empty cell. Text is in one line. Text that a spreadsheet would take for a formula, such as a
    run's name that begins with "=", gets an apostrophe in front.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        return value
    return ("'" if value.startswith(_FORMULA) else "") + one_line(value)


def one_line(text: str) -> str:
    """Return text with spaces in place of line breaks, of characters that steer a terminal, and of broken ones.

    A run of somebody else's may have them in its names, and a folder's name may hold bytes that are no UTF-8.
    """
    return "".join(letter if letter.isprintable() else " " for letter in text)


def markdown_text(text: str) -> str:
    """Return text in one line that Markdown shows as it is, also within the cell of a table."""
    plain = _ENTITY.sub("&amp;", one_line(text)).replace("<", "&lt;")
    return _MARKDOWN.sub(r"\\\g<0>", plain)
