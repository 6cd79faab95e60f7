"""What `ops.py` has measured, for reading: a table, a roofline plot, a comparison with an earlier run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import machine_line, text_table

Results = dict[str, Any]  # pytest-benchmark's JSON
Entry = dict[str, Any]  # one of its benchmarks
COPY, EAGER, COMPILED = "copy", "reference", "compiled"


def table(results: Results) -> str:
    """One line per row and candidate."""
    header = [
        "op",
        "shape",
        "dtype",
        "layout",
        "backend",
        "us",
        "+-%",
        "GB/s",
        "of copy",
        "extra MB",
    ]
    header += ["vs eager", "vs compiled"]
    lines = []
    for group in _groups(results):
        for name, entry in group.items():
            if name != COPY:
                lines.append(_line(name, entry, group))
    facts = results["machine_info"]
    head = [
        machine_line(facts["fastadv"]),
        f"copy bandwidth, 256 MB: {facts['copy_bytes_per_second'] / 1e9:.1f} GB/s, read and written counted",
    ]
    refused = [f"refused: {op}: {why}" for op, why in results.get("refused", {}).items()]
    return "\n".join([*head, *refused, "", text_table(header, lines)])


def _line(name: str, entry: Entry, group: dict[str, Entry]) -> list[str]:
    facts, seconds = entry["extra_info"], _median(entry)
    peak = facts["peak"]
    return [
        f"{facts['op']} {facts['variant']}",
        "x".join(map(str, facts["shape"])),
        facts["dtype"],
        facts["layout"],
        f"{name} *" if name == facts["owner"] else name,
        f"{seconds * 1e6:.1f}",
        f"{50 * entry['stats']['iqr'] / seconds:.0f}",
        f"{facts['bytes'] / seconds / 1e9:.1f}",
        f"{_median(group[COPY]) / seconds:.0%}",
        "?" if peak is None else f"{peak / 1e6:.1f}",
        _ratio(EAGER, name, group),
        _ratio(COMPILED, name, group),
    ]


def _ratio(rival: str, name: str, group: dict[str, Entry]) -> str:
    if name == rival or rival not in group:
        return ""
    return f"{_median(group[rival]) / _median(group[name]):.2f}x"


def _groups(results: Results) -> Iterator[dict[str, Entry]]:
    """The candidates of each row by name."""
    groups: dict[str, dict[str, Entry]] = {}
    for entry in results["benchmarks"]:
        groups.setdefault(entry["group"], {})[entry["extra_info"]["candidate"]] = entry
    yield from groups.values()


def _median(entry: Entry) -> float:
    return entry["stats"]["median"]


def comparison(earlier: Results, later: Results) -> str:
    """What both runs measured, side by side; a change counts where the quartiles do not overlap."""
    before = {entry["name"]: entry for entry in earlier["benchmarks"]}
    lines = []
    for entry in later["benchmarks"]:
        old = before.get(entry["name"])
        if old is not None and entry["extra_info"]["candidate"] != COPY:
            times = [f"{_median(e) * 1e6:.1f}" for e in (old, entry)]
            ratio = f"{_median(old) / _median(entry):.2f}x"
            lines.append([entry["name"].partition("[")[2][:-1], *times, ratio, _change(old, entry)])
    head = f"compared with the run of {earlier['machine_info']['fastadv']['date']}"
    differing = _differing(earlier["machine_info"]["fastadv"], later["machine_info"]["fastadv"])
    if differing:
        head += f"; ANOTHER SETUP, so that times do not compare: {', '.join(differing)}"
    if not lines:
        return f"{head}\nnothing was measured in both"
    return f"{head}\n{text_table(['row', 'us then', 'us now', 'speedup', ''], lines)}"


def _change(old: Entry, new: Entry) -> str:
    if new["stats"]["q3"] < old["stats"]["q1"]:
        return "faster"
    return "slower" if new["stats"]["q1"] > old["stats"]["q3"] else ""


def _differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The facts about machine and versions in which two runs differ."""
    return [key for key in ("device", "gpu", "cpu", "packages") if old.get(key) != new.get(key)]


def roofline(results: Results, path: Path) -> None:
    """Operations per second over operations per byte, below the roof that copying sets."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    groups = list(_groups(results))
    intensities = [_intensity(entry) for group in groups for entry in group.values()]
    ends = [min(intensities) / 2, max(intensities) * 2]
    roofs = {
        "copy of 256 MB": results["machine_info"]["copy_bytes_per_second"],
        "fastest copy of a row's size": max(_bandwidth(group[COPY]) for group in groups),
    }
    for (label, bandwidth), style in zip(roofs.items(), ("-", ":"), strict=True):
        rates = [bandwidth * x / 1e9 for x in ends]
        axes.plot(ends, rates, style, color="black", label=f"{label}: {bandwidth / 1e9:.0f} GB/s")
    _points(axes, groups)
    axes.set(xscale="log", yscale="log", ylabel="operations per second, in 1e9")
    axes.set_xlabel(
        "operations per byte that must be moved (filled: this package, hollow: eager torch)\n"
        + machine_line(results["machine_info"]["fastadv"])
    )
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    axes.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _points(axes: Any, groups: list[dict[str, Entry]]) -> None:
    """One colour per sample, one point per row: the owner's, and the eager reference's."""
    from matplotlib import colormaps

    colours: dict[str, Any] = {}
    for group in groups:
        facts = group[COPY]["extra_info"]
        label = f"{facts['op']} {facts['variant']}"
        known = label in colours
        colour = colours.setdefault(label, colormaps["tab20"](len(colours) % 20))
        for name, filled in ((facts["owner"], True), (EAGER, False)):
            if name not in group:
                continue
            rate = facts["operations"] / _median(group[name]) / 1e9
            face = colour if filled else "none"
            shown = label if filled and not known else None
            axes.scatter(
                _intensity(group[name]), rate, edgecolors=colour, facecolors=face, label=shown
            )


def _intensity(entry: Entry) -> float:
    return entry["extra_info"]["operations"] / entry["extra_info"]["bytes"]


def _bandwidth(entry: Entry) -> float:
    return entry["extra_info"]["bytes"] / _median(entry)
