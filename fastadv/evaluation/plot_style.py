"""The style of pictures: colours for a light and a dark page, one colour per method, and PNG output."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = ("o", "s", "^", "D", "v", "p", "<", "h")
_RESOLUTION = 160  # pixels per inch


@dataclass(frozen=True)
class Style:
    """The colours of a picture.

    Attributes:
        paper: colour of the background.
        ink: colour of text and axes.
        grey: colour of auxiliary lines and published points.
        colours: colours of the methods, in their order.
    """

    paper: str
    ink: str
    grey: str
    colours: tuple[str, ...]

    def colour(self, number: int) -> str:
        """The colour of a method by its number; after the last colour the first follows again."""
        return self.colours[number % len(self.colours)]


LIGHT = Style(
    "#ffffff",
    "#000000",
    "#858585",
    ("#0b5fa5", "#c44e00", "#2b7a3d", "#8a2f8c", "#a8182b", "#5b4a2f", "#00777a", "#555555"),
)
DARK = Style(
    "#16191d",
    "#e4e6e8",
    "#8b9096",
    ("#6db3f2", "#ff9d5c", "#77cf8c", "#d78fd9", "#ff8090", "#cdb58a", "#5fd0d3", "#b9bcc0"),
)


def numbered(names: Iterable[str]) -> dict[str, int]:
    """Number different names in their order, by which each gets its colour."""
    return {name: number for number, name in enumerate(dict.fromkeys(names))}


def new_figure(style: Style, width: float, height: float) -> tuple[Figure, Axes]:
    """A figure with one pair of axes, on a canvas of its own; pyplot and its backend are not used."""
    figure_class, canvas_class = _import_matplotlib()
    figure = figure_class(figsize=(width, height), layout="constrained", facecolor=style.paper)
    canvas_class(figure)
    axes = figure.add_subplot()
    axes.set_facecolor(style.paper)
    axes.tick_params(labelsize=11, colors=style.ink)
    axes.spines[["top", "right"]].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(style.ink)
    return figure, axes


def png_of(figure: Figure) -> bytes:
    """The picture as a PNG file."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=_RESOLUTION)
    return image.getvalue()


def _import_matplotlib() -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
    return Figure, FigureCanvasAgg
