"""The trade-off plot: clean against robust accuracy, one labelled marker per method."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastadv.evaluation.label_placement import Box, place_labels
from fastadv.evaluation.metrics import Cubic
from fastadv.evaluation.plot_style import LIGHT, MARKERS, Style, new_figure, numbered, png_of
from fastadv.evaluation.report import Report
from fastadv.evaluation.result_row import Row, check_white_box
from fastadv.fields import check_fields
from fastadv.files import write_atomically
from fastadv.ops.values import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LEADER_FROM = 18.0  # typographic points between marker and label from which a line joins them


@dataclass(frozen=True)
class TradeOffPoint:
    """One method of the plot; everything in percent.

    Attributes:
        name: the label.
        clean: clean accuracy.
        robust: robust accuracy.
        clean_interval: lower and upper end of its 95 % interval, None to draw no bar.
        robust_interval: the same of the robust accuracy.
        method: points of one method have one colour; empty for a colour of its own.
        minor: draw a small marker without a label, for one of several points that another point summarises.
        curve: points of one curve are joined, in their order, by a line of this name; empty for no line.

    Raises:
        TypeError: a field of another type.
        ValueError: an accuracy outside 0..100.
    """

    name: str
    clean: float
    robust: float
    clean_interval: tuple[float, float] | None = None
    robust_interval: tuple[float, float] | None = None
    method: str = ""
    minor: bool = False
    curve: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("clean", "robust"):
            if not 0 <= getattr(self, name) <= 100:
                raise ValueError(f"{name} must be in 0..100, got {getattr(self, name)}")

    @classmethod
    def from_report(cls, name: str, report: Report, robust: str = "autoattack") -> TradeOffPoint:
        """Take the figures from a report that has the rows ``"clean"`` and the one named by ``robust``."""
        return cls.from_rows(name, report["clean"], report[robust])

    @classmethod
    def from_rows(
        cls, name: str, clean: Row, robust: Row, *, method: str = "", minor: bool = False
    ) -> TradeOffPoint:
        """Take the figures from two rows.

        Raises:
            ValueError: where ``robust`` is not an attack in a ball on the judged model itself.
        """
        check_white_box(robust)
        return cls(
            name,
            100 * clean.accuracy,
            100 * robust.accuracy,
            _percent(clean.interval),
            _percent(robust.interval),
            method,
            minor,
        )


def plot_trade_off(
    points: Sequence[TradeOffPoint],
    path: str | os.PathLike[str],
    *,
    curve: Cubic | None = None,
    title: str | None = None,
    robust_label: str = "Robust accuracy (%)",
    published: Mapping[str, tuple[float, float]] | None = None,
) -> Path:
    """Draw clean against robust accuracy and save the picture as PNG.

    Dotted lines join points of equal sum of the two. No axis goes beyond 0 and 100.

    Args:
        points: at least one method; their labels are placed so that they do not overlap.
        path: file of the picture, ending in ``.png``; it is written atomically.
        curve: a cubic to draw, such as the curve of ARDist.
        title: heading of the picture.
        robust_label: name of the vertical axis.
        published: (clean, robust) of further methods by name, drawn in grey.

    Returns:
        The path written.

    Raises:
        ImportError: when matplotlib is not installed.
        TypeError: for points of another type.
        ValueError: for no points, or a path with another suffix.
    """
    if not points:
        raise ValueError("points must hold at least one method, got no points")
    for point in points:
        if not isinstance(point, TradeOffPoint):
            raise TypeError(f"points must be TradeOffPoints, got {shown(point)}")
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"path must end in .png, got {os.fspath(path)!r}")
    figure = draw_trade_off(
        points, curve=curve, title=title, robust_label=robust_label, published=published
    )
    return write_atomically(path, png_of(figure))


def draw_trade_off(
    points: Sequence[TradeOffPoint],
    *,
    curve: Cubic | None = None,
    title: str | None = None,
    robust_label: str = "Robust accuracy (%)",
    published: Mapping[str, tuple[float, float]] | None = None,
    style: Style = LIGHT,
) -> Figure:
    """The figure that ``plot_trade_off`` saves, for a light page or in another style."""
    figure, axes = new_figure(style, 7.2, 5.4)
    grey = [TradeOffPoint(name, *accuracies) for name, accuracies in (published or {}).items()]
    _set_limits(axes, [*points, *grey])
    _draw_equal_sums(axes, style)
    if curve is not None:
        left, right = axes.get_xlim()
        x = np.linspace(left, right, 200)
        y = [curve(value) for value in x]
        axes.plot(x, y, color=style.grey, linewidth=1.4, label="fitted cubic", zorder=2)
    colours = numbered(point.method or point.name for point in points)
    inks = [style.colour(colours[point.method or point.name]) for point in points]
    for number, (point, ink) in enumerate(zip(points, inks, strict=True)):
        _draw_point(axes, point, MARKERS[number % len(MARKERS)], ink, style)
    joined = _draw_curves(axes, points, inks)
    if grey:
        clean, robust = zip(*((point.clean, point.robust) for point in grey), strict=True)
        axes.plot(clean, robust, "x", color=style.grey, markersize=6, label="published")
    if grey or curve is not None or joined:
        axes.legend(loc="lower left", frameon=False, fontsize=11, labelcolor=style.ink)
    axes.set_xlabel("Clean accuracy (%)", fontsize=13, color=style.ink)
    axes.set_ylabel(robust_label, fontsize=13, color=style.ink)
    if title:
        axes.set_title(title, fontsize=14, color=style.ink)
    figure.draw_without_rendering()  # settles the layout, so that text can be measured
    _write_labels(axes, [*points, *grey], [*inks, *[style.grey] * len(grey)])
    return figure


def _percent(interval: tuple[float, float]) -> tuple[float, float]:
    return 100 * interval[0], 100 * interval[1]


def _set_limits(axes: Axes, points: Sequence[TradeOffPoint]) -> None:
    """Show every bar, with room for labels around it, but nothing beyond 0 and 100 %."""
    clean = [v for p in points for v in (p.clean, *(p.clean_interval or ()))]
    robust = [v for p in points for v in (p.robust, *(p.robust_interval or ()))]
    for values, set_limits in ((clean, axes.set_xlim), (robust, axes.set_ylim)):
        margin = max(0.18 * (max(values) - min(values)), 1.0)
        set_limits(max(min(values) - margin, 0.0), min(max(values) + margin, 100.0))


def _draw_equal_sums(axes: Axes, style: Style) -> None:
    """Draw lines of equal clean + robust at round sums, with labels where they leave the picture on the right."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    span = right + top - left - bottom
    step = next(s for s in (0.5, 1, 2, 5, 10, 20, 50) if span / s <= 9)
    for total in np.arange(np.ceil((left + bottom) / step), (right + top) / step) * step:
        axes.plot(
            [left, right],
            [total - left, total - right],
            color=style.grey,
            linewidth=0.8,
            linestyle=(0, (1, 2.5)),
            alpha=0.6,
            zorder=1,
        )
        height = total - right
        if bottom <= height <= top:
            axes.annotate(
                f"Sum {total:g}",
                (right, height),
                xytext=(4, 0),
                textcoords="offset points",
                fontsize=9.5,
                color=style.grey,
                va="center",
                annotation_clip=False,
            )


