"""The table of several runs: one line for each run, radius and set of images, one column for each attack."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastadv.evaluation.attack_list import AUTOATTACK, CLEAN
from fastadv.evaluation.result_row import Row
from fastadv.evaluation.results import Result, Subject
from fastadv.evaluation.wording import bounds_text, format_eps
from fastadv.ops.values import norm_name

if TYPE_CHECKING:
    from fastadv.evaluation.analyses.records import AnalysisRecord
    from fastadv.evaluation.sanity_file import SanityResult

_DEFAULT_EPS = 8 / 255
_SHOWN_DIGITS = 7  # of a hash
_CIRCUMSTANCES = ("bounds", "batch", "seed")  # columns that are shown where they tell lines apart


@dataclass(frozen=True)
class EvaluatedRun:
    """A run and all its results.

    Attributes:
        name: a name that no other run of the table has.
        method: the method of its training.
        network: the name of its model.
        results: its results, in the order in which they were added.
        folder: the folder of the file of results; files named in results are relative to it.
        series: a key that runs share which differ only in the seed of their training; empty where it is unknown.
        seed: the seed of the training.
        checks: findings of masking checks, in the order in which they were made.
        analyses: findings of analyses, later ones after earlier ones.
    """

    name: str
    method: str
    network: str
    results: tuple[Result, ...]
    folder: Path = Path()
    series: str = ""
    seed: int | None = None
    checks: tuple[SanityResult, ...] = ()
    analyses: tuple[AnalysisRecord, ...] = ()


@dataclass
class Line:
    """Results that may be compared with each other: of the same weights and images, at one radius and seed.

    Attacks without a ball, and each surrogate's adversarial images, have lines of their own.

    Attributes:
        run: the run.
        subject: weights and images.
        n: number of images.
        norm: norm of the perturbations; empty for a line without an attack.
        eps: radius, in the norm.
        seed: seed of the random numbers.
        cells: results by column.
        ball: whether the attacks were in a ball of this radius.
        surrogate: the model on which the adversarial images were made; empty where it was the judged model.
        bounds: range of image values.
        batch_size: images per pass where the model draws random numbers, which differ from batch to batch; else
            None.
    """

    run: EvaluatedRun
    subject: Subject
    n: int
    norm: str = ""
    eps: float = 0.0
    seed: int | None = None
    cells: dict[str, Result] = field(default_factory=dict)
    ball: bool = True
    surrogate: str = ""
    bounds: tuple[float, float] = (0.0, 1.0)
    batch_size: int | None = None

    @property
    def circumstances(self) -> tuple[Any, ...]:
        """What must be equal, besides model, images and radius, in lines that differ in the training alone."""
        return (self.bounds, self.seed, self.batch_size)

    @property
    def radius(self) -> tuple[str, float]:
        """The norm and the radius in it."""
        return self.norm, self.eps

    @property
    def is_white_box(self) -> bool:
        """Whether the attacks were in a ball and on the judged model itself; also true without an attack."""
        return self.ball and not self.surrogate


class Comparison:
    """The table of several runs.

    Args:
        runs: the runs, in the table's order.
    """

    def __init__(self, runs: Sequence[EvaluatedRun]) -> None:
        self._titles = _Titles([result for run in runs for result in run.results])
        self.lines = [line for run in runs for line in self._lines_of(run)]
        self.runs = list(runs)

    @property
    def white_box(self) -> list[Line]:
        """The lines of attacks in a ball on the judged model itself, and of runs without an attack."""
        return [line for line in self.lines if line.is_white_box]

    @property
    def attacks(self) -> list[str]:
        """The columns of `white_box`: clean first, then in the order in which they appear."""
        found = dict.fromkeys(title for line in self.white_box for title in line.cells)
        return sorted(found, key=lambda title: title != CLEAN)  # the sort keeps the order of equals

    def cells(self, intervals: bool = False) -> list[list[str]]:
        """The heading and the lines of `white_box` as text.

        An optional column is left out if all runs have the same value in it.

        Args:
            intervals: whether each accuracy has its 95 % interval beside it.
        """
        attacks = self.attacks
        always = ("run", "method", "model", "data", "n", "norm", "eps")
        rows = [self.describe(line) for line in self.white_box]
        shown = [
            name
            for name in (*always[:3], "checkpoint", *always[3:], *_CIRCUMSTANCES)
            if name in always or self._tells_apart(name, rows)
        ]
        table = [[*shown, *(f"{title} %" for title in attacks)]]
        for row, line in zip(rows, self.white_box, strict=True):
            accuracies = [cell_text(line, title, intervals) for title in attacks]
            table.append([row[name] for name in shown] + accuracies)
        return table

    def radius(self, eps: float | None = None, norm: str | None = None) -> tuple[str, float]:
        """Choose the radius of a figure: the given one, else the radius at which all runs were attacked.

        Raises:
            ValueError: when there is no such radius, or there are several and 8/255 is not among them.
        """
        norm = None if norm is None else norm_name(norm)
        attacked: dict[tuple[str, float], set[str]] = {}
        for line in self.lines:
            if line.norm and line.is_white_box:
                attacked.setdefault(line.radius, set()).add(line.run.name)
        common = [radius for radius, names in attacked.items() if len(names) == len(self.runs)]
        fitting = [
            (n, e)
            for n, e in common
            if (norm is None or n == norm) and (eps is None or abs(e - eps) < 1e-9)
        ]
        if len(fitting) > 1 and ("linf", _DEFAULT_EPS) in fitting:
            return "linf", _DEFAULT_EPS
        if len(fitting) != 1:
            asked = [text for text in (norm, None if eps is None else format_eps(eps)) if text]
            if not common and not asked:
                raise ValueError("the runs share no radius at which they were attacked in a ball")
            got = f", got {' '.join(asked)}" if asked else ""
            there = ", ".join(radius_text(*radius) for radius in common) or "at no radius"
            name = "norm" if eps is None and norm else "eps"
            raise ValueError(
                f"{name} must name one radius at which all runs were attacked{got}; they were all attacked {there}"
            )
        return fitting[0]

    def at(self, radius: tuple[str, float]) -> list[Line]:
        """The lines of `white_box` at one radius."""
        return [line for line in self.white_box if line.radius == radius]

    def label(self, line: Line) -> str:
        """A name for a line that no other line of its radius and kind has."""
        kind = (line.radius, line.ball, line.surrogate)
        beside = [one for one in self.lines if (one.radius, one.ball, one.surrogate) == kind]
        rows = {id(one): self.describe(one) for one in beside}
        parts = [line.run.name]
        for name in ("checkpoint", "data", "n", *_CIRCUMSTANCES):
            if len({row[name] for row in rows.values() if row["run"] == line.run.name}) > 1:
                parts.append(rows[id(line)][name])
        return " ".join(parts)

    def _lines_of(self, run: EvaluatedRun) -> Iterable[Line]:
        lines: dict[tuple[Any, ...], Line] = {}
        for result in run.results:
            if not result.is_clean:
                row = result.row
                new = Line(run, result.subject, row.n, result.norm, row.eps, row.seed)
                new.ball, new.surrogate = row.distances is None, row.surrogate
                new.bounds, new.batch_size = result.bounds, _batch_size(result)
                key = (*result.judged, *new.circumstances, *new.radius, new.ball, new.surrogate)
                lines.setdefault(key, new).cells[self._titles.of(result)] = result
        for result in run.results:
            if result.is_clean:
                # Only of a model that draws random numbers the clean accuracy belongs to one seed and batch size.
                seed = result.row.seed if result.row.is_random else None
                alone = Line(run, result.subject, result.row.n, seed=seed)
                alone.bounds, alone.batch_size = result.bounds, _batch_size(result)
                attacked = [
                    line
                    for key, line in lines.items()
                    if key[: len(result.judged)] == result.judged
                    and line.bounds == result.bounds
                    and (seed is None or line.circumstances == alone.circumstances)
                ]
                if not any(line.is_white_box for line in attacked):
                    attacked.append(alone)
                    lines[(*result.judged, *alone.circumstances)] = alone
                for line in attacked:
                    line.cells[self._titles.of(result)] = result
        return lines.values()

    def describe(self, line: Line) -> dict[str, str]:
        """The subject of a line, by the names of the columns."""
        return {
            "run": line.run.name,
            "method": line.run.method,
            "model": line.run.network,
            "checkpoint": self._with_hash(line, "checkpoint", "weights"),
            "data": self._with_hash(line, "data", "images"),
            "n": str(line.n),
            "norm": line.norm or "-",
            "eps": "no ball" if not line.ball else format_eps(line.eps) if line.norm else "-",
            "bounds": bounds_text(line.bounds),
            "batch": "-" if line.batch_size is None else str(line.batch_size),
            "seed": "-" if line.seed is None else str(line.seed),
        }

    def _with_hash(self, line: Line, name: str, content: str) -> str:
        """The name of weights or images, with a part of their hash where several have this name."""
        text, digest = getattr(line.subject, name) or "-", getattr(line.subject, content)
        others = {
            getattr(other.subject, content)
            for other in self.lines
            if getattr(other.subject, name) == getattr(line.subject, name)
            and (name == "data" or other.run is line.run)
            and (name == "checkpoint" or other.n == line.n)
        }
        return f"{text} ({digest[:_SHOWN_DIGITS] or '?'})" if len(others) > 1 else text

    def _tells_apart(self, name: str, rows: Sequence[dict[str, str]]) -> bool:
        """Whether a run has lines that differ in this column."""
        values = {(row["run"], row[name]) for row in rows if row[name] != "-"}
        return len(values) > len({run for run, _ in values})


class _Titles:
    """Names of columns: the attack's name, with the settings that differ between results."""

    def __init__(self, results: Sequence[Result]) -> None:
        self._variants: dict[str, set[str]] = {}
        for result in results:
            self._variants.setdefault(_plain_title(result), set()).add(_variant(result))

    def of(self, result: Result) -> str:
        """The column of a result."""
        title, variant = _plain_title(result), _variant(result)
        return f"{title} ({variant})" if len(self._variants[title]) > 1 and variant else title


