"""The files of an analysis's findings: JSON with everything that they depend on, CSV, and images."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastadv.digest import sealed, unsealed
from fastadv.evaluation.analyses.analysis import Measured
from fastadv.evaluation.result_row import known_fields
from fastadv.evaluation.results import EVAL_FILE, Subject
from fastadv.evaluation.worst import read_arrays
from fastadv.fields import check_fields
from fastadv.files import file_key, json_of, remove_leftovers, write_atomically

_FORMAT = 1
_FOLDER = "analyses"
_RESULTS = f".{EVAL_FILE}"  # suffix of the file of results beside a file of weights
_IMAGES = ("originals", "adversarials")


@dataclass(frozen=True)
class AnalysisRecord:
    """The findings of an analysis on one model, with everything that they depend on.

    Attributes:
        measured: the findings.
        subject: the model and the images; parts that the analysis does not need are empty.
        n: number of images.
        settings: the settings that the analysis uses, by name.
        teacher: SHA-256 of the standard model's weights, where the analysis uses it.
        versions: versions of the libraries on which the numbers depend.
        device: device of the run.
        command: the command line of the analysis, where there was one.
        date: time of the analysis, in ISO 8601, UTC.
    """

    measured: Measured
    subject: Subject
    n: int
    settings: dict[str, Any]
    teacher: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"
    command: str = ""
    date: str = ""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def common(self) -> tuple[Any, ...]:
        """The facts that must be equal in records which one picture shows."""
        subject = self.subject
        settings = tuple(sorted((name, str(value)) for name, value in self.settings.items()))
        return (
            self.measured.analysis,
            subject.data,
            subject.images,
            self.n,
            settings,
            self.teacher,
        )

    @property
    def key(self) -> str:
        """A name for the files of this record that no record with other settings has."""
        subject = self.subject
        model = (subject.network, subject.weights, subject.checkpoint)
        facts = (*self.common, *model, sorted(self.versions.items()))
        return file_key(self.measured.analysis, *facts)

    def path(self, folder: Path, suffix: str = ".json") -> Path:
        """The path of this record's JSON file in a folder, or of its file with another suffix."""
        return folder / f"{self.key}{suffix}"

    def save(self, folder: Path) -> Path:
        """Write the CSV, the images, and last the JSON file, without which the record does not count.

        Raises:
            OSError: when they cannot be written.
        """
        if folder.is_dir():
            remove_leftovers(folder)
        if self.measured.originals is not None:
            content = io.BytesIO()
            arrays = {name: getattr(self.measured, name).numpy() for name in _IMAGES}
            np.savez_compressed(content, **arrays)
            write_atomically(self.path(folder, ".npz"), content.getvalue())
        write_atomically(self.path(folder, ".csv"), self.measured.to_csv(self.facts()))
        text = json.dumps(sealed({"format": _FORMAT, **self.to_dict()}), indent=1, allow_nan=False)
        return write_atomically(self.path(folder), text + "\n")

    def facts(self) -> dict[str, Any]:
        """Everything that the numbers depend on, by name, for people."""
        subject = {name: value for name, value in asdict(self.subject).items() if value}
        others = {"teacher": self.teacher, "command": self.command, "date": self.date}
        return {
            "analysis": self.measured.analysis,
            **subject,
            "n": self.n,
            **self.settings,
            **{name: value for name, value in others.items() if value},
            "device": self.device,
            **{f"version of {name}": value for name, value in self.versions.items()},
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything but the images, as JSON types."""
        measured = replace(self.measured, originals=None, adversarials=None)
        content = asdict(replace(self, measured=measured))
        for name in _IMAGES:
            del content["measured"][name]
        return content

    @classmethod
    def load(cls, path: Path) -> AnalysisRecord:
        """Read a file that `save` wrote; nothing is unpickled.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it holds other content; the message names the file.
        """
        try:
            content = json_of(path)
            content = unsealed(content)
            if content.get("format") != _FORMAT:
                raise ValueError(f"its format must be {_FORMAT}, got {content.get('format')!r}")
            measured = known_fields(Measured, content["measured"])
            for name in ("columns", "notes"):
                measured[name] = tuple(measured[name])
            measured["rows"] = tuple(map(tuple, measured["rows"]))
            if any(len(row) != len(measured["columns"]) for row in measured["rows"]):
                raise ValueError("its rows must have one cell per column")
            images = _read_images(path.with_suffix(".npz"))
            values = known_fields(cls, content)
            values["measured"] = Measured(**{**measured, **images})
            values["subject"] = Subject(**known_fields(Subject, content["subject"]))
            return cls(**values)
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: is no record of an analysis: {error}") from error


def _read_images(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        return {}
    return read_arrays(path, _IMAGES)


def analyses_folder(results: Path) -> Path:
    """The folder of analyses that belongs to a file of results: ``RUN/analyses`` or ``FILE.analyses``."""
    if results.name.endswith(_RESULTS):
        return results.with_name(f"{results.name.removesuffix(_RESULTS)}.{_FOLDER}")
    return results.parent / _FOLDER


def load_records(folder: Path) -> list[AnalysisRecord]:
    """Read all records of a folder, sorted by analysis and date; an empty list where there is no folder.

    Raises:
        ValueError: when a file is damaged; the message names the file.
    """
    found: Sequence[Path] = sorted(folder.glob("*.json")) if folder.is_dir() else ()
    records = [AnalysisRecord.load(path) for path in found]
    return sorted(records, key=lambda one: (one.measured.analysis, one.date, one.key))
