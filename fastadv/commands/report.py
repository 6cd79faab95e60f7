"""What `fastadv report` does. The parameters are the options, the docstring their help."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fastadv.commands.evaluation import EVAL_FILE
from fastadv.evaluation import Subject, TradeOffPoint, load_results, plot_trade_off
from fastadv.evaluation.attack_list import CLEAN
from fastadv.evaluation.comparison import Comparison, Judged, Line, distinct_names, radius_text
from fastadv.files import write_atomically
from fastadv.trainers.number import Number
from fastadv.trainers.run_directory import RunDirectory


def run_report(
    runs: Sequence[str],
    out: str | None = None,
    robust: str | None = None,
    eps: Number | None = None,
    norm: Literal["linf", "l2", "l1"] | None = None,
) -> str:
    """The report.

    Args:
        runs: run directories that `fastadv eval` has been through, or files that its --out has written.
        out: folder for report.md and trade_off.png; by default nothing is written.
        robust: with out, the attack on the plot's vertical axis; by default the last one that all runs have.
        eps: with out, the radius of the plot; by default the one that all runs have, or 8/255 of several.
        norm: with out, its norm, where all runs have several.

    Returns:
        The table as text. Each line is of one radius, and of one checkpoint, set of images and seed.
    """
    paths = list(dict.fromkeys(runs))
    judged = [_judged(path, name) for path, name in zip(paths, distinct_names(paths), strict=True)]
    comparison = Comparison(judged)
    cells = comparison.cells()
    if out is None:
        for name, value in (("robust", robust), ("eps", eps), ("norm", norm)):
            if value is not None:
                raise ValueError(
                    f"{name} must come with out, as it is about the plot, got {value!r}"
                )
        return _aligned(cells)
    points, robust_label = _trade_off(comparison, robust, eps, norm)
    write_atomically(Path(out) / "report.md", _markdown(cells))
    plot_trade_off(points, Path(out) / "trade_off.png", robust_label=robust_label)
    return _aligned(cells)


def _judged(path: str, name: str) -> Judged:
    """Read the results of a run directory, or of a file."""
    source = Path(path)
    file = source if source.is_file() else source / EVAL_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; run `fastadv eval {path}` first")
    results = load_results(file)
    if not results:
        raise ValueError(f"{file}: holds no results; run `fastadv eval` first")
    subject = results[-1].subject
    if file != source:
        recorded = RunDirectory(path).read()
        network = recorded.model.get("name") or recorded.model.get("class", "")
        subject = Subject(method=recorded.method, network=str(network))
    return Judged(name, subject.method or "-", subject.network or "-", tuple(results))


def _trade_off(
    comparison: Comparison, robust: str | None, eps: float | None, norm: str | None
) -> tuple[list[TradeOffPoint], str]:
    """The points of the plot, all at one radius, and the name of its vertical axis."""
    radius = comparison.radius(eps, norm)
    lines = comparison.at(radius)
    common = [t for t in comparison.attacks if all(_has(t, run, lines) for run in comparison.runs)]
    robust = robust or next((title for title in reversed(common) if title != CLEAN), None)
    if robust is None or not {CLEAN, robust} <= set(common):
        raise ValueError(
            f"robust must be an attack that all runs have beside 'clean' {radius_text(*radius)}, "
            f"got {robust!r}; they have {', '.join(common) or 'nothing'} in common"
        )
    points = [
        TradeOffPoint.from_rows(
            comparison.label(line), line.cells[CLEAN].row, line.cells[robust].row
        )
        for line in lines
        if CLEAN in line.cells and robust in line.cells
    ]
    return points, f"Accuracy under {robust} {radius_text(*radius)} (%)"


def _has(title: str, run: Judged, lines: Sequence[Line]) -> bool:
    return any(title in line.cells and CLEAN in line.cells for line in lines if line.run is run)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    rows = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
    return "\n".join(rows)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    header, *rest = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([header, "|" + " --- |" * len(lines[0]), *rest]) + "\n"
