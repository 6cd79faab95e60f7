"""The texts of a report's table: headings, cells and notes."""

from __future__ import annotations

from collections.abc import Sequence

from fastadv.evaluation.result_row import REFERENCE, Row
from fastadv.evaluation.wording import distances_text, format_eps

HEADINGS = (
    "attack",
    "accuracy %",
    "95 % interval",
    "right",
    "of",
    "eps",
    "seed",
    "seconds",
    "status",
)
LEFT = (True, False, False, False, False, False, False, False, True)


def cells_of(row: Row) -> tuple[str, ...]:
    """Return the texts of a row's cells, in the order of `HEADINGS`."""
    low, high = row.interval
    return (
        row.title,
        f"{100 * row.accuracy:.2f}",
        f"{100 * low:.2f} to {100 * high:.2f}",
        str(row.correct),
        str(row.n),
        "no ball" if row.distances else format_eps(row.eps) if row.eps else "-",
        str(row.seed),
        f"{row.seconds:.1f}",
        row.status,
    )


def aligned_line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Return a line of plain text in which each cell has the width of its column."""
    padded = (
        cell.ljust(width) if left else cell.rjust(width)
        for cell, width, left in zip(cells, widths, LEFT, strict=True)
    )
    return "  ".join(padded).rstrip()


def notes_of(rows: Sequence[Row]) -> list[str]:
    """Return the notes below a table: the accuracies after each attack of an ensemble, then the warnings."""
    notes = []
    titles = [row.title for row in rows]
    for row in rows:
        title = row.title
        if titles.count(title) > 1:
            title += f" at {format_eps(row.eps)}"
        if row.stages:
            left = (
                f"{100 * stage.correct / row.n:.2f} % after {stage.name}" for stage in row.stages
            )
            notes.append(f"{title}: {', '.join(left)}")
            notes += [f"{title}: {sentence}" for sentence in _search_of(row)]
        if row.distances is not None:
            notes.append(f"{title}: {distances_text(row.distances)}")
        state = "" if row.status == "ok" else f" is {row.status}"
        notes += [f"{title}{state}: {note}" for note in row.notes]
    return notes


_WORDS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def _search_of(row: Row) -> list[str]:
    """Sentences on the precision and the refinement of AutoAttack; empty where the reference alone ran."""
    if row.search in ("", REFERENCE):
        return []
    sentences = []
    for search in dict.fromkeys(stage.search for stage in row.stages):
        names = ", ".join(stage.name for stage in row.stages if stage.search == search)
        how = "by pyautoattack" if search == REFERENCE else f"in {_WORDS.get(search, search)}"
        sentences.append(f"{names} searched {how}")
    text = (
        "; ".join(sentences) + "; the plain model in float32 has confirmed every adversarial image"
    )
    spent = sum(stage.refinement_seconds for stage in row.stages)
    if not spent:
        return [text]
    found = sum(stage.refined for stage in row.stages)
    refused = sum(stage.unconfirmed for stage in row.stages)
    # A search in float32 that needed refinement ran on a copy of the model.
    judge = "the plain model" if row.search == "fp32" else "float32"
    steps = "steps of the plain model" if row.search == "fp32" else "float32 steps"
    return [
        text,
        f"{steps} after these searches broke {found} more image{'s' * (found != 1)} in {spent:.1f} s; "
        f"{judge} has refused {refused} point{'s' * (refused != 1)}",
    ]
