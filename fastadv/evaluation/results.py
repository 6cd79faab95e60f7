"""The file of results of a run: the results of all its evaluations, to which later evaluations add."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fastadv.digest import SEAL, is_unchanged, sealed
from fastadv.evaluation.attack_list import AUTOATTACK, CLEAN
from fastadv.evaluation.report import Report
from fastadv.evaluation.result_row import Row, Status, known_fields, row_from_dict, row_to_dict
from fastadv.fields import check_fields
from fastadv.files import json_of, write_atomically
from fastadv.locks import locked, rewriting
from fastadv.ops.values import NORMS, check_choice, shown

EVAL_FILE = "eval.json"  # name of the file in a run directory
_FORMAT = 2  # `Report.from_dict` reads it as well
_REPORT_FORMAT = 1  # files of earlier versions hold the report of one evaluation


@dataclass(frozen=True)
class Subject:
    """The model and the images of an evaluation. Fields that a file does not have are empty.

    Attributes:
        run: name of the run directory.
        method: method of the model's training.
        network: the name of the model.
        checkpoint: name of the checkpoint.
        weights: SHA-256 of the weights that were judged.
        data: name of the images, with their split.
        images: SHA-256 of the images and labels that were used.
        parameters: number of the model's parameters; 0 where a file does not have it.
        multiply_adds: result of `multiply_adds` for one image; 0 where a file does not have it.
    """

    run: str = ""
    method: str = ""
    network: str = ""
    checkpoint: str = ""
    weights: str = ""
    data: str = ""
    images: str = ""
    parameters: int = 0
    multiply_adds: int = 0

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Result:
    """The accuracy of one model under one attack, with everything that it depends on.

    Attributes:
        subject: the judged model and data.
        row: the attack and its result.
        norm: norm of the perturbations.
        bounds: range of image values.
        batch_size: images per pass.
        device: device of the evaluation.
        versions: versions of the libraries on which figures depend.
        after: names of the attacks before it, where it got only the images that they had not broken.
        command: the command line of the evaluation, where there was one.
        date: time of the evaluation, in ISO 8601, UTC.
        worst_file: a file with the worst adversarial images, relative to the folder of the results.
    """

    subject: Subject
    row: Row
    norm: str
    bounds: tuple[float, float]
    batch_size: int
    device: str
    versions: dict[str, str]
    after: tuple[str, ...] = ()
    command: str = field(default="", compare=False)
    date: str = field(default="", compare=False)
    worst_file: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        check_fields(self)
        check_choice("norm", self.norm, NORMS)
        low, high = self.bounds
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"bounds must be finite and ascending, got {self.bounds}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {self.batch_size}")

    @property
    def is_clean(self) -> bool:
        """Whether there was no attack."""
        return self.row.name == CLEAN

    @property
    def setting(self) -> str:
        """The kind of attack.

        Returns:
            ``"no attack"``; ``"white box"``, in a ball, on images made for the judged model itself;
            ``"transfer"``, on images made on a surrogate; ``"no ball"``; or ``"no ball, transfer"``.
        """
        if self.is_clean:
            return "no attack"
        places = [*(["no ball"] if self.row.distances else [])]
        places += ["transfer"] if self.row.surrogate else []
        return ", ".join(places) or "white box"

    @property
    def judged(self) -> tuple[Any, ...]:
        """Network, weights and images. Results that agree in these can be compared with each other."""
        subject = self.subject
        # One state dict can fit several networks, which compute different functions.
        model = (subject.network, subject.weights, subject.checkpoint)
        return (*model, subject.data, subject.images, self.row.n)

    @property
    def key(self) -> tuple[Any, ...]:
        """Everything that the accuracy depends on. A result replaces an earlier result with the same key."""
        row = self.row
        # A model that draws random numbers draws them for each batch. Of other models only AutoAttack's result
        # depends on the batch size and on the precision of the search.
        if self.is_clean:
            drawn = (row.seed, self.batch_size) if row.is_random else (None, None)
            return (*self.judged, row.name, self.bounds, *drawn)
        batch_size = self.batch_size if row.name == AUTOATTACK or row.is_random else None
        attack = (row.title, row.alpha, row.steps, batch_size, row.search, self.after)
        return (*self.judged, *attack, self.norm, row.eps, self.bounds, row.seed)

    def to_dict(self) -> dict[str, Any]:
        """All fields in one dict of JSON types, with accuracy and interval written out for other readers."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _PARTS}
        return json.loads(json.dumps({**row_to_dict(self.row), **asdict(self.subject), **own}))

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> Result:
        """Read back the result of `to_dict`.

        Raises:
            KeyError: when an entry is missing.
            TypeError: when an entry is of another type.
            ValueError: when a number is out of range.
        """
        parts = {"subject": None, "row": None}
        own = known_fields(cls, {**entry, **parts})
        own["bounds"], own["after"] = entry["bounds"], entry["after"]
        subject = Subject(**known_fields(Subject, entry))
        return cls(**{**own, "subject": subject, "row": row_from_dict(entry)})


