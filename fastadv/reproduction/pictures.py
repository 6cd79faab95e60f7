"""The picture of a reproduced table: a trade-off, lines, or bars, with the paper's figures beside ours."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fastadv.evaluation import ARREST_CIFAR10_CURVE, ARREST_CIFAR100_CURVE, Cubic, fit_cubic
from fastadv.evaluation.plot_style import LIGHT, MARKERS, new_figure, numbered, png_of
from fastadv.evaluation.plots import TradeOffPoint, draw_trade_off
from fastadv.reproduction.tables import Cell, PaperTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CURVES = {"cifar10": ARREST_CIFAR10_CURVE, "cifar100": ARREST_CIFAR100_CURVE}
_MIN_POINTS = 4  # points with different clean accuracies that a cubic needs


def picture(table: PaperTable) -> bytes | None:
    """Draw a table.

    Returns:
        A PNG file; None where there is nothing to draw, or matplotlib is not installed.
    """
    draw = {"trade_off": _trade_off, "lines": _lines, "bars": _bars}[table.item.picture]
    try:
        return draw(table)
    except ImportError:
        return None


def _title(table: PaperTable) -> str:
    return f"{table.item.heading} ({table.scale}, {table.data})"


def _trade_off(table: PaperTable) -> bytes | None:
    """The first two columns against each other, with the cubic through the points and the paper's own curve."""
    points, published = [], {}
    for row, cells in zip(table.item.rows, table.cells, strict=True):
        clean, robust = cells[0], cells[1]
        if clean.mean is not None and robust.mean is not None:
            intervals = (_interval(clean), _interval(robust))
            points.append(
                TradeOffPoint(row.label, clean.mean, robust.mean, *intervals, method=row.group)
            )
        if clean.paper is not None and robust.paper is not None:
            published[f"{row.label} (paper)"] = (clean.paper, robust.paper)
    if not points:
        return None
    comparable = table.scale == "paper" and table.paper_data == table.data
    curve = _CURVES.get(table.data) if comparable else _fitted(points)
    if not table.item.curve:
        curve = None
    figure = draw_trade_off(
        points,
        curve=curve,
        title=_title(table),
        robust_label=f"{table.item.columns[1].label} (%)",
        published=published if comparable else None,
    )
    return png_of(figure)


def _fitted(points: list[TradeOffPoint]) -> Cubic | None:
    """The cubic fitted to the points; None where fewer than `_MIN_POINTS` have different clean accuracies."""
    different = {round(point.clean, 1) for point in points}
    if len(different) < _MIN_POINTS:
        return None
    return fit_cubic([(point.clean, point.robust) for point in points])


def _interval(cell: Cell) -> tuple[float, float] | None:
    """The interval of a cell, clipped to 0..100 and widened to hold the mean."""
    interval = cell.interval
    if interval is None or cell.mean is None:
        return None
    return max(min(interval[0], cell.mean), 0.0), min(max(interval[1], cell.mean), 100.0)


def _lines(table: PaperTable) -> bytes | None:
    """A line for each row; the columns are the places on the axis."""
    figure, axes = new_figure(LIGHT, 7.2, 4.8)
    places = [c.x if c.x is not None else i for i, c in enumerate(table.item.columns)]
    colours = numbered(row.label for row in table.item.rows)
    drawn = False
    for number, (row, cells) in enumerate(zip(table.item.rows, table.cells, strict=True)):
        ours = [(x, c) for x, c in zip(places, cells, strict=True) if c.mean is not None]
        ink = LIGHT.colour(colours[row.label])
        if ours:
            drawn = True
            axes.errorbar(
                [x for x, _ in ours],
                [c.mean or 0.0 for _, c in ours],
                yerr=[_error(c) for _, c in ours] if table.seeds > 1 else None,
                marker=MARKERS[number % len(MARKERS)],
                color=ink,
                capsize=2.5,
                label=row.label,
            )
        theirs = [(x, c.paper) for x, c in zip(places, cells, strict=True) if c.paper is not None]
        if theirs:
            xs, ys = zip(*theirs, strict=True)
            axes.plot(xs, ys, "--", color=ink, alpha=0.5, label=f"{row.label} (paper)")
    if not drawn:
        return None
    if any(column.x is None for column in table.item.columns):
        axes.set_xticks(places, [column.label for column in table.item.columns])
    return _finished(table, figure, axes)


def _error(cell: Cell) -> float:
    return 0.0 if cell.deviation is None else cell.deviation


def _bars(table: PaperTable) -> bytes | None:
    """A group of bars for each row, one for each column; the paper's figures are black strokes."""
    figure, axes = new_figure(LIGHT, max(7.2, 0.45 * len(table.item.rows) + 3), 4.8)
    columns = table.item.columns
    width, told = 0.8 / len(columns), False
    if all(cell.mean is None for cells in table.cells for cell in cells):
        return None
    for number, column in enumerate(columns):
        cells = [row[number] for row in table.cells]
        places = [i + (number - (len(columns) - 1) / 2) * width for i in range(len(cells))]
        heights = [math.nan if cell.mean is None else cell.mean for cell in cells]
        axes.bar(places, heights, width, color=LIGHT.colour(number), label=column.label)
        known = [(x, c.paper) for x, c in zip(places, cells, strict=True) if c.paper is not None]
        label: str | None = f"paper ({table.paper_data})" if not told else None
        for x, value in known:
            axes.plot(
                [x - width / 2, x + width / 2],
                [value, value],
                color=LIGHT.ink,
                linewidth=1.4,
                label=label,
            )
            label, told = None, True
    axes.set_xticks(
        range(len(table.item.rows)),
        [row.label for row in table.item.rows],
        rotation=45 if len(table.item.rows) > 4 else 0,
        ha="right" if len(table.item.rows) > 4 else "center",
    )
    return _finished(table, figure, axes)


def _finished(table: PaperTable, figure: Figure, axes: Axes) -> bytes:
    across, up = table.item.axes
    axes.set_xlabel(across, fontsize=12, color=LIGHT.ink)
    axes.set_ylabel(up, fontsize=12, color=LIGHT.ink)
    axes.set_title(_title(table), fontsize=13, color=LIGHT.ink)
    axes.legend(
        frameon=False, fontsize=8, labelcolor=LIGHT.ink, loc="upper left", bbox_to_anchor=(1.0, 1.0)
    )
    return png_of(figure)
