"""`reproduce`: train the models that an item needs, measure them, and write the results in the paper's layout."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastadv.evaluation.result_row import Row
from fastadv.ops.values import integer
from fastadv.reproduction.cost import Estimate, estimate
from fastadv.reproduction.images import Source
from fastadv.reproduction.measures import Accuracy, Measure
from fastadv.reproduction.registry import find_item
from fastadv.reproduction.run_store import RunStore, TrainedRun
from fastadv.reproduction.scales import Scale, find_scale
from fastadv.reproduction.specs import CannotRun, ResolvedRun, RunSpec
from fastadv.reproduction.tables import Cell, Column, Item, MeasuredCell, PaperTable, RowSpec
from fastadv.reproduction.writers import write_table

_RUNS = "runs"


@dataclass(frozen=True)
class Reproduced:
    """A table and its files.

    Attributes:
        table: the table.
        files: the files that were written for it.
        trained: names of the runs that this call trained.
        judged: the number of evaluations that this call made.
        failures: trainings that were refused for another reason than a limit of the scale.
    """

    table: PaperTable
    files: tuple[Path, ...]
    trained: tuple[str, ...]
    judged: int
    failures: tuple[str, ...] = ()


def reproduce(
    item: str | Item,
    *,
    out: str | Path,
    data: str | None = None,
    root: str | None = None,
    scale: str | Scale = "paper",
    seeds: int | None = None,
    network: str | None = None,
    device: str | None = None,
    extra: str | None = None,
    quiet: bool = True,
    on_estimate: Callable[[Estimate], None] | None = None,
) -> Reproduced:
    """Reproduce a table or a figure of a paper.

    Trainings that `out` has are used again, whichever item they were made for, and so are their accuracies. After
    an interruption the same call goes on where it was.

    Args:
        item: an item or its name, such as "arrest/table2".
        out: folder for the trained models and the table.
        data: data set, or folder:PATH as `fastadv train` takes it; by default the scale's data set.
        root: folder of the files of a data set by name.
        scale: "paper", "small" or "tiny".
        seeds: number of trainings of each row; by default the scale's number.
        network: replaces every network of the paper; by default the scale's network.
        device: the device for training and measuring; by default a GPU if there is one.
        extra: a .npz file of further training images, which RST needs; see `fastadv.data.load_npz`.
        quiet: write no messages.
        on_estimate: called before the first training with the work that is left.

    Returns:
        The table, with the files that were written.

    Raises:
        ValueError: for an unknown item, scale or data set, or a number out of range.
        Interrupted: after SIGTERM or Ctrl-C.
    """
    work = ReproductionJob.of(item, out, data, root, scale, seeds, network, device, extra, quiet)
    if on_estimate is not None:
        on_estimate(work.estimate())
    table = work.table()
    folder = Path(out) / work.item.paper / work.item.name
    files = write_table(table, folder, work.store.source.file_name)
    failures = tuple(dict.fromkeys(work.store.failures))
    return Reproduced(
        table, tuple(files), tuple(work.store.trained), work.store.evaluations, failures
    )


@dataclass(frozen=True)
class ReproductionJob:
    """The work for an item.

    Attributes:
        item: the item.
        store: the folder of its models.
        seeds: the number of trainings of each row.
    """

    item: Item
    store: RunStore
    seeds: int

    @classmethod
    def of(
        cls,
        item: str | Item,
        out: str | Path,
        data: str | None = None,
        root: str | None = None,
        scale: str | Scale = "paper",
        seeds: int | None = None,
        network: str | None = None,
        device: str | None = None,
        extra: str | None = None,
        quiet: bool = True,
    ) -> ReproductionJob:
        """Make the work from the arguments of `reproduce`."""
        found = find_item(item) if isinstance(item, str) else item
        chosen = find_scale(scale) if isinstance(scale, str) else scale
        if network is not None:
            chosen = chosen.with_network(network)
        count = integer("seeds", chosen.seeds if seeds is None else seeds, at_least=1)
        source = Source(data or chosen.data, root)
        store = RunStore(Path(out) / _RUNS, chosen, source, device, extra, quiet)
        return cls(found.on(source.name), store, count)

    def estimate(self) -> Estimate:
        """The time of the remaining work."""
        runs: dict[str, ResolvedRun] = {}
        attacks: dict[tuple[str, str, float, str], tuple[ResolvedRun, str]] = {}
        cells = itertools.product(self.item.rows, self.item.columns, range(self.seeds))
        for row, column, seed in cells:
            try:
                needed = self._needs(row, column, seed)
            except CannotRun:
                continue
            for one in self.store.missing(needed):
                runs[one.name] = one
            judged = needed[0]
            for accuracy in column.measure.attacks():
                if not self._is_known(judged, accuracy, seed):
                    name = self.store.scale.attack(accuracy.attack)
                    key = (judged.relative_path, name, accuracy.eps, str(accuracy.source))
                    attacks[key] = judged, name
        store = self.store
        return estimate(runs.values(), attacks.values(), store.scale, store.source, store.device)

    def _is_known(self, run: ResolvedRun, accuracy: Accuracy, seed: int) -> bool:
        return accuracy in self.store.known(run, [accuracy], seed)

    def table(self) -> PaperTable:
        """Train and measure all rows, and return the table."""
        len(self.store.images)  # raises for missing images before anything is trained
        paper_data, published = self.item.published_on(self.store.source.name)
        cells = []
        for row in self.item.rows:
            measured = [self._row(row, seed) for seed in range(self.seeds)]
            figures = published.get(row.label, {})
            cells.append(
                tuple(
                    _cell([of_seed[number] for of_seed in measured], figures.get(column.label))
                    for number, column in enumerate(self.item.columns)
                )
            )
        return PaperTable(
            self.item,
            tuple(cells),
            self.store.scale.name,
            self.store.source.name,
            paper_data,
            self.seeds,
            self._networks(),
            tuple(self._remarks()),
        )

    def _row(self, row: RowSpec, seed: int) -> list[MeasuredCell | str]:
        """The figures of a row with one seed; the reason in place of a figure that cannot be measured."""
        ready: dict[int, TrainedRun] = {}
        figures: list[MeasuredCell | str] = ["" for _ in self.item.columns]
        wanted: dict[str, list[Accuracy]] = {}
        for number, column in enumerate(self.item.columns):
            try:
                runs = self._needs(row, column, seed)
                for run in runs:
                    self.store.ensure(run)
            except CannotRun as reason:
                figures[number] = f"cannot run: {reason}"
                continue
            ready[number] = TrainedRun(self.store, runs[0], seed, {})
            wanted.setdefault(runs[0].relative_path, []).extend(_on(column).attacks())
        rows: dict[str, dict[Accuracy, Row]] = {}
        for number, trained in ready.items():
            name = trained.run.relative_path
            if name not in rows:
                rows[name] = self.store.rows(trained.run, wanted[name], seed)
            trained.found = rows[name]
            try:
                figures[number] = _on(self.item.columns[number]).measure(trained)
            except CannotRun as reason:
                figures[number] = f"cannot run: {reason}"
        return figures

    def _needs(self, row: RowSpec, column: Column, seed: int) -> list[ResolvedRun]:
        """The run of a cell, followed by the other runs that its measure needs."""
        run = row.run if column.network is None else row.run.on(column.network)
        specs: list[RunSpec] = [run, *_on(column).needs()]
        return [self.store.resolve(one, seed) for one in specs]

    def _networks(self) -> dict[str, str]:
        names = {row.run.network for row in self.item.rows}
        names |= {column.network for column in self.item.columns if column.network is not None}
        return {name: self.store.scale.network_for(name) for name in sorted(names)}

    def _remarks(self) -> list[str]:
        scale, remarks = self.store.scale, []
        for column in self.item.columns:
            for accuracy in column.measure.attacks():
                other = scale.attack(accuracy.attack)
                if other != accuracy.attack:
                    remarks.append(f"At this scale {other} stands for {accuracy.attack}.")
        if scale.radius != 1:
            remarks.append(
                f"At this scale all radii are {scale.radius:.4g} times the paper's: 8/255 is {scale.eps(8):.4g}."
            )
        return list(dict.fromkeys(remarks))


def _cell(found: list[MeasuredCell | str], published: float | None) -> Cell:
    """A cell from its figures over the seeds; with one reason among them it has no figure of ours."""
    reason = next((one for one in found if isinstance(one, str)), "")
    measured = () if reason else tuple(one for one in found if isinstance(one, MeasuredCell))
    return Cell(measured, published, reason)


def _on(column: Column) -> Measure:
    """The measure of a column, on the column's network if it names one."""
    return column.measure if column.network is None else column.measure.on(column.network)
