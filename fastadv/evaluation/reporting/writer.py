"""Writing a report into a folder, in all formats."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from fastadv import __version__
from fastadv.evaluation.comparison import radius_text
from fastadv.evaluation.plot_style import DARK, LIGHT, Style, png_of
from fastadv.evaluation.plots import draw_trade_off
from fastadv.evaluation.reporting.analyses import analysis_parts
from fastadv.evaluation.reporting.cards import card_text, model_cards
from fastadv.evaluation.reporting.curves import CurvePlot, curve_plots, draw_curves
from fastadv.evaluation.reporting.earlier import check_no_foreign_files, warn_of_earlier_figures
from fastadv.evaluation.reporting.gallery import galleries
from fastadv.evaluation.reporting.latex import latex
from fastadv.evaluation.reporting.pages import Plot, page
from fastadv.evaluation.reporting.records import to_csv, to_json
from fastadv.evaluation.reporting.summary import Summary
from fastadv.evaluation.reporting.tables import markdown
from fastadv.files import write_atomically
from fastadv.plain_text import markdown_text


def write_report(summary: Summary, folder: str | os.PathLike[str]) -> list[Path]:
    """Write report.md, .csv, .tex, .json and .html, the pictures, the analyses and the model cards into a folder.

    Everything is made before the first file is written.

    Args:
        summary: the content of the report.
        folder: the folder, made if missing.

    Returns:
        The files.

    Raises:
        ImportError: when matplotlib is not installed.
        FileExistsError: when a file of the user's has the name of a file of the report.
        OSError: when a file cannot be written.
    """
    check_no_foreign_files(Path(folder))
    models = [run.name for run in summary.comparison.runs]
    title = f"Robustness of {', '.join(models) if len(models) < 4 else f'{len(models)} models'}"
    names, plots = [], []
    trade_off = _trade_off_plot(summary)
    if trade_off is not None:
        names.append("trade_off.png")
        plots.append(trade_off)
    for curves in curve_plots(summary.comparison):
        plots.append(_curve_plot(curves))
        names.append(_file_name(curves, names))
    analyses = analysis_parts(summary.comparison)
    tables = summary.tables
    notes = [*([summary.no_plot] if summary.no_plot else []), *analyses.notes]
    worst = galleries(summary.comparison, summary.radius) or galleries(summary.comparison, None)
    files: dict[str, str | bytes] = {
        "report.md": markdown([*tables, *analyses.tables], title)
        + "".join(f"\n{markdown_text(note)}\n" for note in notes),
        "report.csv": to_csv(summary),
        "report.tex": latex(summary.printed),
        "report.json": to_json(summary),
        "report.html": page(
            title,
            _subtitle(summary),
            tables=tables,
            plots=plots,
            galleries=worst,
            notes=notes,
            analyses=[*analyses.plots.values(), *analyses.tables],
        ),
    }
    files |= {name: plot.light for name, plot in zip(names, plots, strict=True)}
    files |= {name: plot.light for name, plot in analyses.plots.items()}
    files |= analyses.files
    cards = model_cards(summary)
    files |= {f"cards/{name}": card_text(card) for name, card in cards.items()}
    paths = {Path(folder) / name: content for name, content in files.items()}
    written = [write_atomically(path, content) for path, content in paths.items()]
    warn_of_earlier_figures(Path(folder), paths)
    return written


def _subtitle(summary: Summary) -> str:
    dates = sorted(result.date for _, _, result in summary.listed() if result.date)
    found = f"; results of {dates[0][:10]}" if dates else ""
    if dates and dates[-1][:10] != dates[0][:10]:
        found += f" to {dates[-1][:10]}"
    return f"fastadv {__version__}{found}. Every accuracy has its 95 % interval."


def _trade_off_plot(summary: Summary) -> Plot | None:
    points = summary.points()
    if summary.radius is None or not points:
        return None
    published = summary.published()
    options: dict[str, Any] = {
        "title": summary.plot_title,
        "robust_label": f"Accuracy under {summary.robust} {radius_text(*summary.radius)} (%)",
        "curve": None if published is None else published.curve,
        "published": None if published is None else published.points,
    }

    def drawn(style: Style) -> bytes:
        return png_of(draw_trade_off(points, style=style, **options))

    caption = f"Clean accuracy and accuracy under {summary.robust}: {summary.plot_title}. Bars are 95 % intervals."
    if any(point.minor for point in points):
        caption += " Small markers are runs that differ in their seed, large ones without bars their means."
    if published is not None:
        caption += (
            " In grey: the points that the ARREST paper reports of WRN-34-10, and their curve."
        )
    return Plot("Clean and robust accuracy", drawn(LIGHT), drawn(DARK), caption)


def _curve_plot(curves: CurvePlot) -> Plot:
    caption = (
        f"Accuracy under {curves.attack} over the {curves.norm} radius, {curves.data}, {curves.n:,} images; at 0 "
        "without an attack. Bars are 95 % intervals."
        + (f" The adversarial images were made on {curves.surrogate}." if curves.surrogate else "")
    )
    light, dark = (png_of(draw_curves(curves, style)) for style in (LIGHT, DARK))
    return Plot(f"{curves.attack} over the radius", light, dark, caption)


def _file_name(curves: CurvePlot, taken: list[str]) -> str:
    stem = "over_eps_" + re.sub(r"[^A-Za-z0-9_.-]+", "_", f"{curves.attack}_{curves.norm}")
    number = 1
    while (name := f"{stem}{f'_{number}' if number > 1 else ''}.png") in taken:
        number += 1
    return name
