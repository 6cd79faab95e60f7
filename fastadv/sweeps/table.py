"""The table and the plot of a sweep: a line for each point of the grid, with mean and deviation over its seeds."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastadv.evaluation.attack_list import CLEAN
from fastadv.evaluation.comparison import (
    Comparison,
    EvaluatedRun,
    Line,
    radius_text,
    status_mark,
)
from fastadv.evaluation.plot_style import png_of
from fastadv.evaluation.plots import TradeOffPoint, draw_trade_off
from fastadv.evaluation.reporting import Summary, Table
from fastadv.evaluation.reporting.other_threat_models import remarks
from fastadv.evaluation.reporting.seeds import mean_and_deviation
from fastadv.evaluation.wording import format_eps
from fastadv.plain_text import csv_cell
from fastadv.sweeps.plan import SweepRun

_NOTE = (
    "Mean ± standard deviation (n - 1) over the seeds of the trainings; one seed has no deviation."
)
_LABELLED = 16  # points in the plot; the labels of more points would hide each other


@dataclass(frozen=True)
class Judgement:
    """A finished run of a sweep and its results.

    Attributes:
        curve: the sweep's curve in the plot.
        run: the run.
        judged: its results.
    """

    curve: str
    run: SweepRun
    judged: EvaluatedRun


@dataclass(frozen=True)
class PointCell:
    """The accuracies of one point under one attack, over the seeds.

    Attributes:
        values: the accuracies in percent, one per seed.
        mark: " suspect" or " invalid" if this is the status of one of the results, else empty.
    """

    values: tuple[float, ...]
    mark: str = ""

    @property
    def mean(self) -> float:
        """The mean."""
        return sum(self.values) / len(self.values)

    @property
    def deviation(self) -> float | None:
        """The standard deviation of the sample; None for a single value."""
        return mean_and_deviation(list(self.values))[1] if len(self.values) > 1 else None

    def __str__(self) -> str:
        """The mean, the deviation where there is one, and the status where it is not ok."""
        deviation = self.deviation
        spread = "" if deviation is None else f" ± {deviation:.2f}"
        return f"{self.mean:.2f}{spread}{self.mark}"

    @property
    def status(self) -> str:
        """The worst status of the results."""
        return self.mark.strip() or "ok"


@dataclass(frozen=True)
class PointRow:
    """A point of the grid, judged on some images at some radius.

    Attributes:
        curve: the sweep's curve in the plot.
        settings: the values of the grid's options.
        seeds: the seeds of the trainings.
        where: data, number of images, norm and radius, as text.
        radius: norm and radius as numbers of a `Comparison`.
        cells: the accuracies by attack.
    """

    curve: str
    settings: Mapping[str, str]
    seeds: tuple[int, ...]
    where: tuple[str, str, str, str]
    radius: tuple[str, float]
    cells: Mapping[str, PointCell]

    @property
    def label(self) -> str:
        """The values of the grid's options."""
        return ", ".join(f"{name} {value}" for name, value in self.settings.items())


