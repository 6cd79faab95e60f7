"""A run's directory: who may write to it, and what it says the run is."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastadv.files import write_atomically
from fastadv.trainers.checkpoint import CheckpointError, checkpoints_in
from fastadv.trainers.recipe import differences

_FORMAT = 1


@dataclass(frozen=True)
class Description:
    """What makes two runs the same run.

    Attributes:
        method: the method's name.
        recipe: all its numbers, as JSON types.
        model: how the model is built.
        data: which images.
        teachers: digest of the weights of each frozen model.
    """

    method: str
    recipe: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    teachers: dict[str, str]

    def flat(self) -> dict[str, Any]:
        """Return all entries side by side, for a comparison."""
        flat: dict[str, Any] = {"method": self.method, **self.recipe}
        for part in ("model", "data", "teachers"):
            flat.update({f"{part}.{key}": value for key, value in getattr(self, part).items()})
        return flat


class RunDirectory:
    """The directory of a run: `run.json`, logs, `checkpoints/` and the frozen models' weights.

    Args:
        path: where it is or shall be.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    def teacher_file(self, name: str) -> Path:
        """Return where the weights of a frozen model are kept."""
        return self.path / f"{name}.safetensors"

    @property
    def exists(self) -> bool:
        """Whether there is a run here."""
        return self._file.is_file()

    def read(self) -> Description:
        """Return what the run here is.

        Raises:
            CheckpointError: if `run.json` is absent or damaged.
        """
        content = self._read_json()
        try:
            return Description(**{field.name: content[field.name] for field in fields(Description)})
        except KeyError as error:
            raise CheckpointError(f"{self._file}: has no entry {error}") from error

    def source(self) -> tuple[str | None, str | None]:
        """Return name and folder of the data set; None for what was not given by name.

        Raises:
            CheckpointError: if `run.json` is absent or damaged.
        """
        source = self._read_json().get("source", {})
        return source.get("dataset"), source.get("root")

    def launch(self) -> str | None:
        """Return the torchrun job that began the run or went on with it last, None if there is none."""
        return self._read_json().get("launch") if self.exists else None

    def _read_json(self) -> dict[str, Any]:
        try:
            content = json.loads(self._file.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(
                f"{self._file}: {error.strerror}; there is no run here"
            ) from error
        except ValueError as error:
            raise CheckpointError(f"{self._file}: not valid JSON ({error})") from error
        version = content.get("format") if isinstance(content, dict) else None
        if version != _FORMAT:
            raise CheckpointError(f"{self._file}: format must be {_FORMAT}, got {version!r}")
        return content

    def check_free(self, resume: bool, overwrite: bool) -> None:
        """Check that a run may start or go on here, before anything is written.

        Raises:
            ValueError: if both are asked for.
            FileExistsError: if there is something here and neither is asked for.
            NotADirectoryError: if the path is a file.
        """
        if resume and overwrite:
            raise ValueError("resume and overwrite exclude each other, got both")
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"run_dir must be a directory, got the file {self.path}")
        if self.exists and not (resume or overwrite):
            raise FileExistsError(
                f"run_dir {self.path} already holds a run; resume it, overwrite it, or choose "
                "another directory"
            )
        if not self.exists and (checkpoints_in(self.checkpoints) or self._log.exists()):
            raise FileExistsError(
                f"run_dir {self.path} holds checkpoints or logs but no run.json; choose another"
            )

    def check_same(self, new: Description) -> None:
        """Check that a run to be resumed is the one that is here.

        Raises:
            ValueError: naming what differs.
        """
        changed = differences(self.read().flat(), new.flat())
        if changed:
            raise ValueError(
                f"run_dir {self.path} holds another run than the one to resume: "
                f"{'; '.join(changed)}. Ask for changes to be allowed, or choose another directory"
            )

    def begin(self, description: Description, facts: Mapping[str, Any]) -> None:
        """Make the directory and write `run.json`.

        Args:
            description: what the run is.
            facts: what else is worth recording.

        Raises:
            OSError: if the directory cannot be written; the message names it.
        """
        content = {"format": _FORMAT, **asdict(description), **facts}
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file, json.dumps(content, indent=2) + "\n")
        except OSError as error:
            reason = error.strerror or error
            raise type(error)(f"run_dir {self.path} cannot be written: {reason}") from error

    def save_teacher(self, name: str, teacher: nn.Module) -> None:
        """Keep a frozen model's weights, so that the run can be resumed without their source."""
        from safetensors.torch import save

        state = {
            key: value.cpu().contiguous().clone() for key, value in teacher.state_dict().items()
        }
        write_atomically(self.teacher_file(name), save(state, metadata={"format": "pt"}))

    def clear(self) -> None:
        """Delete what a run leaves; anything else in the directory stays."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
        shutil.rmtree(self.path / "autoattack", ignore_errors=True)
        names = ["metrics.jsonl", "summary.csv", "eval.json"]
        names += [f"{name}.safetensors" for name in self.read().teachers]
        for name in names:
            (self.path / name).unlink(missing_ok=True)
        for file in self.path.glob("nonfinite_step_*.pt"):
            file.unlink()
        self._file.unlink()  # last, so that a kill leaves something to clear again

    @property
    def _file(self) -> Path:
        return self.path / "run.json"

    @property
    def _log(self) -> Path:
        return self.path / "metrics.jsonl"


def digest_of(state: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 of a state dict's names and values, whatever their memory layout."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        plain = value.detach().cpu().contiguous().flatten()
        digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