def _draw_point(axes: Axes, point: TradeOffPoint, marker: str, ink: str, style: Style) -> None:
    axes.errorbar(
        point.clean,
        point.robust,
        xerr=_bar(point.clean, point.clean_interval),
        yerr=_bar(point.robust, point.robust_interval),
        fmt=marker,
        markersize=4.5 if point.minor else 9,
        markeredgecolor=style.paper,
        markeredgewidth=0.8,
        color=ink,
        ecolor=(ink, 0.3 if point.minor else 0.6),
        elinewidth=1.1,
        capsize=2.5,
        zorder=3,
        clip_on=False,  # a marker at 0 or 100 is whole
    )


def _draw_curves(axes: Axes, points: Sequence[TradeOffPoint], inks: Sequence[str]) -> bool:
    """Join the points of each curve, and return whether there is a curve."""
    curves: dict[str, list[int]] = {}
    for number, point in enumerate(points):
        if point.curve:
            curves.setdefault(point.curve, []).append(number)
    for name, numbers in curves.items():
        clean, robust = [points[n].clean for n in numbers], [points[n].robust for n in numbers]
        axes.plot(clean, robust, color=inks[numbers[0]], linewidth=1.3, label=name, zorder=2)
    return bool(curves)


def _bar(value: float, interval: tuple[float, float] | None) -> list[list[float]] | None:
    return None if interval is None else [[value - interval[0]], [interval[1] - value]]


def _write_labels(axes: Axes, points: Sequence[TradeOffPoint], inks: Sequence[str]) -> None:
    """Write the names of the methods where there is room, with a thin line to a marker that is far away."""
    pixels = axes.figure.dpi / 72  # per typographic point
    labelled = [(p, ink) for p, ink in zip(points, inks, strict=True) if not p.minor]
    anchors = [tuple(axes.transData.transform((p.clean, p.robust))) for p, _ in labelled]
    texts = [
        axes.annotate(
            point.name,
            (point.clean, point.robust),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=11.5,
            color=ink,
            ha="center",
            va="center",
            zorder=4,
        )
        for point, ink in labelled
    ]
    extents = [text.get_window_extent() for text in texts]
    sizes = [(extent.width, extent.height) for extent in extents]
    obstacles = [box for point in points for box in _obstacles(axes, point, pixels)]
    window = axes.get_window_extent()
    frame = Box(window.x0, window.y0, window.x1, window.y1)
    boxes = place_labels(anchors, sizes, obstacles, frame, pixels)
    for text, box, (x, y) in zip(texts, boxes, anchors, strict=True):
        # The offset from the marker is in typographic points, so that it is right at any resolution.
        text.set_position(
            (((box.left + box.right) / 2 - x) / pixels, ((box.bottom + box.top) / 2 - y) / pixels)
        )
        nearest = (min(max(x, box.left), box.right), min(max(y, box.bottom), box.top))
        if np.hypot(nearest[0] - x, nearest[1] - y) > _LEADER_FROM * pixels:
            ends = axes.transData.inverted().transform([(x, y), nearest])
            axes.plot(ends[:, 0], ends[:, 1], color=text.get_color(), linewidth=0.7, zorder=2)


def _obstacles(axes: Axes, point: TradeOffPoint, pixels: float) -> list[Box]:
    """Boxes of a marker and its bars, in pixels, with a margin."""
    margin = 2.5 * pixels
    x, y = axes.transData.transform((point.clean, point.robust))
    boxes = [Box(x - 2 * margin, y - 2 * margin, x + 2 * margin, y + 2 * margin)]
    for interval, across in ((point.clean_interval, False), (point.robust_interval, True)):
        if interval is not None:
            ends = [(point.clean, v) if across else (v, point.robust) for v in interval]
            (x0, y0), (x1, y1) = axes.transData.transform(ends)
            boxes.append(Box(x0 - margin, y0 - margin, x1 + margin, y1 + margin))
    return boxes
