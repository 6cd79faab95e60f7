"""The tables of other threat models than white-box attacks in a ball: transfer, and attacks without a ball."""

from __future__ import annotations

from collections.abc import Sequence

from fastadv.evaluation.attack_list import CLEAN
from fastadv.evaluation.comparison import Comparison, Line, cell_text, radius_text
from fastadv.evaluation.distances import Distances
from fastadv.evaluation.reporting.tables import Table
from fastadv.evaluation.wording import format_eps


def transfers(comparison: Comparison) -> Table:
    """Accuracies in a ball on adversarial images that were made on another model."""
    lines = [line for line in comparison.lines if line.ball and line.surrogate]
    rows = [
        (
            *(comparison.label(line), line.subject.data or "-", str(line.n), title),
            *(line.norm, format_eps(line.eps), _clean(line), cell_text(line, title)),
        )
        for line in lines
        for title in line.cells
        if title != CLEAN
    ]
    heading = ("run", "data", "n", "attack", "norm", "eps", "clean %", "right %")
    notes = (
        "The adversarial images were made on another model, the surrogate, which is named after 'from'.",
        "These are no white-box accuracies: an attack on the model itself breaks more images, as a rule.",
        *remarks(comparison, lines),
    )
    return Table("Black-box transfer", heading, tuple(rows), notes)


def without_ball(comparison: Comparison) -> Table:
    """Distances of the smallest adversarial perturbations that attacks without a ball have found."""
    lines = [line for line in comparison.lines if not line.ball]
    rows = []
    for line in lines:
        for title, result in line.cells.items():
            distances = result.row.distances
            if distances is not None:
                rows.append(
                    (
                        *(comparison.label(line), line.subject.data or "-", str(line.n), title),
                        *(distances.norm, distance_text(distances.median)),
                        *(distance_text(distances.mean), str(distances.broken), _clean(line)),
                        *(cell_text(line, title), _curve(distances)),
                    )
                )
    heading = (
        *("run", "data", "n", "attack", "norm", "median distance", "mean distance", "broken"),
        *("clean %", "right at any distance %", "right within a radius"),
    )
    notes = (
        "These attacks look for the smallest perturbation and have no ball: an image is broken at whatever "
        "distance. So the accuracy is no robust accuracy.",
        "Distances are measured on the broken images alone.",
        *remarks(comparison, lines),
    )
    return Table("Attacks without a ball", heading, tuple(rows), notes)


def remarks(comparison: Comparison, lines: Sequence[Line]) -> list[str]:
    """The notes of the results of some lines, each with the name of its line."""
    found = []
    for line in lines:
        where = f" {radius_text(line.norm, line.eps)}" if line.norm and line.ball else ""
        for title, result in line.cells.items():
            subject = f"{comparison.label(line)}, {title}{where}, is {result.row.status}"
            found += [f"{subject}: {note}" for note in result.row.notes]
    return found


def distance_text(distance: float | None) -> str:
    """Write a distance for people; a dash where there is no distance."""
    return "-" if distance is None else f"{distance:.4g}"


def _clean(line: Line) -> str:
    return cell_text(line, CLEAN)


def _curve(distances: Distances) -> str:
    parts = (
        f"{100 * share:.2f} % within {format_eps(radius)}" for radius, share in distances.curve
    )
    return ", ".join(parts) or "-"
