"""Files that are in the folder of a report before it is written: of others, and of an earlier report."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection
from pathlib import Path

from fastadv.files import check_replaceable

# Text near the beginning of each file of a report.
_MARKS = {
    "report.md": "# Robustness of ",
    "report.csv": "run,method,",
    "report.tex": "% Needs \\usepackage",
    "report.json": '\n  "plot": ',
    "report.html": "<title>Robustness of ",
}
_FIGURES = ("cards/*.json", "trade_off.png", "over_eps_*.png")


def check_no_foreign_files(folder: Path) -> None:
    """Refuse a folder in which a file of the user's has the name of a file of the report, such as report.tex.

    Raises:
        FileExistsError: naming the file.
    """
    for name, mark in _MARKS.items():
        check_replaceable(folder / name, mark, "fastadv report")


def warn_of_earlier_figures(folder: Path, written: Collection[Path]) -> None:
    """Warn of cards and pictures in a report's folder that are not of this report."""
    found = sorted(file for pattern in _FIGURES for file in folder.glob(pattern))
    earlier = [os.fspath(file.relative_to(folder)) for file in found if file not in written]
    if earlier:
        more = f" and {len(earlier) - 5} more" if len(earlier) > 5 else ""
        warnings.warn(
            f"{folder} holds files of an earlier report, with other figures than this report: "
            f"{', '.join(earlier[:5])}{more}; delete them, or write the report into a new folder",
            stacklevel=3,
        )
