"""The findings of analyses in a report: a picture and a table each, of all models together where possible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastadv.evaluation.analyses.analysis import Measured
from fastadv.evaluation.analyses.groups import AnalysisGroup, grouped, number_text, of_weights
from fastadv.evaluation.analyses.pictures import images_of, picture_of
from fastadv.evaluation.comparison import Comparison
from fastadv.evaluation.plot_style import DARK, LIGHT, Style
from fastadv.evaluation.reporting.pages import Plot
from fastadv.evaluation.reporting.tables import Table

_SHORT = 40  # a table with at most so many rows is shown completely


@dataclass(frozen=True)
class AnalysisParts:
    """The part of a report that shows analyses.

    Attributes:
        plots: the pictures, by the names of their files.
        tables: the summaries, and all numbers where they are few.
        files: all numbers as CSV, by the names of their files.
        notes: further notes.
    """

    plots: dict[str, Plot]
    tables: list[Table]
    files: dict[str, str]
    notes: list[str]


def analysis_parts(comparison: Comparison) -> AnalysisParts:
    """Show the analyses of the weights that have a result in the comparison.

    Raises:
        ImportError: when there are pictures to draw and matplotlib is not installed.
    """
    parts, records = AnalysisParts({}, [], {}, []), {}
    for run in comparison.runs:
        weights = {result.subject.weights for result in run.results}
        records[run.name], others = of_weights(run.analyses, weights)
        if others:
            parts.notes.append(
                f"{run.name} has analyses of other weights, which are left out here."
            )
    for group in grouped(records):
        parts.files[f"analyses/{group.stem}.csv"] = group.to_csv()
        parts.tables.extend(_tables(group))
        several = len(group.pictured) > 1
        for number, found in enumerate(group.pictured, 1):
            last = f"_{number}" if several else ""
            parts.plots[f"analyses/{group.stem}{last}.png"] = _plot(group, found)
        for number, (name, one) in enumerate(group.found.items(), 1):
            if (plot := _image_plot(name, one)) is not None:
                parts.plots[f"analyses/{group.stem}_images_{number}.png"] = plot
    return parts


def _tables(group: AnalysisGroup) -> list[Table]:
    """The summary of a group, and its rows where they are few."""
    notes = tuple(filter(None, [group.settings and f"{group.settings}.", *group.notes()]))
    heading, *lines = group.summary()
    tables = [Table(group.title, tuple(heading), tuple(map(tuple, lines)), notes)]
    names, *rows = group.rows()
    if len(rows) <= _SHORT:
        cells = tuple(tuple(number_text(cell) for cell in row) for row in rows)
        tables.append(Table(f"{group.title}: all numbers", tuple(map(str, names)), cells))
    return tables


def _plot(group: AnalysisGroup, found: Mapping[str, Measured]) -> Plot:
    models = ", ".join(found)

    def drawn(style: Style) -> bytes:
        return picture_of(found, style, "" if len(found) > 1 else models)

    caption = f"{group.title} of {models}" + (f": {group.settings}" if group.settings else "") + "."
    return Plot(group.title, drawn(LIGHT), drawn(DARK), caption)


def _image_plot(name: str, one: Measured) -> Plot | None:
    light, dark = images_of(one, LIGHT), images_of(one, DARK)
    if light is None or dark is None:
        return None
    caption = (
        f"Images that {name} classifies correctly, at the smallest radius that breaks them: original, adversarial "
        "image, and perturbation x 5 around grey."
    )
    return Plot(f"Smallest perturbations of {name}", light, dark, caption)
