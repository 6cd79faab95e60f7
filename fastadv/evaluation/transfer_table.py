"""The matrix of black-box transfer between several models: written as a table, and read from JSON."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from fastadv.digest import sealed, unsealed
from fastadv.evaluation.metrics import wilson_interval
from fastadv.evaluation.wording import format_eps
from fastadv.fields import check_fields
from fastadv.files import check_replaceable, json_of, write_atomically
from fastadv.ops.values import limit
from fastadv.plain_text import csv_cell, markdown_text, one_line

_FORMAT = 1


@dataclass(frozen=True)
class TransferMatrix:
    """Accuracies of models on adversarial images that were made on each of them.

    Attributes:
        attack: name of the attack.
        names: names of the models.
        correct: number of images that a model still classifies correctly, by source and then by target; where both
            are the same model, the attack is a white-box attack.
        clean: number of images that each model classifies correctly without an attack.
        n: number of images.
        eps: radius of the ball.
        norm: norm of the ball.
        bounds: range of image values.
        seed: seed of the random numbers.
        alpha: step size, where the attack has one.
        data: name of the data.
        seconds: wall-clock time.
        notes: notes on the attack and on violations by its images, one sentence each.
        versions: versions of the libraries on which figures depend.
    """

    attack: str
    names: tuple[str, ...]
    correct: tuple[tuple[int, ...], ...]
    clean: tuple[int, ...]
    n: int
    eps: float
    norm: str
    bounds: tuple[float, float]
    seed: int
    alpha: float | None = None
    data: str = ""
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        limit("eps", self.eps)
        limit("seconds", self.seconds)
        rows = (*self.correct, self.clean)
        count = len(self.names)
        if len(self.correct) != count or any(len(row) != count for row in rows):
            raise ValueError(f"correct must be {count} x {count}, as there are {count} names")
        for value in (value for row in rows for value in row):
            wilson_interval(value, self.n)  # checks the count

    def accuracy(self, source: str, target: str) -> float:
        """Share of all images whose adversarial image, made on the source, the target classifies correctly.

        Raises:
            KeyError: naming the existing models.
        """
        return self.correct[self._index(source)][self._index(target)] / self.n

    def _index(self, name: str) -> int:
        if name not in self.names:
            raise KeyError(f"no model {name!r}, there are {', '.join(self.names)}")
        return self.names.index(name)

    def __str__(self) -> str:
        """The table as text."""
        return self.table()

    def table(self) -> str:
        """An aligned plain-text table."""
        cells = self._cells()
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        lines = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
            for line in cells
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([self._caption(), "", *lines, *self._remarks()]) + "\n"

    def markdown(self) -> str:
        """The table in markdown."""
        heading, *rest = (
            "| " + " | ".join(map(markdown_text, line)) + " |" for line in self._cells()
        )
        rule = "| --- |" + " ---: |" * len(self.names)
        texts = map(markdown_text, self._remarks())
        return "\n".join([markdown_text(self._caption()), "", heading, rule, *rest, *texts]) + "\n"

    def to_csv(self) -> str:
        """The matrix as CSV, one line per pair of models; accuracies are fractions."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("source", "target", "attack", "accuracy", "low", "high", "correct", "n"))
        for source, row in zip(("", *self.names), (self.clean, *self.correct), strict=True):
            attack = self.attack if source else "clean"
            for target, correct in zip(self.names, row, strict=True):
                interval = wilson_interval(correct, self.n)
                cells = (source, target, attack, correct / self.n, *interval, correct, self.n)
                writer.writerow(map(csv_cell, cells))
        return text.getvalue()

    def to_json(self) -> str:
        """The matrix as JSON text."""
        return json.dumps(sealed({"format": _FORMAT, **asdict(self)}), indent=2) + "\n"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the matrix atomically, in the format of the suffix: ``.json``, ``.csv`` or ``.md``.

        Raises:
            ValueError: for another suffix.
        """
        return write_atomically(path, _writer(path)(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TransferMatrix:
        """Read a matrix saved as JSON.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it is no matrix; the message names the file.
        """
        try:
            content = json_of(path)
            content = unsealed(content) if isinstance(content, dict) else {}
            version = content.pop("format", None)
            if version != _FORMAT:
                raise ValueError(f"a transfer matrix must have format {_FORMAT}, got {version!r}")
            return cls(**{f.name: content[f.name] for f in fields(cls)})
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error

    def _cells(self) -> list[list[str]]:
        def line(title: str, row: Sequence[int]) -> list[str]:
            return [one_line(title), *(f"{100 * correct / self.n:.2f}" for correct in row)]

        heading = ["made on \\ judged", *map(one_line, self.names)]
        made = [line(name, row) for name, row in zip(self.names, self.correct, strict=True)]
        return [heading, line("no attack", self.clean), *made]

    def _caption(self) -> str:
        data = f"{self.data}, " if self.data else ""
        return (
            f"{data}{self.n} images, {self.attack} at {format_eps(self.eps)} {self.norm}, seed {self.seed}: "
            "accuracy in %, white box on the diagonal"
        )

    def _remarks(self) -> list[str]:
        return ["", *self.notes] if self.notes else []


# Text that is near the beginning of each format.
_MARKS = {".json": '\n  "attack": ', ".csv": "source,target,attack,", ".md": "| made on "}
_WRITERS: dict[str, Callable[[TransferMatrix], str]] = {
    ".json": TransferMatrix.to_json,
    ".csv": TransferMatrix.to_csv,
    ".md": TransferMatrix.markdown,
}


def _writer(path: str | os.PathLike[str]) -> Callable[[TransferMatrix], str]:
    suffix = Path(path).suffix.lower()
    if suffix not in _WRITERS:
        raise ValueError(f"out must end in one of {', '.join(_WRITERS)}, got {os.fspath(path)!r}")
    return _WRITERS[suffix]


def check_matrix_file(path: str | os.PathLike[str]) -> None:
    """Require a name that `TransferMatrix.save` takes, of a new file or of an earlier matrix.

    Raises:
        FileExistsError: if it is a file with other content, such as a run's eval.json.
        ValueError: for another suffix.
    """
    _writer(path)
    check_replaceable(path, _MARKS[Path(path).suffix.lower()], "fastadv transfer")
