"""The logs of a run: metrics.jsonl and summary.csv."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastadv.files import naming, write_atomically
from fastadv.ranks import Ranks


class Meter:
    """Means over images of logged scalars. The sums stay on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._images: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor], images: int) -> None:
        """Add means over a batch, given the number of its images."""
        for name, value in values.items():
            # In float64, so that a long epoch's sum does not lose its small terms.
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().double() * images
            self._images[name] = self._images.get(name, 0) + images

    def merge(self, other: Meter) -> None:
        """Add all values of another meter; waits for the device."""
        for name, (total, images) in other.state().items():
            self._sums[name] = self._sums.get(name, 0.0) + total
            self._images[name] = self._images.get(name, 0) + int(images)

    def means(self) -> dict[str, float]:
        """Return the mean of each scalar; waits for the device."""
        return {name: float(total) / self._images[name] for name, total in self._sums.items()}

    def average(self, ranks: Ranks) -> None:
        """Average the means over all ranks, whose batches have the same sizes."""
        if ranks.world_size > 1:
            totals = ranks.means([float(total) for total in self._sums.values()])
            self._sums = dict(zip(self._sums, totals, strict=True))

    def clear(self) -> None:
        """Start again."""
        self._sums.clear()
        self._images.clear()

    def state(self) -> dict[str, list[float]]:
        """Return the state for `load`, as plain numbers."""
        return {name: [float(total), self._images[name]] for name, total in self._sums.items()}

    def load(self, state: Mapping[str, list[float]]) -> None:
        """Go back to a saved state."""
        self._sums = {name: total for name, (total, _) in state.items()}
        self._images = {name: int(images) for name, (_, images) in state.items()}


class MetricsLog:
    """Writes the records of a run to `metrics.jsonl` and `summary.csv`.

    `metrics.jsonl` has one object per line: {"kind": "step", ...} every few steps and
    {"kind": "epoch", ...} after each epoch. `summary.csv` has one line per epoch.

    Args:
        folder: the run directory.
        step: the step from which the run goes on; later records are deleted.
        enabled: False to write nothing.
    """

    def __init__(self, folder: Path, step: int = 0, enabled: bool = True) -> None:
        self._enabled = enabled
        if not enabled:
            return
        self._file = folder / "metrics.jsonl"
        self._summary = folder / "summary.csv"
        records = [r for r in self._earlier_records() if _step_of(r) <= step]
        self._epochs = [r for r in records if r.get("kind") == "epoch"]
        write_atomically(self._file, "".join(_as_line(record) for record in records))

    def _earlier_records(self) -> list[dict[str, Any]]:
        """The records of a run that is resumed. If the file cannot be read, it is renamed, and the run goes on."""
        try:
            return read_records(self._file)
        except OSError as error:
            aside = self._file.with_suffix(".unreadable")
            os.replace(self._file, aside)
            warnings.warn(
                f"{self._file}: cannot be read ({error.strerror}); kept as {aside.name}, and a new one begun",
                stacklevel=2,
            )
            return []

    def step(self, **values: Any) -> None:
        """Record the measurements of the last iterations."""
        if self._enabled:
            self._append({"kind": "step", **values})

    def epoch(self, **values: Any) -> None:
        """Record an epoch, and write the summary again."""
        if not self._enabled:
            return
        record = {"kind": "epoch", **values}
        self._append(record)
        self._epochs.append(record)
        write_atomically(self._summary, _as_csv(self._epochs))

    def _append(self, record: dict[str, Any]) -> None:
        with naming(self._file), open(self._file, "a", encoding="utf-8") as file:
            file.write(_as_line(record))


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl.

    Damaged lines are left out. A warning gives their number, unless only the last line is damaged.
    """
    if not path.is_file():
        return []
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    records = [_record_in(line) for line in lines]
    damaged = sum(record is None for record in records[:-1])
    if damaged:
        warnings.warn(
            f"{path}: {damaged} damaged of {len(lines)} lines left out; the run itself does not depend on them",
            stacklevel=2,
        )
    return [record for record in records if record is not None]


def _record_in(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None if the line holds no record."""
    try:
        record = json.loads(line)
        whole = isinstance(record, dict) and math.isfinite(_step_of(record))
    except (ValueError, RecursionError, OverflowError):
        return None
    return record if whole else None


def _step_of(record: Mapping[str, Any]) -> float:
    """The step of a record: 0 if the record has none, NaN if its entry is not a number."""
    step = record.get("step", 0)
    return step if isinstance(step, int | float) else math.nan


def _as_line(record: Mapping[str, Any]) -> str:
    return json.dumps({name: _json_value(value) for name, value in record.items()}) + "\n"


def _json_value(value: Any) -> Any:
    """A value with six digits; None for NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _as_csv(records: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for record in records for name in record if name != "kind"))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for record in records:
        writer.writerow([_json_value(record.get(name, "")) for name in names])
    return text.getvalue()
