"""The class `Table` of cells of text, written as aligned text and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastadv.plain_text import markdown_text, one_line

# Columns that hold words, which are aligned to the left.
_TEXT_COLUMNS = {
    *("run", "runs", "method", "model", "checkpoint", "data", "norm", "attack", "after"),
    *("variant", "setting", "surrogate", "radius", "check", "verdict", "finding"),
    *("right within a radius", "stage", "search", "status", "device", "command", "versions"),
    *("weights", "date", "layer"),
}


@dataclass(frozen=True)
class Table:
    """Cells of text under a title.

    Attributes:
        title: heading of the table.
        heading: names of the columns.
        rows: the rows, each with one cell per column.
        notes: sentences below the table.
    """

    title: str
    heading: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def is_text(self, column: int) -> bool:
        """Whether a column holds words, which are aligned to the left, and not numbers."""
        return self.heading[column] in _TEXT_COLUMNS


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as text, with aligned columns."""
    plain = [[one_line(cell) for cell in line] for line in lines]
    widths = [max(len(cell) for cell in column) for column in zip(*plain, strict=True)]
    rows = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in plain
    )
    return "\n".join(rows)


def markdown(tables: Sequence[Table], title: str) -> str:
    """A Markdown document with a title and tables."""
    return "\n\n".join([f"# {markdown_text(title)}", *map(_section, tables)]) + "\n"


def _section(table: Table) -> str:
    rule = ["---" if table.is_text(i) else "---:" for i in range(len(table.heading))]
    lines = [table.heading, rule, *table.rows]
    text = "\n".join("| " + " | ".join(map(markdown_text, line)) + " |" for line in lines)
    notes = "".join(f"\n- {markdown_text(note)}" for note in table.notes)
    return f"## {markdown_text(table.title)}\n\n{text}" + (f"\n{notes}" if notes else "")
