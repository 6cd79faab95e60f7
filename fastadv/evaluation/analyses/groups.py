"""Groups of records of several models that one picture can show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastadv.evaluation.analyses.analysis import Measured
from fastadv.evaluation.analyses.records import AnalysisRecord
from fastadv.evaluation.analyses.registry import ANALYSES
from fastadv.evaluation.wording import format_eps
from fastadv.files import file_key

_RADII = ("eps", "alpha", "max_eps", "radii", "extractor_eps")


@dataclass(frozen=True)
class AnalysisGroup:
    """The findings of one analysis on several models, on the same images and with the same settings.

    Attributes:
        records: the records by the name of each model.
    """

    records: dict[str, AnalysisRecord]

    @property
    def first(self) -> AnalysisRecord:
        """The first record; all records have the same settings."""
        return next(iter(self.records.values()))

    @property
    def analysis(self) -> str:
        """The name of the analysis."""
        return self.first.measured.analysis

    @property
    def title(self) -> str:
        """The heading of the analysis."""
        return ANALYSES[self.analysis].title

    @property
    def found(self) -> dict[str, Measured]:
        """The numbers by the name of each model."""
        return {name: record.measured for name, record in self.records.items()}

    @property
    def pictured(self) -> list[dict[str, Measured]]:
        """The contents of each picture: all models together, or one model each."""
        found = self.found
        return [found] if ANALYSES[self.analysis].shared else [{n: one} for n, one in found.items()]

    @property
    def stem(self) -> str:
        """A name for files that no other choice of models or settings has."""
        return file_key(self.analysis, *sorted((n, one.key) for n, one in self.records.items()))

    @property
    def settings(self) -> str:
        """Images and settings in words."""
        record = self.first
        parts = [record.subject.data] if record.subject.data else []
        parts += [f"{record.n:,} images"] if record.n else []
        for name, value in record.settings.items():
            if value is not None and value != []:
                parts.append(f"{name} {_shown(name, value)}")
        return ", ".join(parts)

    def summary(self) -> list[list[str]]:
        """A heading, and one line per model with the numbers of its summary."""
        names = list(dict.fromkeys(name for one in self.found.values() for name in one.summary))
        lines = [["run", *names]]
        for name, one in self.found.items():
            cells = [one.summary.get(number) for number in names]
            lines.append([name, *(number_text(cell) for cell in cells)])
        return lines

    def rows(self) -> list[list[Any]]:
        """Heading and all rows, with the name of the model before them."""
        lines: list[list[Any]] = [["run", *self.first.measured.columns]]
        return lines + [[name, *row] for name, one in self.found.items() for row in one.rows]

    def to_csv(self) -> str:
        """All rows as CSV, below comment lines with the settings and the command."""
        heading, *rows = self.rows()
        together = Measured(self.analysis, tuple(heading), tuple(map(tuple, rows)))
        models = {f"weights of {name}": one.subject.weights for name, one in self.records.items()}
        facts = self.first.facts()
        kept = {name: facts[name] for name in facts if name not in _OF_ONE_MODEL}
        return together.to_csv({**kept, **models})

    def notes(self) -> list[str]:
        """The notes of all models, each once."""
        return list(dict.fromkeys(note for one in self.found.values() for note in one.notes))


_OF_ONE_MODEL = ("run", "method", "network", "checkpoint", "weights", "parameters", "date")


def grouped(records: Mapping[str, Sequence[AnalysisRecord]]) -> list[AnalysisGroup]:
    """Group the records that one picture can show.

    Args:
        records: the records of each run by the run's name, later records after earlier ones.

    Returns:
        The groups, in the order of `ANALYSES`.
    """
    groups: dict[tuple[Any, ...], dict[str, AnalysisRecord]] = {}
    for run, of_run in records.items():
        for record in of_run:
            key = (*record.common, record.measured.columns)
            group, name = groups.setdefault(key, {}), run
            others = [one for one in of_run if one.common == record.common]
            if len({one.subject.weights for one in others}) > 1:
                name = f"{run} {record.subject.checkpoint or record.subject.weights[:7]}"
            group[name] = record  # a later record replaces one that differs only in versions
    order = list(ANALYSES)
    known = [AnalysisGroup(group) for group in groups.values()]
    known = [group for group in known if group.analysis in ANALYSES]
    return sorted(known, key=lambda group: order.index(group.analysis))


def of_weights(
    records: Iterable[AnalysisRecord], weights: Iterable[str]
) -> tuple[list[AnalysisRecord], int]:
    """The records of the given weights, and the number of the other records."""
    wanted, found = set(weights), list(records)
    kept = [one for one in found if one.subject.weights in wanted]
    return kept, len(found) - len(kept)


def number_text(value: object) -> str:
    """The text of a cell, with four digits of a number."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _shown(name: str, value: Any) -> str:
    if isinstance(value, list | tuple):
        ends = dict.fromkeys((value[0], value[-1]))
        text = " to ".join(_shown(name, end) for end in ends)
        return text if len(value) < 3 else f"{text} ({len(value)} values)"
    return format_eps(value) if name in _RADII else f"{value:g}"
