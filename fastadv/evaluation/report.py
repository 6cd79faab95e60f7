"""The report of one evaluation: its rows, written and read as JSON, and written as CSV, text or markdown."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from fastadv.evaluation.report_tables import HEADINGS, LEFT, aligned_line, cells_of, notes_of
from fastadv.evaluation.result_row import Row, row_from_dict, row_to_dict
from fastadv.fields import check_fields
from fastadv.files import json_of, write_atomically
from fastadv.plain_text import csv_cell, markdown_text

_FORMAT = 1
_RESULTS_FORMAT = 2


@dataclass(frozen=True)
class Report:
    """All rows of one evaluation and their common facts.

    Attributes:
        rows: one row per attack, in the order of the attacks.
        model: class of the model.
        data: name of the data.
        norm: norm of the perturbations.
        bounds: range of image values.
        batch_size: images per pass; AutoAttack's figures depend on it.
        device: device of the evaluation.
        versions: versions of the libraries on which figures depend.
        worst_case: whether each row counts the images that withstand its attack and all attacks before it.
    """

    rows: tuple[Row, ...]
    model: str = ""
    data: str = ""
    norm: str = "linf"
    bounds: tuple[float, float] = (0.0, 1.0)
    batch_size: int = 0
    device: str = "cpu"
    versions: dict[str, str] = field(default_factory=dict)
    worst_case: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    def __getitem__(self, name: str) -> Row:
        """The row of an attack.

        Raises:
            KeyError: naming the existing attacks, or the radii of an attack that was run at several.
        """
        found = [row for row in self.rows if row.name == name]
        if len(found) > 1:
            radii = ", ".join(f"{row.eps:.6g}" for row in found)
            raise KeyError(f"several rows {name!r}, at {radii}: report.at({name!r}, eps) is one")
        if found:
            return found[0]
        raise KeyError(f"no row {name!r}, there are {', '.join(row.name for row in self.rows)}")

    def at(self, name: str, eps: float) -> Row:
        """The row of an attack at one of several radii.

        Raises:
            KeyError: naming the radii at which the attack was run.
        """
        found = [row for row in self.rows if row.name == name]
        for row in found:
            if abs(row.eps - eps) < 1e-9:
                return row
        radii = ", ".join(f"{row.eps:.6g}" for row in found) or "no radius"
        raise KeyError(f"no row {name!r} at {eps:.6g}, it was run at {radii}")

    def __contains__(self, name: object) -> bool:
        """Whether there is a row of this name."""
        return any(row.name == name for row in self.rows)

    def __str__(self) -> str:
        """The table as text."""
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types, with accuracies and intervals written out for other readers."""
        content = asdict(replace(self, rows=()))
        content["rows"] = [row_to_dict(row) for row in self.rows]
        return {"format": _FORMAT, **json.loads(json.dumps(content))}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Report:
        """Read back the result of ``to_dict``.

        Raises:
            ValueError: for another format, or content that does not fit.
        """
        version = content.get("format") if isinstance(content, dict) else None
        if version not in (_FORMAT, _RESULTS_FORMAT):
            raise ValueError(f"report must have format {_FORMAT}, got {version!r}")
        try:
            content = _as_one_report(content) if version == _RESULTS_FORMAT else content
            # Earlier versions wrote no worst_case and judged every attack on all images.
            values = {f.name: {"worst_case": False, **content}[f.name] for f in fields(cls)}
            values["rows"] = tuple(row_from_dict(entry) for entry in content["rows"])
            values["bounds"] = tuple(content["bounds"])
            return cls(**values)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"report is damaged: {error!r}") from error

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report atomically, in the format of the suffix: ``.json``, ``.csv``, ``.md`` or ``.txt``.

        Raises:
            ValueError: for another suffix.
        """
        suffix = Path(path).suffix.lower()
        if suffix not in _WRITERS:
            raise ValueError(
                f"path must end in one of {', '.join(_WRITERS)}, got {os.fspath(path)!r}"
            )
        return write_atomically(path, _WRITERS[suffix](self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Read a report saved as JSON.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it is not a report; the message names the file.
        """
        try:
            return cls.from_dict(json_of(path))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_csv(self) -> str:
        """The report as CSV, one line per row; accuracies are fractions, notes are joined with semicolons."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_CSV_COLUMNS)
        for row in self.rows:
            values = {**row_to_dict(row), "notes": "; ".join(row.notes)}
            values["low"], values["high"] = row.interval
            values["mean_distance"] = row.distances.mean if row.distances else None
            values["median_distance"] = row.distances.median if row.distances else None
            writer.writerow([csv_cell(values[name]) for name in _CSV_COLUMNS])
        return text.getvalue()

    def table(self) -> str:
        """An aligned plain-text table, with the notes below it."""
        cells = [HEADINGS, *(cells_of(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(HEADINGS))]
        lines = [aligned_line(line, widths) for line in cells]
        lines.insert(1, "  ".join("-" * width for width in widths))
        notes = notes_of(self.rows)
        return "\n".join([self._caption(), "", *lines, *([""] if notes else []), *notes]) + "\n"

    def markdown(self) -> str:
        """A markdown table, with the notes below it."""
        rule = ["---" if left else "---:" for left in LEFT]
        cells = [HEADINGS, rule, *(cells_of(row) for row in self.rows)]
        lines = ["| " + " | ".join(map(markdown_text, line)) + " |" for line in cells]
        notes = [f"- {markdown_text(note)}" for note in notes_of(self.rows)]
        caption = markdown_text(self._caption())
        return "\n".join([caption, "", *lines, *([""] if notes else []), *notes]) + "\n"

    def _caption(self) -> str:
        parts = [part for part in (self.model, self.data) if part]
        parts.append(f"{self.norm}, batches of {self.batch_size}, {self.device}")
        return ", ".join(parts) + ("; each row after all rows before it" if self.worst_case else "")


_CSV_COLUMNS = (
    *("name", "accuracy", "low", "high", "correct", "n", "eps", "alpha", "steps"),
    *("seed", "seconds", "status", "notes", "variant", "surrogate", "mean_distance"),
    "median_distance",
)
_WRITERS: dict[str, Callable[[Report], str]] = {
    ".json": Report.to_json,
    ".csv": Report.to_csv,
    ".md": Report.markdown,
    ".txt": Report.table,
}


def _as_one_report(content: dict[str, Any]) -> dict[str, Any]:
    """Turn a file of results into the content of one report.

    Raises:
        ValueError: when an attack occurs twice, or the results differ in their settings.
    """
    names = [f.name for f in fields(Report) if f.name not in ("rows", "model", "worst_case")]
    entries = [
        {**entry, "model": entry["network"], "worst_case": bool(entry["after"])}
        for entry in content["rows"]
    ]
    attacks = [entry["name"] for entry in entries]
    common = [{name: entry[name] for name in names} for entry in entries]
    if not entries or len(set(attacks)) < len(attacks) or any(one != common[0] for one in common):
        raise ValueError(
            "it holds the results of several evaluations; read it with fastadv.evaluation.load_results"
        )
    worst_case = any(entry["worst_case"] for entry in entries)
    return {"rows": entries, "model": entries[0]["model"], "worst_case": worst_case, **common[0]}


def library_versions(*names: str) -> dict[str, str]:
    """Versions of libraries that are installed, by default of the libraries on which accuracies depend."""
    versions = {}
    for name in names or ("fastadv", "torch", "pyautoattack"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