_WORST_FOLDER = "worst"
_CHANGED = (
    "its entry was damaged or changed after it was written: it does not have the SHA-256 beside it"
)
_PARTS = ("subject", "row")  # fields of a result whose own fields are in its entry


def results_of(report: Report, subject: Subject) -> list[Result]:
    """Return the results in the report of one evaluation."""
    results: list[Result] = []
    before: dict[
        float, list[str]
    ] = {}  # attacks by radius; attacks without a ball belong to no worst case
    for row in report.rows:
        chain = before.setdefault(row.eps, [])
        in_ball = row.name != CLEAN and row.distances is None
        results.append(
            Result(
                subject,
                row,
                row.distances.norm if row.distances else report.norm,
                report.bounds,
                report.batch_size,
                report.device,
                report.versions,
                tuple(chain) if report.worst_case and in_ball else (),
            )
        )
        if in_ball:
            chain.append(row.title)
    return results


def worst_file(results: Path, result: Result) -> str:
    """The path of a result's worst images, relative to the folder of the file of results.

    The name follows from the result's key and the name of the file of results, so that no other result has it.
    """
    key = hashlib.sha256(repr((results.name, result.key)).encode()).hexdigest()
    attack = re.sub(r"[^A-Za-z0-9_.-]", "_", result.row.name)
    return f"{_WORST_FOLDER}/{attack}-{key[:16]}.npz"


def load_results(path: str | os.PathLike[str]) -> list[Result]:
    """Read the results that a file holds, in the order in which they were first added.

    Args:
        path: a file of results, or the report of one evaluation as JSON, which earlier versions wrote.

    Returns:
        The results, one for each attack and setting.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is damaged or something else; the message names the file.
    """
    return _read(path)[0]


def _read(path: str | os.PathLike[str]) -> tuple[list[Result], list[dict[str, Any]]]:
    """The results of a file, as `load_results`, and its entries, in which later versions may have more fields."""
    name = os.fspath(path)
    try:
        content = json_of(path)
        version = content.get("format") if isinstance(content, dict) else None
        if version == _REPORT_FORMAT:
            report = Report.from_dict(content)
            found = results_of(report, Subject(network=report.model, data=report.data))
            return found, [result.to_dict() for result in found]
        if version != _FORMAT:
            raise ValueError(f"results must have format {_FORMAT}, got {version!r}")
        return results_in(content["rows"]), content["rows"]
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{name}: results are damaged: {error!r}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def results_in(entries: list[Any]) -> list[Result]:
    """Read the results of a file's entries. A result that was changed after it was written is suspect.

    Raises:
        KeyError: when an entry lacks a field.
        TypeError: when a field is of another type.
        ValueError: when a number is out of range, or two entries contradict each other about one attack; the
            message names the entry.
    """
    if not isinstance(entries, list):
        raise TypeError(f"rows must be a list, got {shown(entries)}")
    found: dict[tuple[Any, ...], Result] = {}
    for number, entry in enumerate(entries, 1):
        try:
            result = _result_in(entry)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
        other = found.setdefault(result.key, result)
        if other.row.correct != result.row.correct:
            raise ValueError(
                f"row {number} has {result.row.correct} images right for {result.row.title}, where another row "
                f"has {other.row.correct} for the same attack on the same model and images; delete the wrong one"
            )
    return list(found.values())


