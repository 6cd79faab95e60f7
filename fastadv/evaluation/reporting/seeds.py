"""Runs that differ only in the seed of their training, and their mean."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from fastadv.evaluation.comparison import Comparison, Line, status_mark


@dataclass(frozen=True)
class Series:
    """Lines of one table that differ only in the seed of the training.

    Attributes:
        lines: one line per seed, at least two.
    """

    lines: tuple[Line, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the trainings."""
        return tuple(line.run.seed for line in self.lines if line.run.seed is not None)

    @property
    def method(self) -> str:
        """The method of all trainings."""
        return self.lines[0].run.method

    def accuracies(self, title: str) -> list[float] | None:
        """The accuracies of a column in percent; None where a run has no accuracy there."""
        if any(title not in line.cells for line in self.lines):
            return None
        return [100 * line.cells[title].row.accuracy for line in self.lines]

    def mark(self, *titles: str | None) -> str:
        """The worst status of the results in some columns, as `status_mark` writes it."""
        cells = (line.cells.get(title or "") for line in self.lines for title in titles)
        return status_mark(*(result.row for result in cells if result is not None))


def mean_and_deviation(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation of a sample, with n - 1 in the denominator."""
    return statistics.fmean(values), statistics.stdev(values)


def series_of(comparison: Comparison) -> list[Series]:
    """Find the lines that differ only in the training seed. If a seed occurs twice, its first line counts."""
    found: dict[tuple[Any, ...], dict[int, Line]] = {}
    for line in comparison.lines:
        if line.run.series and line.run.seed is not None:
            found.setdefault(_key(comparison, line), {}).setdefault(line.run.seed, line)
    return [Series(tuple(by_seed.values())) for by_seed in found.values() if len(by_seed) > 1]


def _key(comparison: Comparison, line: Line) -> tuple[Any, ...]:
    subject, run = line.subject, line.run
    same = (subject.data, subject.images, line.n, *line.radius, *line.circumstances)
    kind = (line.ball, line.surrogate)
    checkpoints = {other.subject.checkpoint for other in comparison.lines if other.run is run}
    # Names of checkpoints count only where a run has several: the best checkpoints of two runs may differ in step.
    return (run.series, *same, *kind, subject.checkpoint if len(checkpoints) > 1 else "")
