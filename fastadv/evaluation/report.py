"""The result of an evaluation: rows of figures, written and read as JSON, shown as CSV, text or markdown."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from fastadv.evaluation.distances import Distances
from fastadv.evaluation.metrics import wilson_interval
from fastadv.evaluation.worst import WorstImages
from fastadv.fields import check_fields
from fastadv.files import write_atomically
from fastadv.ops.values import limit

Status = Literal["ok", "suspect", "invalid"]
STATUSES: tuple[Status, ...] = ("ok", "suspect", "invalid")
_FORMAT = 1
_RESULTS_FORMAT = 2
REFERENCE = "reference"


@dataclass(frozen=True)
class Stage:
    """One attack of an ensemble.

    Attributes:
        name: of the attack.
        correct: images still classified correctly after it and all before it.
        search: how it searched: a precision of this package's engine, or ``"reference"``.
        refined: images that were found only by float32 steps after a search in a narrower precision.
        unconfirmed: how often a point broke its image in the narrower precision alone.
        seconds: wall-clock time.
        refinement_seconds: of these float32 steps, a part of ``seconds``.
    """

    name: str
    correct: int
    search: str = REFERENCE
    refined: int = field(default=0, compare=False)
    unconfirmed: int = field(default=0, compare=False)
    seconds: float = field(default=0.0, compare=False)
    refinement_seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Row:
    """Accuracy under one attack.

    Attributes:
        name: of the attack.
        n: images evaluated.
        correct: images classified correctly under the attack.
        eps: radius of the ball, 0 without an attack and for an attack without a ball.
        seed: seed of the random numbers.
        seconds: wall-clock time.
        alpha: step size, where the attack has one.
        steps: number of steps, where the attack has one.
        status: ``"ok"``, ``"suspect"`` (may be too high) or ``"invalid"``.
        notes: warnings and violations, one sentence each.
        stages: for an ensemble, the images that withstood each of its attacks.
        search: for an ensemble, how it was searched: ``"bf16"`` or ``"fp16"`` on the engine, ``"fp32"``, or
            ``"reference"``.
        variant: what sets the attack apart from others of its name, such as a constant of its own.
        surrogate: the model on which the adversarial images were made; empty where it was the judged one.
        distances: for an attack without a ball, how far its adversarial images are.
        worst: adversarial images of the attack, where some were to be kept; they are no part of its JSON.
    """

    name: str
    n: int
    correct: int
    eps: float
    seed: int
    seconds: float
    alpha: float | None = None
    steps: int | None = None
    status: Status = "ok"
    notes: tuple[str, ...] = ()
    stages: tuple[Stage, ...] = ()
    search: str = ""
    variant: str = ""
    surrogate: str = ""
    distances: Distances | None = None
    worst: WorstImages | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_fields(self)
        limit("eps", self.eps)
        wilson_interval(self.correct, self.n)  # checks the counts

    @property
    def accuracy(self) -> float:
        """Fraction of the images classified correctly."""
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy, fractions."""
        return wilson_interval(self.correct, self.n)

    @property
    def title(self) -> str:
        """The attack's name, with its variant and its surrogate."""
        source = f" from {self.surrogate}" if self.surrogate else ""
        return self.name + (f" ({self.variant})" if self.variant else "") + source

    @property
    def is_white_box(self) -> bool:
        """Whether it is an accuracy in a ball, on images made for the judged model itself, or on clean images."""
        return not self.surrogate and self.distances is None

    def line(self) -> str:
        """The row in one line of text."""
        low, high = self.interval
        text = (
            f"{self.title}: {100 * self.accuracy:.2f} % ({self.correct}/{self.n}, "
            f"95 % interval {100 * low:.2f} to {100 * high:.2f}), {self.seconds:.1f} s, {self.status}"
        )
        remarks = [
            *([] if self.distances is None else [_distances_of(self.distances)]),
            *self.notes,
        ]
        return text + "".join(f"\n  {remark}" for remark in remarks)


