"""Curves of accuracy over the radius, where a model has been judged at several radii."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastadv.evaluation.attack_list import CLEAN
from fastadv.evaluation.comparison import Comparison, Line
from fastadv.evaluation.plot_style import LIGHT, MARKERS, Style, new_figure, numbered
from fastadv.evaluation.result_row import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Curve:
    """One model's accuracy under one attack.

    Attributes:
        name: the label.
        method: curves of one method have one colour.
        points: radius and row, radii ascending; at radius 0 the row without an attack.
    """

    name: str
    method: str
    points: tuple[tuple[float, Row], ...]


@dataclass(frozen=True)
class CurvePlot:
    """Curves that belong in one picture.

    Attributes:
        attack: name of the attack.
        norm: norm of the radius.
        data: name of the images.
        n: number of images.
        curves: one curve per model.
        surrogate: the model on which the adversarial images were made; empty where each was the judged model.
    """

    attack: str
    norm: str
    data: str
    n: int
    curves: tuple[Curve, ...]
    surrogate: str = ""

    @property
    def title(self) -> str:
        """The heading of the picture."""
        kind = ", black-box transfer" if self.surrogate else ""
        return f"{self.attack}, {self.norm}{kind}\n{self.data}, {self.n:,} images"


def curve_plots(comparison: Comparison) -> list[CurvePlot]:
    """Find the attacks under which a model was judged at two radii or more."""
    plots: dict[tuple[Any, ...], dict[tuple[Any, ...], list[Line]]] = {}
    for line in comparison.lines:
        for title in line.cells:
            if title != CLEAN and line.norm and line.ball:
                subject = line.subject
                plot = (title, line.norm, subject.data, subject.images, line.n, line.surrogate)
                model = (line.run.name, subject.weights, subject.checkpoint, line.circumstances)
                plots.setdefault(plot, {}).setdefault(model, []).append(line)
    found = []
    for (title, norm, data, _, n, surrogate), models in plots.items():
        several = [lines for lines in models.values() if len({line.eps for line in lines}) > 1]
        curves = tuple(_curve(comparison, lines, title) for lines in several)
        if curves:
            found.append(CurvePlot(title, norm, data, n, curves, surrogate))
    return found


def _curve(comparison: Comparison, lines: Sequence[Line], title: str) -> Curve:
    points = {line.eps: line.cells[title].row for line in lines}
    clean = next((line.cells[CLEAN].row for line in lines if CLEAN in line.cells), None)
    if clean is not None:
        points[0.0] = clean
    return Curve(comparison.label(lines[0]), lines[0].run.method, tuple(sorted(points.items())))


def draw_curves(plot: CurvePlot, style: Style = LIGHT) -> Figure:
    """Draw the curves, with the 95 % interval at each point. Radii in linf are in units of 1/255.

    Raises:
        ImportError: when matplotlib is not installed.
    """
    figure, axes = new_figure(style, 7.2, 4.6)
    unit = 255 if plot.norm == "linf" else 1
    colours = numbered(curve.method for curve in plot.curves)
    for number, curve in enumerate(plot.curves):
        x = [unit * eps for eps, _ in curve.points]
        y = [100 * row.accuracy for _, row in curve.points]
        ends = [row.interval for _, row in curve.points]
        bars = [
            [value - 100 * low for value, (low, _) in zip(y, ends, strict=True)],
            [100 * high - value for value, (_, high) in zip(y, ends, strict=True)],
        ]
        colour = style.colour(colours[curve.method])
        axes.errorbar(
            *(x, y, bars),
            marker=MARKERS[number % len(MARKERS)],
            markersize=6,
            linewidth=1.6,
            color=colour,
            ecolor=(colour, 0.5),
            capsize=2.5,
            label=curve.name,
            clip_on=False,
        )
    axes.set_xlim(left=0)
    axes.set_ylim(0, 100)
    name = f"{plot.norm} radius" + (" (1/255)" if unit == 255 else "")
    axes.set_xlabel(name, fontsize=13, color=style.ink)
    axes.set_ylabel("Accuracy (%)", fontsize=13, color=style.ink)
    axes.set_title(plot.title, fontsize=13, color=style.ink)
    axes.legend(frameon=False, fontsize=11, labelcolor=style.ink)
    return figure