class SweepTable:
    """The results of one sweep, or of several.

    Args:
        judgements: the finished runs, at least one; runs of one point stand together.

    Attributes:
        summary: the summary of the same runs, for a report.
        rows: the points, in the order of the runs.
        attacks: the columns.
    """

    def __init__(self, judgements: Sequence[Judgement]) -> None:
        self.summary = Summary(Comparison([one.judged for one in judgements]))
        self.attacks = self.summary.comparison.attacks
        by_run = {id(one.judged): one for one in judgements}
        groups: dict[tuple[Any, ...], list[tuple[int, Line]]] = {}
        for line in self.summary.comparison.white_box:
            one = by_run[id(line.run)]
            point = (one.curve, tuple(one.run.settings.items()))
            images = (line.subject.data, line.subject.images, line.n)
            key = (*point, *images, line.radius, *line.circumstances)
            groups.setdefault(key, []).append((one.run.seed, line))
        self.rows = [self._row(key[0], dict(key[1]), lines) for key, lines in groups.items()]

    def table(self) -> Table:
        """The means and deviations as text."""
        names = list(dict.fromkeys(name for row in self.rows for name in row.settings))
        several = len({row.curve for row in self.rows}) > 1
        heading = (
            *(["sweep"] if several else []),
            *(*names, "seeds", "data", "n", "norm", "eps"),
            *(f"{title} %" for title in self.attacks),
        )
        body = [
            (
                *([row.curve] if several else []),
                *(row.settings.get(name, "-") for name in names),
                ", ".join(map(str, row.seeds)),
                *row.where,
                *(str(row.cells.get(title, "-")) for title in self.attacks),
            )
            for row in self.rows
        ]
        comparison = self.summary.comparison
        notes = (_NOTE, *dict.fromkeys(remarks(comparison, comparison.white_box)))
        return Table("Sweep", heading, tuple(body), notes)

    def csv(self) -> str:
        """The table as CSV, with mean, deviation and status in columns of their own."""
        names = list(dict.fromkeys(name for row in self.rows for name in row.settings))
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        parts = ("mean", "deviation", "status")
        columns = [f"{title} {part}" for title in self.attacks for part in parts]
        writer.writerow(["sweep", *names, "seeds", "data", "n", "norm", "eps", *columns])
        for row in self.rows:
            cells = [row.cells.get(title) for title in self.attacks]
            numbers: list[str] = []
            for cell in cells:
                found = (None, None) if cell is None else (cell.mean, cell.deviation)
                numbers += ["" if number is None else f"{number:.6g}" for number in found]
                numbers.append("" if cell is None else cell.status)
            settings = [row.settings.get(name, "") for name in names]
            seeds = " ".join(map(str, row.seeds))
            line = [row.curve, *settings, seeds, *row.where, *numbers]
            writer.writerow(map(csv_cell, line))
        return text.getvalue()

    def records(self) -> list[dict[str, Any]]:
        """The rows as JSON types, with the figure of every seed in percent."""
        return [
            {
                "sweep": row.curve,
                "settings": dict(row.settings),
                "seeds": list(row.seeds),
                **dict(zip(("data", "n", "norm", "eps"), row.where, strict=True)),
                "n": int(row.where[1]),
                "accuracy": {
                    title: {
                        "mean": cell.mean,
                        "deviation": cell.deviation,
                        "values": list(cell.values),
                        "status": cell.status,
                    }
                    for title, cell in row.cells.items()
                },
            }
            for row in self.rows
        ]

    def points(self) -> list[TradeOffPoint]:
        """The points of the plot, for each curve from the lowest clean accuracy to the highest."""
        robust, radius = self.summary.robust, self.summary.radius
        rows = [
            row for row in self.rows if row.radius == radius and {CLEAN, robust} <= row.cells.keys()
        ]
        rows.sort(key=lambda row: (row.curve, row.cells[CLEAN].mean, row.cells[robust].mean))
        crowded = len(rows) > _LABELLED
        return [
            TradeOffPoint(
                (row.label or row.curve) + (row.cells[robust].mark or row.cells[CLEAN].mark),
                row.cells[CLEAN].mean,
                row.cells[robust].mean,
                _bar(row.cells[CLEAN]),
                _bar(row.cells[robust]),
                row.curve,
                minor=crowded,
                curve=row.curve,
            )
            for row in rows
        ]

    def picture(self) -> bytes | None:
        """The trade-off plot as PNG; None where the runs have no attack and radius in common.

        Raises:
            ImportError: when matplotlib is not installed.
        """
        points, radius = self.points(), self.summary.radius
        if radius is None or not points:
            return None
        robust = f"Accuracy under {self.summary.robust} {radius_text(*radius)} (%)"
        title = f"{self.summary.plot_title}\nmeans and deviations over seeds"
        return png_of(draw_trade_off(points, title=title, robust_label=robust))

    def _row(
        self, curve: str, settings: dict[str, str], lines: Sequence[tuple[int, Line]]
    ) -> PointRow:
        line = lines[0][1]
        described = self.summary.comparison.describe(line)
        norm, eps = (line.norm, format_eps(line.eps)) if line.norm else ("-", "-")
        cells = {
            title: PointCell(
                tuple(100 * one.cells[title].row.accuracy for _, one in lines),
                status_mark(*(one.cells[title].row for _, one in lines)),
            )
            for title in self.attacks
            if all(title in one.cells for _, one in lines)
        }
        seeds = tuple(seed for seed, _ in lines)
        where = (described["data"], str(line.n), norm, eps)
        return PointRow(curve, settings, seeds, where, line.radius, cells)


def distinct_curves(names: Sequence[tuple[str, str]]) -> list[str]:
    """Name the curves of sweeps: by the method, with the directory where two have one method.

    Args:
        names: method and directory of each sweep.
    """
    methods = [method for method, _ in names]
    return [
        f"{method} ({folder})" if methods.count(method) > 1 else method for method, folder in names
    ]


def _bar(cell: PointCell) -> tuple[float, float] | None:
    """The interval of one deviation on either side of the mean; None without a deviation."""
    deviation = cell.deviation
    if deviation is None:
        return None
    return max(cell.mean - deviation, 0.0), min(cell.mean + deviation, 100.0)