def _result_in(entry: dict[str, Any]) -> Result:
    """The result of an entry; suspect if the entry was changed after it was written."""
    result = Result.from_dict(entry)
    return result if is_unchanged(entry) else replace(result, row=_doubtful(result.row))


def _doubtful(row: Row) -> Row:
    """A row, marked as suspect because its entry in a file does not have the hash that was written with it."""
    status: Status = row.status if row.status == "invalid" else "suspect"
    return replace(row, status=status, notes=(*row.notes, _CHANGED))


def add_results(path: str | os.PathLike[str], results: Iterable[Result]) -> Path:
    """Add results to a file. A result replaces a result with the same key. No other result is lost.

    The file is read and written under a lock, so that processes can add at the same time. All other entries stay
    as they are, with fields that only a later version knows.

    Args:
        path: a file of results, which need not exist; missing folders are made.
        results: the results to add.

    Returns:
        The path written.

    Raises:
        TypeError: when an item is not a result.
        ValueError: when the file exists and is damaged, or when a result without `Subject.weights` would replace
            another accuracy, which may be of another model; the file is not changed.
        OSError: when the file cannot be written.
    """
    if not isinstance(results, Iterable):
        raise TypeError(f"results must be a list of results, got {shown(results)}")
    results = list(results)
    for result in results:
        if not isinstance(result, Result):
            raise TypeError(f"results must be a list of results, got {shown(result)} in it")
    with rewriting(path) as target:
        there, entries = _read(target) if target.exists() else ([], [])
        merged = {result.key: result for result in there}
        for result in results:
            old = merged.get(result.key)
            if old is not None:
                _require_same_model(old, result)
            if old is not None and not result.worst_file:  # its images still belong to this key
                result = replace(result, worst_file=old.worst_file)
            merged[result.key] = result
        fresh = {result.key: sealed(merged[result.key].to_dict()) for result in results}
        rows: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for entry in entries:
            result = _result_in(entry)
            if result.key not in fresh:
                kept, same = _as_it_was(entry, result), rows.setdefault(result.key, [])
                same += [] if kept in same else [kept]
            else:
                rows[result.key] = [fresh[result.key]]
        rows |= {key: [entry] for key, entry in fresh.items()}
        content = {"format": _FORMAT, "rows": [one for of_key in rows.values() for one in of_key]}
        return write_atomically(target, json.dumps(content, indent=2) + "\n")


def _require_same_model(old: Result, new: Result) -> None:
    """Refuse a result that would replace one that may be of another model with the same name."""
    if not new.subject.weights and old.row.correct != new.row.correct:
        raise ValueError(
            f"results must have Subject.weights, the SHA-256 of the weights: {new.row.title} of "
            f"{new.subject.network!r} has {new.row.correct} images right, the file has {old.row.correct} for the "
            "same attack, and nothing tells whether it is the same model"
        )


def _as_it_was(entry: dict[str, Any], result: Result) -> dict[str, Any]:
    """An entry with its hash; of an entry that was changed after it was written, the suspect result."""
    if not is_unchanged(entry):
        return sealed(result.to_dict())
    return entry if SEAL in entry else sealed(entry)


def check_destination(path: str | os.PathLike[str]) -> str | None:
    """Return the reason why results cannot be added to a file, or None.

    Raises:
        ValueError: when the file exists and is damaged.
    """
    target = Path(path)
    try:
        if target.exists():
            load_results(target)
        folder = target.parent
        while not folder.exists():
            folder = folder.parent
        with locked(folder / target.name):
            return None
    except OSError as error:
        return f"{path} cannot be written: {error.strerror}" if error.strerror else str(error)
