"""The analyses "eps-curve" and "steps-curve": accuracy under PGD over the radius, and over the number of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastadv.evaluation.analyses.analysis import Analysis, AnalysisContext, Measured, label_axes
from fastadv.evaluation.evaluate import evaluate
from fastadv.evaluation.plot_style import MARKERS, Style
from fastadv.evaluation.report import Report
from fastadv.evaluation.result_row import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FIGURES = ("accuracy", "low", "high", "correct", "n", "status")


class RobustnessOverEps(Analysis):
    """Accuracy under PGD at each of several radii; step size a quarter of each radius unless alpha is given."""

    name = "eps-curve"
    title = "Accuracy under PGD over the radius"
    needs = ("images",)
    uses = ("radii", "alpha", "steps", "seed")

    def compute(self, context: AnalysisContext) -> Measured:
        """One row per radius; the row at 0 is without an attack."""
        settings = context.settings
        attacks = ["clean", f"pgd-{settings.steps}"]
        report = _judge(context, attacks, settings.radii, settings.alpha)
        # The clean accuracy is kept once, though the report may have it for each radius.
        rows = [report.rows[0], *(row for row in report.rows if row.name != "clean")]
        found = tuple((row.eps, *_figures(row)) for row in rows)
        summary = {
            "accuracy without an attack": rows[0].accuracy,
            "accuracy at the largest radius": rows[-1].accuracy,
        }
        return Measured(self.name, ("eps", *_FIGURES), found, summary, _notes(report))

    def draw(self, found: Mapping[str, Measured], axes: Axes, style: Style) -> None:
        """One curve per model, with 95 % intervals; radii in units of 1/255."""
        _draw(found, "eps", 255, axes, style)
        axes.set_xlim(left=0)
        label_axes(axes, style, "radius (1/255)", "accuracy (%)")


class RobustnessOverSteps(Analysis):
    """Accuracy under PGD of several numbers of steps; step size a quarter of eps unless alpha is given."""

    name = "steps-curve"
    title = "Accuracy under PGD over the number of steps"
    needs = ("images",)
    uses = ("eps", "alpha", "step_counts", "seed")

    def compute(self, context: AnalysisContext) -> Measured:
        """One row per number of steps; the row at 0 is without an attack."""
        settings = context.settings
        attacks = ["clean", *(f"pgd-{count}" for count in settings.step_counts)]
        report = _judge(context, attacks, [settings.eps], settings.alpha)
        counts = (0, *settings.step_counts)
        found = tuple((c, *_figures(row)) for c, row in zip(counts, report.rows, strict=True))
        summary = {
            "accuracy without an attack": report.rows[0].accuracy,
            "accuracy under most steps": report.rows[-1].accuracy,
        }
        return Measured(self.name, ("steps", *_FIGURES), found, summary, _notes(report))

    def draw(self, found: Mapping[str, Measured], axes: Axes, style: Style) -> None:
        """One curve per model, with 95 % intervals; steps on a logarithmic axis that begins with 0."""
        _draw(found, "steps", 1, axes, style)
        axes.set_xscale("symlog", linthresh=1)
        ticks = sorted({count for one in found.values() for count in one.column("steps")})
        axes.set_xticks(ticks, [str(count) for count in ticks])
        axes.minorticks_off()
        axes.set_xlim(left=-0.1)
        label_axes(axes, style, "steps", "accuracy (%)")


def _judge(
    context: AnalysisContext, attacks: Sequence[str], radii: Sequence[float], alpha: float | None
) -> Report:
    return evaluate(
        context.model,
        context.images,
        tuple(attacks),
        eps=list(radii),
        alpha=alpha,
        batch_size=context.settings.batch_size,
        device=context.device,
        seed=context.settings.seed,
        progress=False,
    )


def _figures(row: Row) -> tuple[Any, ...]:
    return (row.accuracy, *row.interval, row.correct, row.n, row.status)


def _notes(report: Report) -> tuple[str, ...]:
    return tuple(dict.fromkeys(note for row in report.rows for note in row.notes))


def _draw(
    found: Mapping[str, Measured], column: str, unit: float, axes: Axes, style: Style
) -> None:
    for number, (name, one) in enumerate(found.items()):
        x = [unit * value for value in one.column(column)]
        middle, low, high = (
            [100 * value for value in one.column(c)] for c in ("accuracy", "low", "high")
        )
        colour = style.colour(number)
        marker = MARKERS[number % len(MARKERS)]
        axes.plot(x, middle, marker=marker, markersize=5, color=colour, label=name)
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.set_ylim(0, 100)
