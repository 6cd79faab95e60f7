"""A reproduced table as Markdown, CSV, JSON and PNG."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from fastadv.files import write_atomically
from fastadv.reproduction.pictures import picture
from fastadv.reproduction.tables import NOT_AT_HAND, Cell, PaperTable

_FORMAT = 1


def write_table(table: PaperTable, folder: Path, data: str) -> list[Path]:
    """Write a table and its picture. The files' names hold scale, data and seeds, so that other tables are kept.

    Args:
        table: the table.
        folder: the folder of its item.
        data: the data set in the files' names.

    Returns:
        The files.

    Raises:
        OSError: when one cannot be written.
    """
    name = f"{table.scale}-{data}-{table.seeds}{'seed' if table.seeds == 1 else 'seeds'}"
    networks = sorted(set(table.networks.values()))
    if table.scale == "paper" or networks != ["small_cnn"]:
        name += f"-{networks[0] if len(networks) == 1 else 'several'}"
    contents: dict[str, str | bytes | None] = {
        ".md": markdown(table),
        ".csv": to_csv(table),
        ".json": to_json(table),
        ".png": picture(table),
    }
    return [
        write_atomically(folder / f"{name}{suffix}", content)
        for suffix, content in contents.items()
        if content is not None
    ]


def markdown(table: PaperTable) -> str:
    """The table in the paper's layout, with a column "paper" to the right of each column of ours."""
    item = table.item
    networks = {
        f"{here} for {theirs}" if here != theirs else here
        for theirs, here in table.networks.items()
    }
    head = [
        f"# {item.heading}: {item.title}",
        "",
        f"Scale {table.scale}, {table.data}, {table.seeds} "
        f"{'training' if table.seeds == 1 else 'trainings'} per row, network {', '.join(sorted(networks))}. "
        f"{_unit(table)} {_paper_note(table)}",
        "",
    ]
    titles = ["", *(title for c in item.columns for title in (c.label, "paper"))]
    lines = [_line(titles), "|---|" + "---:|" * (2 * len(item.columns))]
    for row, cells in zip(item.rows, table.cells, strict=True):
        texts = [text for cell in cells for text in (cell_text(cell), paper_text(cell))]
        lines.append(_line([row.label, *texts]))
    notes = [f"- {note}" for note in _notes(table)]
    return "\n".join([*head, *lines, *(["", *notes] if notes else [])]) + "\n"


def _unit(table: PaperTable) -> str:
    if table.seeds == 1:
        return "In brackets: the 95 % interval over the test images."
    return "Mean ± standard deviation over the trainings; in brackets the 95 % interval of the mean (Student's t)."


def _paper_note(table: PaperTable) -> str:
    if not table.item.published:
        return f"The paper's figures are {NOT_AT_HAND}."
    other = table.paper_data != table.data
    return (
        f"The paper's figures are of {table.paper_data}{', not of these images' if other else ''}."
    )


def cell_text(cell: Cell) -> str:
    """Our figure in a cell."""
    mean, interval, deviation = cell.mean, cell.interval, cell.deviation
    if mean is None:
        return cell.reason
    text = _number(mean) + (f" ± {_number(deviation)}" if deviation is not None else "")
    if interval is not None:
        text += f" [{_number(interval[0])}, {_number(interval[1])}]"
    return text + ("*" if any(m.note for m in cell.measured) else "")


def paper_text(cell: Cell) -> str:
    """The paper's figure in a cell."""
    return NOT_AT_HAND if cell.paper is None else f"{cell.paper:g}"


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _notes(table: PaperTable) -> list[str]:
    notes = list(table.remarks)
    if table.item.guess:
        notes.append(f"Layout: {table.item.guess}")
    for row, cells in zip(table.item.rows, table.cells, strict=True):
        for column, cell in zip(table.item.columns, cells, strict=True):
            notes += [f"* {row.label}, {column.label}: {m.note}" for m in cell.measured if m.note]
    return list(dict.fromkeys(notes))


def to_csv(table: PaperTable) -> str:
    """The table as CSV, one line per cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ("row", "column", "mean", "deviation", "low", "high", "seeds", "n", "paper", "reason")
    )
    for row, cells in zip(table.item.rows, table.cells, strict=True):
        for column, cell in zip(table.item.columns, cells, strict=True):
            low, high = cell.interval or (None, None)
            n = max((m.n for m in cell.measured), default=0)
            figures = (cell.mean, cell.deviation, low, high, len(cell.measured), n, cell.paper)
            writer.writerow((row.label, column.label, *figures, cell.reason))
    return text.getvalue()


def to_json(table: PaperTable) -> str:
    """The table as JSON text."""
    return json.dumps(as_record(table), indent=1) + "\n"


def as_record(table: PaperTable) -> dict[str, Any]:
    """The table as JSON types, with the figure of every seed."""
    item = table.item
    return {
        "format": _FORMAT,
        "item": item.id,
        "title": item.title,
        "scale": table.scale,
        "data": table.data,
        "paper_data": table.paper_data,
        "seeds": table.seeds,
        "networks": dict(table.networks),
        "layout": item.guess,
        "remarks": list(table.remarks),
        "rows": [row.label for row in item.rows],
        "columns": [column.label for column in item.columns],
        "cells": [[_cell(cell) for cell in cells] for cells in table.cells],
    }


def _cell(cell: Cell) -> dict[str, Any]:
    return {
        "values": [m.value for m in cell.measured],
        "mean": cell.mean,
        "deviation": cell.deviation,
        "interval": cell.interval,
        "n": [m.n for m in cell.measured],
        "notes": [m.note for m in cell.measured if m.note],
        "paper": cell.paper,
        "reason": cell.reason,
    }