def _batch_size(result: Result) -> int | None:
    """The batch size of a model that draws random numbers; None of another model."""
    return result.batch_size if result.row.is_random else None


def _plain_title(result: Result) -> str:
    return " after ".join([result.row.title, *(["+".join(result.after)] if result.after else [])])


def _variant(result: Result) -> str:
    """The further parameters of an attack, in words; a step size is relative to the radius."""
    row = result.row
    if row.name == AUTOATTACK:
        return f"batches of {result.batch_size}" + (f", {row.search}" if row.search else "")
    if row.alpha is not None and row.eps:
        return f"alpha {row.alpha / row.eps:.4g} eps"
    return ""


def cell_text(line: Line, title: str, interval: bool = True) -> str:
    """Write an accuracy of a line in percent, with status and interval; a dash where there is no accuracy."""
    if title not in line.cells:
        return "-"
    row = line.cells[title].row
    text = f"{100 * row.accuracy:.2f}{status_mark(row)}"
    return f"{text} {interval_text(row)}" if interval else text


def status_mark(*rows: Row) -> str:
    """Return the worst status of some rows, as it stands behind a figure that is made of them; empty for ok."""
    found = {row.status for row in rows}
    return next((f" {status}" for status in ("invalid", "suspect") if status in found), "")


def interval_text(row: Row) -> str:
    """Write the 95 % interval of an accuracy in percent."""
    low, high = row.interval
    return f"[{100 * low:.2f}, {100 * high:.2f}]"


def radius_text(norm: str, eps: float) -> str:
    """Write a radius for people: "at 8/255 linf"."""
    return f"at {format_eps(eps)} {norm}"


def distinct_paths(paths: Sequence[str]) -> list[str]:
    """Return paths as they were given, each place once: "run", "./run" and "run/" are one."""
    found: dict[Path, str] = {}
    for path in paths:
        found.setdefault(Path(path).resolve(), path)
    return list(found.values())


def distinct_names(paths: Sequence[str]) -> list[str]:
    """Return the shortest ends of paths that tell them apart: "a/arrest" and "b/arrest", else "arrest"."""
    parts = [Path(path).resolve().parts for path in paths]
    names = []
    for own in parts:
        others = [other for other in parts if other != own]
        length = 1
        while length < len(own) and any(other[-length:] == own[-length:] for other in others):
            length += 1
        names.append("/".join(own[-length:]))
    return names
