"""The parts of a paper's table: rows, columns, and cells with our figure and the paper's."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

from fastadv.reproduction.specs import RunSpec

if TYPE_CHECKING:
    from fastadv.reproduction.measures import Measure

Picture: TypeAlias = Literal["trade_off", "lines", "bars"]
# Data set -> row -> column -> the paper's figure, in the unit of the column.
Published: TypeAlias = Mapping[str, Mapping[str, Mapping[str, float]]]
NOT_AT_HAND = "not at hand"
_PAPERS = {"arrest": "ARREST", "vfd": "VFD-Adv", "afs": "AFS", "act": "ACT"}
# 97.5 % quantiles of Student's t by degrees of freedom, from 1. For more, the normal distribution is close enough.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)
_NORMAL = 1.96


@dataclass(frozen=True)
class RowSpec:
    """A row of a paper's table, or a line or point of its figure.

    Attributes:
        label: the paper's label.
        run: the training of its model.
        group: rows of one group have one colour, and form one curve where the picture has curves.
    """

    label: str
    run: RunSpec
    group: str = ""


@dataclass(frozen=True)
class Column:
    """A column of a paper's table, or a place on the axis of its figure.

    Attributes:
        label: the paper's label.
        measure: the measurement of a row's model.
        network: the paper's network, where the table has several; None for the row's network.
        x: position on the axis of a figure with lines.
    """

    label: str
    measure: Measure
    network: str | None = None
    x: float | None = None


@dataclass(frozen=True)
class Item:
    """A table or figure of a paper.

    Attributes:
        paper: "arrest", "vfd", "afs" or "act".
        name: "table2", "figure4a".
        title: the title of the picture or table.
        rows: the rows in the paper's order.
        columns: the columns in the paper's order.
        picture: the kind of picture.
        published: the paper's own figures, where they are known here.
        guess: the parts of the layout that are our guess; empty where the paper gives all of them.
        axes: names of the picture's axes.
        curve: whether a trade-off is drawn with a cubic through the methods.
        rows_on: by data set the rows, where the paper has other rows for a data set.
    """

    paper: str
    name: str
    title: str
    rows: tuple[RowSpec, ...]
    columns: tuple[Column, ...]
    picture: Picture = "bars"
    published: Published = field(default_factory=dict)
    guess: str = ""
    axes: tuple[str, str] = ("", "Accuracy (%)")
    curve: bool = False
    rows_on: Mapping[str, tuple[RowSpec, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind, labels in (
            *(
                ("rows", [row.label for row in rows])
                for rows in (self.rows, *self.rows_on.values())
            ),
            ("columns", [column.label for column in self.columns]),
        ):
            if not labels or len(set(labels)) < len(labels):
                raise ValueError(f"{kind} of {self.id} must be there, each once, got {labels}")
        columns = {c.label for c in self.columns}
        for data, values in self.published.items():
            rows = {row.label for row in self.rows_on.get(data, self.rows)}
            for row, figures in values.items():
                if row not in rows or not figures.keys() <= columns:
                    raise ValueError(f"published figures of {self.id} have no place: {row}")

    def on(self, data: str) -> Item:
        """The item with its rows on a data set."""
        return replace(self, rows=self.rows_on.get(data, self.rows), rows_on={})

    @property
    def id(self) -> str:
        """The item's name on the command line."""
        return f"{self.paper}/{self.name}"

    @property
    def heading(self) -> str:
        """The paper and the item, such as "ARREST, table 2"."""
        item = self.name
        for word in ("table", "figure"):
            if item.startswith(word):
                item = f"{word} {item.removeprefix(word)}"
        return f"{_PAPERS[self.paper]}, {item}"

    def published_on(self, data: str) -> tuple[str, Mapping[str, Mapping[str, float]]]:
        """The data set of the paper's figures that are shown beside ours, and these figures by row and column."""
        chosen = (
            data if data in self.published or not self.published else next(iter(self.published))
        )
        return chosen, self.published.get(chosen, {})

    def lacks(self) -> bool:
        """Whether some of the paper's figures are unknown, on the data set for which the most are known."""
        known = max((sum(map(len, v.values())) for v in self.published.values()), default=0)
        return known < len(self.rows) * len(self.columns)


@dataclass(frozen=True)
class MeasuredCell:
    """One figure of one trained model.

    Attributes:
        value: the figure.
        low: lower end of its 95 % interval, where it has one.
        high: upper end.
        n: number of its images; 0 where it has no images.
        note: a remark, such as that the figure may be too high.
    """

    value: float
    low: float | None = None
    high: float | None = None
    n: int = 0
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """Our figure beside the paper's.

    Attributes:
        measured: our figures by seed.
        paper: the paper's figure; None where it is not known here.
        reason: the reason why there is no figure of ours.
    """

    measured: tuple[MeasuredCell, ...] = ()
    paper: float | None = None
    reason: str = ""

    @property
    def mean(self) -> float | None:
        """The mean over the seeds."""
        return statistics.fmean(m.value for m in self.measured) if self.measured else None

    @property
    def deviation(self) -> float | None:
        """The standard deviation over the seeds; None for a single seed."""
        values = [m.value for m in self.measured]
        return statistics.stdev(values) if len(values) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval: over the images with one seed; of the mean over several seeds (Student's t)."""
        mean, deviation = self.mean, self.deviation
        if mean is None:
            return None
        if deviation is None:
            only = self.measured[0]
            return None if only.low is None or only.high is None else (only.low, only.high)
        degrees = len(self.measured) - 1
        quantile = _T[degrees - 1] if degrees <= len(_T) else _NORMAL
        half = quantile * deviation / len(self.measured) ** 0.5
        return mean - half, mean + half


@dataclass(frozen=True)
class PaperTable:
    """A table with our figures.

    Attributes:
        item: the item of the table.
        cells: the cells by row and column.
        scale: the scale's name.
        data: the data set.
        paper_data: the data set of the paper's figures.
        seeds: the number of seeds.
        networks: for each network of the paper the network at this scale.
        remarks: remarks, one sentence each.
    """

    item: Item
    cells: tuple[tuple[Cell, ...], ...]
    scale: str
    data: str
    paper_data: str
    seeds: int
    networks: Mapping[str, str]
    remarks: tuple[str, ...] = ()

    def cell(self, row: str, column: str) -> Cell:
        """A cell by its labels.

        Raises:
            KeyError: when there is no such row or column.
        """
        rows = [r.label for r in self.item.rows]
        columns = [c.label for c in self.item.columns]
        if row not in rows or column not in columns:
            raise KeyError(f"{self.item.id} has no cell {row!r}, {column!r}")
        return self.cells[rows.index(row)][columns.index(column)]