@dataclass(frozen=True)
class Report:
    """All rows of one evaluation and their common facts.

    Attributes:
        rows: one per attack, in the order asked for.
        model: class of the model.
        data: name of the data.
        norm: of the perturbations.
        bounds: range of image values.
        batch_size: images per pass; AutoAttack's figures depend on it.
        device: where it ran.
        versions: of the libraries that matter.
        worst_case: whether each row counts the images that withstand its attack and all before it.
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

    def __getitem__(self, name: str) -> Row:
        """The row of an attack.

        Raises:
            KeyError: naming the attacks there are, or the radii of one that was run at several.
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
        """Read back what ``to_dict`` gave.

        Raises:
            ValueError: for another format, or content that does not fit.
        """
        version = content.get("format") if isinstance(content, dict) else None
        if version == _RESULTS_FORMAT:
            content = _as_one_report(content)
            version = _FORMAT
        if version != _FORMAT:
            raise ValueError(f"report must have format {_FORMAT}, got {version!r}")
        try:
            # Reports of before there was a choice counted every attack by itself.
            values = {f.name: {"worst_case": False, **content}[f.name] for f in fields(cls)}
            values["rows"] = tuple(row_from_dict(entry) for entry in content["rows"])
            values["bounds"] = tuple(content["bounds"])
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"report is damaged: {error!r}") from error

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report atomically, as its suffix says: ``.json``, ``.csv``, ``.md`` or ``.txt``.

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
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_csv(self) -> str:
        """One line per row; accuracies are fractions, notes are joined with semicolons."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_CSV_COLUMNS)
        for row in self.rows:
            values = {**row_to_dict(row), "notes": "; ".join(row.notes)}
            values["low"], values["high"] = row.interval
            values["mean_distance"] = row.distances.mean if row.distances else None
            values["median_distance"] = row.distances.median if row.distances else None
            writer.writerow(["" if values[name] is None else values[name] for name in _CSV_COLUMNS])
        return text.getvalue()

    def table(self) -> str:
        """An aligned plain-text table, with the notes below it."""
        cells = [_HEADINGS, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(_HEADINGS))]
        lines = [_aligned(line, widths) for line in cells]
        lines.insert(1, "  ".join("-" * width for width in widths))
        notes = _notes(self.rows)
        return "\n".join([self._caption(), "", *lines, *([""] if notes else []), *notes]) + "\n"

    def markdown(self) -> str:
        """A markdown table, with the notes below it."""
        rule = ["---" if left else "---:" for left in _LEFT]
        cells = [_HEADINGS, rule, *(_cells(row) for row in self.rows)]
        lines = [
            "| " + " | ".join(text.replace("|", r"\|") for text in line) + " |" for line in cells
        ]
        notes = [f"- {note}" for note in _notes(self.rows)]
        return "\n".join([self._caption(), "", *lines, *([""] if notes else []), *notes]) + "\n"

    def _caption(self) -> str:
        parts = [part for part in (self.model, self.data) if part]
        parts.append(f"{self.norm}, batches of {self.batch_size}, {self.device}")
        return ", ".join(parts) + ("; each row after all rows before it" if self.worst_case else "")


_CSV_COLUMNS = (
    *("name", "accuracy", "low", "high", "correct", "n", "eps", "alpha", "steps"),
    *("seed", "seconds", "status", "notes", "variant", "surrogate", "mean_distance"),
    "median_distance",
)
_HEADINGS = (
    "attack",
    "accuracy %",
    "95 % interval",
    "right",
    "of",
    "eps",
    "seed",
    "seconds",
    "status",
)
_LEFT = (True, False, False, False, False, False, False, False, True)
_WRITERS: dict[str, Callable[[Report], str]] = {
    ".json": Report.to_json,
    ".csv": Report.to_csv,
    ".md": Report.markdown,
    ".txt": Report.table,
}


def _as_one_report(content: dict[str, Any]) -> dict[str, Any]:
    """Take collected results for one report, where they can be one: each attack once, all else in common."""
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
    """Versions of libraries that are installed, by default of those on which accuracies depend."""
    versions = {}
    for name in names or ("fastadv", "torch", "pyautoattack"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def row_to_dict(row: Row) -> dict[str, Any]:
    """All figures of a row, with accuracy and interval written out; adversarial images are left out."""
    content = asdict(replace(row, worst=None))
    del content["worst"]
    return {**content, "accuracy": row.accuracy, "interval": row.interval}


def row_from_dict(entry: dict[str, Any]) -> Row:
    """Read a row back from an entry of ``Report.to_dict``.

    Raises:
        KeyError: when something is missing.
        TypeError: when something is of another kind.
        ValueError: when a number is out of range.
    """
    # Before there was a choice, only the reference ran ensembles, which alone have stages.
    known: dict[str, Any] = {"search": REFERENCE if entry["stages"] else "", **entry}
    values = known_fields(Row, known)
    values["notes"] = tuple(entry["notes"])
    values["stages"] = tuple(Stage(**known_fields(Stage, stage)) for stage in entry["stages"])
    if values.get("distances") is not None:
        values["distances"] = Distances.from_dict(values["distances"])
    return Row(**{**values, "worst": None})


def known_fields(kind: Any, entry: dict[str, Any]) -> dict[str, Any]:
    """What an entry says of the fields of a dataclass. Other versions may write more, or less of the later ones.

    Raises:
        KeyError: when a field without a default is missing.
    """
    needed = [f.name for f in fields(kind) if f.default is f.default_factory is MISSING]
    for name in needed:
        entry[name]
    return {f.name: entry[f.name] for f in fields(kind) if f.name in entry}


def check_white_box(robust: Row) -> None:
    """Require an accuracy that may stand for a model's robust accuracy.

    Raises:
        ValueError: for adversarial images of a surrogate, and for an attack without a ball.
    """
    if not robust.is_white_box:
        raise ValueError(
            f"robust must be an attack in a ball on the judged model itself, got {robust.title!r}"
        )


def format_eps(eps: float) -> str:
    """Write eps as k/255 where it is one, else as a decimal number."""
    k = round(eps * 255)
    return f"{k}/255" if k > 0 and abs(eps * 255 - k) < 1e-6 and k < 255 else f"{eps:.4g}"


def _cells(row: Row) -> tuple[str, ...]:
    low, high = row.interval
    return (
        row.title,
        f"{100 * row.accuracy:.2f}",
        f"{100 * low:.2f} to {100 * high:.2f}",
        str(row.correct),
        str(row.n),
        "no ball" if row.distances else format_eps(row.eps) if row.eps else "-",
        str(row.seed),
        f"{row.seconds:.1f}",
        row.status,
    )


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (
        cell.ljust(width) if left else cell.rjust(width)
        for cell, width, left in zip(cells, widths, _LEFT, strict=True)
    )
    return "  ".join(padded).rstrip()


def _notes(rows: Sequence[Row]) -> list[str]:
    """What goes below a table: what each of an ensemble's attacks left, then the warnings."""
    notes = []
    titles = [row.title for row in rows]
    for row in rows:
        title = row.title
        if titles.count(title) > 1:
            title += f" at {format_eps(row.eps)}"
        if row.stages:
            left = (
                f"{100 * stage.correct / row.n:.2f} % after {stage.name}" for stage in row.stages
            )
            notes.append(f"{title}: {', '.join(left)}")
            notes += [f"{title}: {sentence}" for sentence in _search_of(row)]
        if row.distances is not None:
            notes.append(f"{title}: {_distances_of(row.distances)}")
        state = "" if row.status == "ok" else f" is {row.status}"
        notes += [f"{title}{state}: {note}" for note in row.notes]
    return notes


def _distances_of(distances: Distances) -> str:
    """What an attack without a ball found, in words."""
    curve = ", ".join(
        f"{100 * share:.2f} % at {format_eps(radius)}" for radius, share in distances.curve
    )
    return distances.sentence(f"an accuracy of {curve}" if curve else "")


_WORDS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def _search_of(row: Row) -> list[str]:
    """How an ensemble was searched, where that was not by the reference alone."""
    if row.search in ("", REFERENCE):
        return []
    sentences = []
    for search in dict.fromkeys(stage.search for stage in row.stages):
        names = ", ".join(stage.name for stage in row.stages if stage.search == search)
        how = "by pyautoattack" if search == REFERENCE else f"in {_WORDS.get(search, search)}"
        sentences.append(f"{names} searched {how}")
    text = (
        "; ".join(sentences) + "; the plain model in float32 has confirmed every adversarial image"
    )
    spent = sum(stage.refinement_seconds for stage in row.stages)
    if not spent:
        return [text]
    found = sum(stage.refined for stage in row.stages)
    refused = sum(stage.unconfirmed for stage in row.stages)
    return [
        text,
        f"float32 steps after these searches broke {found} more images in {spent:.1f} s; "
        f"float32 has refused {refused} points",
    ]
