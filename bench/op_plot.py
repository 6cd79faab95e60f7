"""The roofline plot of an op benchmark: how far each op is below the roof that copying sets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measure import machine_line
from op_report import Entry, Group, Results, groups_of, median
from op_rows import BOTH, COPY, EAGER

_MARKERS = "osD^vP*Xp<>hd"


def roofline(results: Results, path: Path) -> None:
    """Operations per second over operations per byte, below the roof that copying sets."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = {n: g for n, g in groups_of(results).items() if _plotted(g)}
    if not groups:
        return
    facts = results["machine_info"]
    figure = Figure(figsize=(13, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _roofs(axes, facts["copy_bytes_per_second"], groups)
    _points(axes, groups)
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("operations per byte that must be moved")
    axes.set_ylabel("operations per second, in 1e9")
    axes.set_title(
        "Ops against the bandwidth of a copy (filled: this package, hollow: eager reference)\n"
        + machine_line(facts["fastadv"]),
        fontsize=10,
    )
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    axes.grid(which="both", alpha=0.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _plotted(group: Group) -> bool:
    """Rows whose operations are known and whose owner ran beside a copy."""
    facts = next(iter(group.values()))["extra_info"]
    return facts["direction"] != BOTH and facts["owner"] in group and COPY in group


def _roofs(axes: Any, bandwidth: float, groups: Mapping[str, Group]) -> None:
    intensities = [_intensity(group[COPY]) for group in groups.values()]
    ends = [min(intensities) / 2, max(intensities) * 2]
    fastest = max(
        group[COPY]["extra_info"]["bytes"] / median(group[COPY]) for group in groups.values()
    )
    for label, roof, style in (
        ("copy of 256 MB", bandwidth, "-"),
        ("fastest copy of a row's size", fastest, ":"),
    ):
        rates = [roof * x / 1e9 for x in ends]
        axes.plot(ends, rates, style, color="black", label=f"{label}: {roof / 1e9:.0f} GB/s")


def _points(axes: Any, groups: Mapping[str, Group]) -> None:
    """A colour and marker per op and variant; per row the owner's point above the eager reference's."""
    from matplotlib import colormaps

    styles: dict[str, tuple[Any, str]] = {}
    for group in groups.values():
        facts = group[COPY]["extra_info"]
        label = f"{facts['op']} {facts['variant']}"
        new, place = label not in styles, len(styles)
        style = (colormaps["tab10"](place % 10), _MARKERS[place % len(_MARKERS)])
        colour, marker = styles.setdefault(label, style)
        for name, face, shown in ((facts["owner"], colour, label), (EAGER, "none", None)):
            if name in group:
                x, y = _intensity(group[name]), _rate(group[name])
                axes.scatter(
                    x,
                    y,
                    s=36,
                    marker=marker,
                    edgecolors=colour,
                    facecolors=face,
                    label=shown if new else None,
                    alpha=0.85,
                )


def _intensity(entry: Entry) -> float:
    return entry["extra_info"]["operations"] / entry["extra_info"]["bytes"]


def _rate(entry: Entry) -> float:
    return entry["extra_info"]["operations"] / median(entry) / 1e9
