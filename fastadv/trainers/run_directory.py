"""A run's directory: its lock, and the description of the run."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from fastadv.files import naming, remove_leftovers, write_atomically
from fastadv.models import form_of
from fastadv.models.sealed_safetensors import sealed_safetensors
from fastadv.trainers.checkpoint import (
    CHECKPOINTS,
    LATEST,
    RUN_FILE,
    CheckpointError,
    checkpoints_in,
    in_its_run,
    remove_unfinished,
)
from fastadv.trainers.plain_recipe import differences
from fastadv.trainers.run_lock import RunInUseError, RunLock
from fastadv.trainers.sealed import read_sealed, sealed_json

_DIGESTS = ("labels", "pixels", "files")  # of data, which older versions did not all record


@dataclass(frozen=True)
class Description:
    """The facts that make two runs the same run.

    Attributes:
        method: the method's name.
        recipe: all numbers of the recipe, as JSON types.
        model: the facts by which the model is built.
        data: the facts about the training images.
        teachers: digest of the weights of each frozen model.
    """

    method: str
    recipe: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    teachers: dict[str, str]

    def flat(self) -> dict[str, Any]:
        """Return all entries in one dict, for a comparison."""
        flat: dict[str, Any] = {"method": self.method, **self.recipe}
        for part in ("model", "data", "teachers"):
            flat.update({f"{part}.{key}": value for key, value in getattr(self, part).items()})
        return flat


class RunDirectory:
    """The directory of a run: `run.json`, logs, `checkpoints/` and the frozen models' weights.

    Args:
        path: the path of the directory, which need not exist yet.

    Attributes:
        path: the path of the directory.
        lock: the lock of the directory, which a process needs to write there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        self.lock = RunLock(self.path)

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / CHECKPOINTS

    def teacher_file(self, name: str) -> Path:
        """Return the file with the weights of a frozen model."""
        return self.path / f"{name}.safetensors"

    @property
    def exists(self) -> bool:
        """Whether there is a run here."""
        return self._file.is_file()

    def read(self) -> Description:
        """Return the description of the run.

        Raises:
            CheckpointError: if `run.json` is absent or damaged.
        """
        content = self._read_json()
        kinds = {"method": str, **dict.fromkeys(("recipe", "model", "data", "teachers"), dict)}
        for name, kind in kinds.items():
            if not isinstance(content.get(name), kind):
                raise CheckpointError(
                    f"{self._file}: its entry {name!r} must be a {kind.__name__}, got {content.get(name)!r}"
                )
        return Description(**{field.name: content[field.name] for field in fields(Description)})

    def source(self) -> tuple[str | None, str | None]:
        """Return the name and the folder of the data set; each is None if it was not recorded.

        Raises:
            CheckpointError: if `run.json` is absent or damaged.
        """
        source = self._read_json().get("source", {})
        if not isinstance(source, dict) or any(
            not isinstance(source.get(name), str | None) for name in ("dataset", "root")
        ):
            raise CheckpointError(
                f"{self._file}: its entry 'source' must hold names, got {source!r}"
            )
        return source.get("dataset"), source.get("root")

    def reading(self) -> dict[str, int | str]:
        """Return how pictures in folders are read: "resize", "crop" and "interpolation"; empty for other data.

        Raises:
            CheckpointError: if `run.json` is absent or damaged.
        """
        source = self._read_json().get("source")
        reading = source.get("reading", {}) if isinstance(source, dict) else {}
        kinds = {"resize": int, "crop": int, "interpolation": str}
        if not isinstance(reading, dict) or any(
            not isinstance(value, kinds.get(name, type(None))) for name, value in reading.items()
        ):
            raise CheckpointError(
                f"{self._file}: its entry 'reading' must hold sizes, got {reading!r}"
            )
        return reading

    def method_code(self) -> str | None:
        """Return "package.module:Class" of a user's own method, or None. It may be shown, but never imported."""
        code = self._read_json().get("method_code") if self.exists else None
        return code if isinstance(code, str) else None

    def launch(self) -> str | None:
        """Return the torchrun job that last began or resumed the run; None if there is no such job."""
        return self._read_json().get("launch") if self.exists else None

    def identity(self) -> str | None:
        """Return the identity of the run, a text that no other run has and that its checkpoints record.

        None if there is no run, or if an older version wrote it, which recorded no identity.
        """
        return self._read_json().get("run") if self.exists else None

    def _read_json(self) -> dict[str, Any]:
        try:
            return read_sealed(self._file)
        except OSError as error:
            found = place_in_run(self.path)
            hint = (
                ""
                if found is None
                else f", but in {found[0]}; name the checkpoint beside it: {found[1]}"
            )
            raise CheckpointError(
                f"{self._file}: {error.strerror}; there is no run here{hint}"
            ) from error

    def check_free(self, resume: bool, overwrite: bool) -> None:
        """Check that a run may start or go on here, before anything is written.

        Raises:
            ValueError: if both ``resume`` and ``overwrite`` are true, or if the path is the place of a checkpoint.
            FileExistsError: if there is a run here and both are false, or if there are files of a damaged run.
            NotADirectoryError: if the path is a file.
        """
        if resume and overwrite:
            raise ValueError("resume and overwrite exclude each other, got both")
        self._check_no_checkpoint()
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"run_dir must be a directory, got the file {self.path}")
        if self.exists and not (resume or overwrite):
            raise FileExistsError(
                f"run_dir {self.path} already holds a run; resume it (--resume), overwrite it (--overwrite), or "
                "choose another directory"
            )
        if not self.exists and (checkpoints_in(self.checkpoints) or self._log.exists()):
            raise FileExistsError(
                f"run_dir {self.path} holds checkpoints or logs but no run.json; choose another"
            )

    def _check_no_checkpoint(self) -> None:
        """Refuse the places of another run's checkpoints, such as RUN/best, where a run would begin anew."""
        found = place_in_run(self.path)
        if found is not None:
            run, name = found
            raise ValueError(
                f"run_dir must be the directory of a run, got {self.path}, which is in the run {run}. To go on "
                f"from a checkpoint of that run, resume the run and name the checkpoint (--run {run} --resume "
                f"--from_checkpoint {name})"
            )

    def check_same(self, new: Description, defaults: Mapping[str, Any]) -> None:
        """Check that the run to be resumed is the run in this directory.

        Args:
            new: the description of the run to be resumed.
            defaults: the recipe's defaults, for numbers that an older version did not record.

        Raises:
            ValueError: if it is another run; the message names the differences.
        """
        old = self.read()
        new = replace(new, data=_as_far_as(old.data, new.data))
        changed = differences({**defaults, **old.flat()}, new.flat())
        if changed:
            raise ValueError(
                f"run_dir {self.path} holds another run than the one to resume: "
                f"{'; '.join(changed)}. Allow the changes by allow_changes (--allow_changes), or choose "
                "another directory"
            )

    def take(self) -> None:
        """Make the directory, take its lock, and delete incomplete files that a killed process has left.

        Raises:
            RunInUseError: if another process holds the lock.
            OSError: if the directory cannot be written; the message names it.
        """
        with naming(f"run_dir {self.path}"):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.lock.take()
        remove_leftovers(self.path)
        remove_unfinished(self.checkpoints)

    def check_held(self, identity: str | None) -> None:
        """Check that the directory still holds the run of this process, before more is written to it.

        Args:
            identity: the run's identity.

        Raises:
            RunInUseError: if it was moved or deleted, or another run or process has taken its place; the message
                says so.
        """
        with suppress(CheckpointError):  # damage to the record makes no other run
            if self.identity() != identity:
                found = "another run" if self.exists else "no run"
                raise RunInUseError(
                    f"run_dir {self.path} holds {found} now: the run of this process was moved, deleted or "
                    "overwritten. Resume it where its last checkpoint is"
                )
        self.lock.keep()

    def begin(self, description: Description, facts: Mapping[str, Any]) -> None:
        """Write `run.json`.

        Args:
            description: the description of the run.
            facts: further facts to record.

        Raises:
            OSError: if it cannot be written; the message names it.
        """
        identity = self.identity() or uuid.uuid4().hex
        write_atomically(self._file, sealed_json({"run": identity, **asdict(description), **facts}))

    def save_teacher(self, name: str, teacher: nn.Module) -> None:
        """Save a frozen model's weights, so that the run can be resumed without their source."""
        state = {
            key: value.cpu().contiguous().clone() for key, value in teacher.state_dict().items()
        }
        form = form_of(teacher)
        metadata = {"format": "pt"} | ({} if form is None else {"form": form})
        write_atomically(self.teacher_file(name), sealed_safetensors(state, metadata))

    def clear(self) -> None:
        """Delete a run's files; other files in the directory stay."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
        shutil.rmtree(self.path / "autoattack", ignore_errors=True)
        shutil.rmtree(self.path / "worst", ignore_errors=True)
        names = ["metrics.jsonl", "summary.csv", "mlflow_run"]
        # Of the run's other networks, too: a report would take their results for the new run's.
        for network in ("", "natural.", "extractors_*."):
            for folder in self.path.glob(f"{network}analyses"):
                shutil.rmtree(folder, ignore_errors=True)
            for kind in ("eval.json", "eval.sanity.json"):
                names += [file.name for file in self.path.glob(f"{network}{kind}")]
        with suppress(CheckpointError):  # a damaged run can be overwritten, too
            # Names in a run that others wrote could be paths out of the directory.
            names += [f"{name}.safetensors" for name in self.read().teachers if name.isidentifier()]
        for name in names:
            (self.path / name).unlink(missing_ok=True)
        for file in self.path.glob("nonfinite_step_*.pt"):
            file.unlink()
        self._file.unlink()  # last, so that after a kill the directory still counts as a run and can be cleared

    @property
    def _file(self) -> Path:
        return self.path / RUN_FILE

    @property
    def _log(self) -> Path:
        return self.path / "metrics.jsonl"


def place_in_run(path: Path) -> tuple[Path, str] | None:
    """Return the run in which a path is the place of a checkpoint, such as RUN/best, and the checkpoint's name."""
    path = in_its_run(Path(os.path.abspath(path)))
    folder = path if path.name == CHECKPOINTS else path.parent
    if folder.name != CHECKPOINTS or not (folder.parent / RUN_FILE).is_file():
        return None
    return folder.parent, LATEST if path is folder else path.name


def _as_far_as(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The new description of data, without the digests that an older version did not record."""
    return {
        name: _as_far_as(old[name], value)
        if isinstance(value, dict) and isinstance(old.get(name), dict)
        else value
        for name, value in new.items()
        if name not in _DIGESTS or name in old
    }
