"""The content of a report on several runs, as tables and points, for all formats of files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastadv.evaluation.attack_list import AUTOATTACK, CLEAN
from fastadv.evaluation.comparison import (
    Comparison,
    EvaluatedRun,
    Line,
    cell_text,
    interval_text,
    radius_text,
    status_mark,
)
from fastadv.evaluation.metrics import ardist, wilson_interval
from fastadv.evaluation.plots import TradeOffPoint
from fastadv.evaluation.reporting.masking import masking_table, verdicts
from fastadv.evaluation.reporting.other_threat_models import (
    distance_text,
    remarks,
    transfers,
    without_ball,
)
from fastadv.evaluation.reporting.seeds import Series, mean_and_deviation, series_of
from fastadv.evaluation.reporting.tables import Table
from fastadv.evaluation.results import Result
from fastadv.evaluation.trade_off import Published, TradeOff, published_for, trade_off
from fastadv.evaluation.wording import bounds_text, format_eps

_SHOWN_DIGITS = 12  # of a hash


class Summary:
    """The tables of a report, and the radius and the attack of its plot.

    Args:
        comparison: the runs.
        robust: the attack on the plot's vertical axis; by default the last attack that all runs have.
        eps: the radius of the plot; by default the only radius that all runs have, or 8/255 among several.
        norm: the norm of this radius.

    Attributes:
        comparison: the runs.
        radius: norm and eps of the plot; None where there is no plot.
        robust: the column of its vertical axis; empty where there is no plot.
        no_plot: the reason why there is no plot.
        series: runs that differ only in the seed of their training.

    Raises:
        ValueError: when not all runs have the given attack and radius.
    """

    def __init__(
        self,
        comparison: Comparison,
        robust: str | None = None,
        eps: float | None = None,
        norm: str | None = None,
    ) -> None:
        self.comparison = comparison
        self.series = series_of(comparison)
        self.radius: tuple[str, float] | None = None
        self.robust, self.no_plot = "", ""
        try:
            self.radius = comparison.radius(eps, norm)
            self.robust = self._robust(robust, self.radius)
        except ValueError as error:
            if (robust, eps, norm) != (None, None, None):
                raise
            self.radius, self.no_plot = None, f"There is no trade-off plot: {error}."

    def _robust(self, asked: str | None, radius: tuple[str, float]) -> str:
        lines = self.comparison.at(radius)
        runs = self.comparison.runs
        common = [
            title
            for title in self.comparison.attacks
            if all(_has(title, run, lines) for run in runs)
        ]
        robust = asked or next((title for title in reversed(common) if title != CLEAN), None)
        if robust is None or not {CLEAN, robust} <= set(common):
            raise ValueError(
                f"robust must be an attack that all runs have beside 'clean' {radius_text(*radius)}, "
                f"got {robust!r}; they have {', '.join(common) or 'nothing'} in common"
            )
        return robust

    @property
    def tables(self) -> list[Table]:
        """All tables that have a row, the tables for print first."""
        tables = [*self.printed, masking_table(self.comparison), self.results(), self.origins()]
        return [table for table in tables if table.rows]

    @property
    def other_threat_models(self) -> list[Table]:
        """The tables of transfer and of attacks without a ball that have a row."""
        tables = (transfers(self.comparison), without_ball(self.comparison))
        return [table for table in tables if table.rows]

    @property
    def printed(self) -> list[Table]:
        """The tables that fit on paper and have a row."""
        tables = [
            self.accuracies(),
            self.trade_offs(),
            self.over_seeds(),
            *self.other_threat_models,
        ]
        tables += [self.published_points(), self.stages()]
        return [table for table in tables if table.rows]

    def accuracies(self) -> Table:
        """One line for each run, radius and set of images, one column for each attack."""
        heading, *rows = self.comparison.cells(intervals=True)
        notes = ["In brackets are Wilson's 95 % intervals over the images."]
        notes += verdicts(self.comparison)
        notes += remarks(self.comparison, self.comparison.white_box)
        return Table(
            "Accuracy", tuple(heading), tuple(map(tuple, rows)), tuple(dict.fromkeys(notes))
        )

    def strongest(self, line: Line) -> str | None:
        """The attack for a line's trade-off: the plot's attack, else AutoAttack, else the line's last attack."""
        attacks = [title for title in self.comparison.attacks if title in line.cells]
        attacks = [title for title in attacks if title != CLEAN]
        if self.robust in attacks and line.radius == self.radius:
            return self.robust
        ensembles = [title for title in attacks if line.cells[title].row.name == AUTOATTACK]
        return next(iter(ensembles or attacks[::-1]), None)

    def trade_off(self, line: Line, title: str) -> TradeOff | None:
        """The trade-off of a white-box line under one attack; None without both accuracies."""
        if title == CLEAN or not line.is_white_box or not {CLEAN, title} <= line.cells.keys():
            return None
        published = published_for(line.cells[title])
        curve = None if published is None else published.curve
        return trade_off(line.cells[CLEAN].row, line.cells[title].row, curve)

    def trade_offs(self) -> Table:
        """Sum, mean and ARDist of every line."""
        rows, outside = [], []
        for line in self.comparison.white_box:
            title = self.strongest(line)
            measured = None if title is None else self.trade_off(line, title)
            if title is None or measured is None:
                continue
            clean, robust = line.cells[CLEAN].row, line.cells[title].row
            cells = [self.comparison.label(line), line.norm, format_eps(line.eps), title]
            cells += [cell_text(line, column) for column in (CLEAN, title)]
            mark = status_mark(clean, robust)
            for measure in (measured.sum, measured.mean, measured.ardist):
                value, _, interval = str(measure or "-").partition(" ")
                cells.append(f"{value}{mark} {interval}" if interval else value)
            rows.append(tuple(cells))
            published = published_for(line.cells[title])
            if published is not None and not published.covers(100 * clean.accuracy):
                outside.append(cells[0])
        heading = ("run", "norm", "eps", "attack", "clean %", "robust %", "Sum", "mean", "ARDist")
        notes = [
            "ARDist is ARREST's distance from a curve fitted to AutoAttack at 8/255 linf on CIFAR-10 or "
            "CIFAR-100; elsewhere there is no ARDist."
        ]
        if outside:
            notes.append(
                f"Extrapolated is the ARDist of {', '.join(outside)}, whose clean accuracy lies outside the range "
                "of the published points."
            )
        return Table("Trade-off", heading, tuple(rows), tuple(notes))

    def over_seeds(self) -> Table:
        """Mean and standard deviation over the seeds of training."""
        attacks = self.comparison.attacks
        rows = []
        for series in self.series:
            line = series.lines[0]
            if not line.is_white_box:
                continue
            described = self.comparison.describe(line)
            cells = [described[name] for name in ("method", "model", "data", "n", "norm", "eps")]
            cells.append(", ".join(map(str, series.seeds)))
            for column in attacks:
                cells.append(_spread(series.accuracies(column), series.mark(column)))
            title = self.strongest(line)
            mark = series.mark(CLEAN, title)
            measured = [self.trade_off(one, title) if title else None for one in series.lines]
            for name in ("sum", "mean", "ardist"):
                found = [getattr(one, name, None) for one in measured]
                values = [one.value for one in found if one is not None]
                cells.append(_spread(values if len(values) == len(found) else None, mark))
            cells.append(", ".join(one.run.name for one in series.lines))
            rows.append(tuple(cells))
        heading = (
            *("method", "model", "data", "n", "norm", "eps", "seeds"),
            *(*(f"{title} %" for title in attacks), "Sum", "mean", "ARDist", "runs"),
        )
        notes = ("Mean ± standard deviation (n - 1) of runs that differ in the training's seed.",)
        return Table("Over seeds", heading, tuple(rows), notes)

    def published(self) -> Published | None:
        """The published curve and points for the plot, if they apply to all its results; else None."""
        if self.radius is None:
            return None
        cells = [line.cells.get(self.robust) for line in self.comparison.at(self.radius)]
        found = [published_for(result) for result in cells if result is not None]
        return found[0] if found and all(one is found[0] for one in found) else None

    def published_points(self) -> Table:
        """The accuracies that the ARREST paper reports, where they can be compared with the results."""
        published = self.published()
        heading = ("method", "clean %", "autoattack %", "Sum", "mean", "ARDist")
        if published is None:
            return Table("Published", heading, ())
        rows = []
        for name, (clean, robust) in published.points.items():
            distance = ardist(clean, robust, published.curve)
            numbers = (clean, robust, clean + robust, (clean + robust) / 2, distance)
            rows.append((name, *(f"{number:.2f}" for number in numbers)))
        notes = (f"WRN-34-10 on {published.data} at 8/255 linf, as the ARREST paper reports them.",)
        return Table("Published", heading, tuple(rows), notes)

    def stages(self) -> Table:
        """The accuracies after each attack of an ensemble."""
        rows = []
        for line, title, result in self.listed():
            row, clean = result.row, line.cells.get(CLEAN)
            before = None if clean is None or result.after else clean.row.correct
            for stage in row.stages:
                low, high = wilson_interval(stage.correct, row.n)
                rows.append(
                    (
                        *(self.comparison.label(line), line.norm, format_eps(line.eps), title),
                        *(stage.name, f"{100 * stage.correct / row.n:.2f}{status_mark(row)}"),
                        f"[{100 * low:.2f}, {100 * high:.2f}]",
                        "-" if before is None else str(before - stage.correct),
                        *(stage.search, str(stage.refined), f"{stage.seconds:.1f}"),
                    )
                )
                before = stage.correct
        heading = (
            *("run", "norm", "eps", "attack", "stage", "left %", "95 % interval"),
            *("broken", "search", "by float32 steps", "seconds"),
        )
        notes = (
            "Each stage gets the images that the stages before it have left. Broken counts the images that the "
            "stage broke.",
            "bf16, fp16 and fp32 are searches on the engine, confirmed by the plain model in float32; "
            "reference is pyautoattack. By float32 steps counts the images that only the steps after the search "
            "broke.",
        )
        return Table("AutoAttack, stage by stage", heading, tuple(rows), notes)

    def results(self) -> Table:
        """All results, with every field of the file of results."""
        rows = []
        for line, _, result in self.listed():
            row, distances = result.row, result.row.distances
            radius = "no ball" if distances else format_eps(row.eps)
            rows.append(
                (
                    *(line.run.name, result.subject.checkpoint or "-", result.subject.data or "-"),
                    *(row.name, row.variant or "-", result.setting, row.surrogate or "-"),
                    *(f"{100 * row.accuracy:.2f}", interval_text(row)),
                    *(str(row.correct), str(row.n)),
                    *(("-", "-") if result.is_clean else (result.norm, radius)),
                    bounds_text(result.bounds),
                    *(distance_text(distances.median if distances else None),),
                    *(distance_text(distances.mean if distances else None),),
                    *("-" if row.alpha is None else f"{row.alpha:.6g}", _or_dash(row.steps)),
                    *("+".join(result.after) or "-", str(row.seed), str(result.batch_size)),
                    *(row.search or "-", row.status, f"{row.seconds:.1f}", result.date or "-"),
                )
            )
        heading = (
            *("run", "checkpoint", "data", "attack", "variant", "setting", "surrogate"),
            *("accuracy %", "95 % interval", "right", "of"),
            *("norm", "eps", "bounds", "median distance", "mean distance", "alpha", "steps"),
            *("after", "seed", "batch", "search", "status", "seconds", "date"),
        )
        return Table("All results", heading, tuple(rows))

    def origins(self) -> Table:
        """The weights, the command and the versions of each result."""
        rows = []
        for line, _, result in self.listed():
            subject = result.subject
            versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
            rows.append(
                (
                    *(line.run.name, subject.network or line.run.network),
                    *(f"{n:,}" if n else "-" for n in (subject.parameters, subject.multiply_adds)),
                    *(subject.weights[:_SHOWN_DIGITS] or "-", result.device, versions or "-"),
                    result.command or "-",
                )
            )
        heading = (
            *("run", "model", "parameters", "multiply-adds"),
            *("weights", "device", "versions", "command"),
        )
        notes = (
            "Multiply-adds are counted in the convolutions and matrix products of one pass of one image.",
            "Weights are named by the start of their SHA-256.",
        )
        return Table("Where the numbers are from", heading, tuple(dict.fromkeys(rows)), notes)

    def points(self) -> list[TradeOffPoint]:
        """The points of the plot: the runs, and the means of runs that differ only in their seed."""
        if self.radius is None:
            return []
        lines = [
            line
            for line in self.comparison.at(self.radius)
            if {CLEAN, self.robust} <= line.cells.keys()
        ]
        series = [one for one in self.series if all(line in lines for line in one.lines)]
        several = [line for one in series for line in one.lines]
        return [_point(self.comparison, line, self.robust, line in several) for line in lines] + [
            _mean_point(one, self.robust) for one in series
        ]

    @property
    def plot_title(self) -> str:
        """Data, number of images and radius of the plot."""
        lines = [] if self.radius is None else self.comparison.at(self.radius)
        data = ", ".join(dict.fromkeys(line.subject.data or "unknown data" for line in lines))
        counts = sorted({line.n for line in lines})
        n = " to ".join(f"{count:,}" for count in dict.fromkeys(counts[:1] + counts[-1:]))
        radius = "" if self.radius is None else f"eps {format_eps(self.radius[1])} {self.radius[0]}"
        return f"{data}, {n} images, {radius}"

    def listed(self) -> Iterable[tuple[Line, str, Result]]:
        """Each result once; several lines can share a result without an attack."""
        seen = set()
        for line in self.comparison.lines:
            for title, result in line.cells.items():
                if id(result) not in seen:
                    seen.add(id(result))
                    yield line, title, result


def _has(title: str, run: EvaluatedRun, lines: Sequence[Line]) -> bool:
    return any(title in line.cells and CLEAN in line.cells for line in lines if line.run is run)


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


def _spread(values: list[float] | None, mark: str) -> str:
    if values is None:
        return "-"
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.2f} ± {deviation:.2f}{mark}"


def _point(comparison: Comparison, line: Line, robust: str, minor: bool) -> TradeOffPoint:
    clean, attacked = line.cells[CLEAN].row, line.cells[robust].row
    name = f"{comparison.label(line)}{status_mark(clean, attacked)}"
    return TradeOffPoint.from_rows(name, clean, attacked, method=line.run.method, minor=minor)


def _mean_point(series: Series, robust: str) -> TradeOffPoint:
    clean, attacked = series.accuracies(CLEAN), series.accuracies(robust)
    assert clean is not None and attacked is not None
    name = f"{series.method}, mean of {len(series.lines)}{series.mark(CLEAN, robust)}"
    means = (mean_and_deviation(clean)[0], mean_and_deviation(attacked)[0])
    return TradeOffPoint(name, *means, method=series.method)
