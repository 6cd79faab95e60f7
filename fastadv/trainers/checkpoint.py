"""Writing and reading checkpoints. They survive a kill at any moment, and any damage is noticed.

A checkpoint is a directory `step_000123` with

- `model.safetensors`: the trained model's state dict under its own names; the average of the tensors that
  training changes under "ema/" or "swa/"; further trained models under "<name>/";
- `train_state.pt`: optimisers and counters, which load with `weights_only=True`;
- `meta.json`: format, run, recipe, versions, position in the run, the SHA-256 of the other two files and its own.

It is written under a name that begins with a dot, flushed to disk and renamed. Then the link
`latest` is switched to it. So `latest` always names a complete checkpoint.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastadv.files import (
    TEMPORARY,
    naming,
    point_link,
    remove,
    sha256_of,
    sync_path,
    write_through,
)
from fastadv.models.sealed_safetensors import sealed_safetensors
from fastadv.trainers.sealed import CheckpointError, read_sealed, sealed_json

MODEL_FILE = "model.safetensors"
STATE_FILE = "train_state.pt"
META_FILE = "meta.json"
RUN_FILE = "run.json"
CHECKPOINTS = "checkpoints"
LATEST = "latest"
BEST = "best"
_NAME = re.compile(r"step_(\d{6,})")
_MAX_NAME_LENGTH = 40


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and whose hashes were correct.

    Attributes:
        path: the checkpoint's directory.
        meta: content of `meta.json`.
        weights: content of `model.safetensors`, on the CPU.
        train_state: content of `train_state.pt`, on the CPU; empty if it was not read.
    """

    path: Path
    meta: dict[str, Any]
    weights: dict[str, Tensor]
    train_state: dict[str, Any]


def checkpoint_name(step: int) -> str:
    """Return the directory name of the checkpoint after a number of steps."""
    return f"step_{step:06d}"


def save_checkpoint(
    folder: Path,
    step: int,
    weights: Mapping[str, Tensor],
    train_state: Mapping[str, Any],
    meta: Mapping[str, Any],
) -> Path:
    """Write a checkpoint and switch `latest` to it.

    Args:
        folder: the folder of the run's checkpoints.
        step: number of steps done; a checkpoint of the same step is replaced.
        weights: tensors by name.
        train_state: tensors, numbers, text, and dicts and lists of these.
        meta: further facts to record, JSON types.

    Returns:
        The checkpoint's directory.

    Raises:
        OSError: if it cannot be written, for example on a full disk. The message names the file; earlier
            checkpoints are unchanged.
    """
    name = checkpoint_name(step)
    temporary = folder / f"{TEMPORARY}{name}"
    with naming(folder / name):
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        temporary.mkdir()
        try:
            _write_files(temporary, folder / name, weights, train_state, {**meta, "step": step})
            _put_in_place(temporary, folder / name)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    point_link(folder / LATEST, name)
    return folder / name


def load_checkpoint(path: Path, with_state: bool = True) -> Checkpoint:
    """Read a checkpoint and check that it is complete.

    Args:
        path: the checkpoint's directory, or a link to it.
        with_state: also read the state that only a continued training needs.

    Raises:
        CheckpointError: if the checkpoint is absent, damaged, in another format or no checkpoint. Nothing on
            disk is changed. The message names the newest good checkpoint beside it, if any.
    """
    path = _under_its_name(path)
    try:
        return _read(path, with_state)
    except CheckpointError as error:
        good = newest_good(path.parent, besides=path.name)
        hint = f"; the newest good checkpoint there is {good}" if good else ""
        raise CheckpointError(f"{error}{hint}") from error.__cause__


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first. Their content is not read."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=_step_of)


def newest_good(folder: Path, besides: str = "") -> Path | None:
    """Return the newest complete checkpoint in a folder, or None.

    Args:
        folder: the folder of checkpoints.
        besides: name of a checkpoint to leave out.
    """
    for path in reversed(checkpoints_in(folder)):
        if path.name != besides:
            try:
                _verify(path)
            except CheckpointError:
                continue
            return path
    return None


def find_checkpoint(path: str | os.PathLike[str], which: str = LATEST) -> Path:
    """Find a checkpoint's directory.

    Args:
        path: a run directory, its `checkpoints` folder, a checkpoint, or a name in a run such as "RUN/best".
        which: if the path is a run: "latest", "best" or a name such as "step_000123".

    Raises:
        CheckpointError: if there is no checkpoint.
    """
    start = in_its_run(Path(path).expanduser())
    if not start.exists():
        raise CheckpointError(
            f"{start}: no such file or directory; it must be a run directory or a checkpoint"
        )
    named = _under_its_name(start)
    if (named / META_FILE).is_file() or _NAME.fullmatch(named.name):
        return named
    if start.is_file():
        raise CheckpointError(f"{start}: must be a run directory or a checkpoint, got a file")
    folder = start / CHECKPOINTS if (start / CHECKPOINTS).is_dir() else start
    wanted = _under_its_name(folder / which)
    if wanted.is_dir():
        return wanted
    found = checkpoints_in(folder)
    if which == LATEST and found:  # the link was lost in a copy, or its target is gone
        return _under_its_name(found[-1])
    there = f"there are {', '.join(p.name for p in found)}" if found else "there are none"
    raise CheckpointError(f"{folder}: no checkpoint {which!r}; {there}")


def in_its_run(path: Path) -> Path:
    """Return the checkpoint for which "RUN/best", "RUN/latest" or "RUN/step_000123" stands, or the path itself."""
    inside = path.parent / CHECKPOINTS / path.name
    named = path.name in (LATEST, BEST) or _NAME.fullmatch(path.name)
    return inside if named and not path.exists() and inside.parent.is_dir() else path


def _under_its_name(path: Path) -> Path:
    """Return a checkpoint's directory under its own name, step_000123, in the folder in which it was found.

    The links `latest` and `best` are followed, also if a tool that copied the run has turned them into folders or
    files. A link with the name of a checkpoint is not followed: the checkpoint belongs to the run of the link.
    """
    if path.name in ("", ".."):
        path = path.resolve()
    path = path.parent.resolve() / path.name
    if _NAME.fullmatch(path.name) or not path.exists():
        return path
    if path.is_symlink():
        return _under_its_name(path.parent / os.readlink(path))
    if path.is_file():
        name = path.read_bytes()[:_MAX_NAME_LENGTH].decode("ascii", "replace").strip()
        return path.parent / name if _NAME.fullmatch(name) else path
    meta = path / META_FILE
    if meta.is_file():
        content = meta.read_bytes()
        for sibling in reversed(checkpoints_in(path.parent)):
            if _has_content(sibling / META_FILE, content):
                return sibling
    return path


def _has_content(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


def prune(folder: Path, keep: int, step: int, best: str | None) -> None:
    """Delete old checkpoints.

    Args:
        folder: the folder of the run's checkpoints.
        keep: number of newest checkpoints to keep.
        step: the run's step. Later checkpoints are deleted, too: the run has since started again from an earlier
            checkpoint.
        best: name of a checkpoint to keep in any case.
    """
    current = [path for path in checkpoints_in(folder) if _step_of(path) <= step]
    kept = {path.name for path in current[-keep:]} | {best}
    for path in checkpoints_in(folder):
        if path.name not in kept:
            # Renamed first, so that a kill in the middle leaves no incomplete checkpoint under its name.
            aside = folder / f"{TEMPORARY}{path.name}.old"
            os.replace(path, aside)
            remove(aside)


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _write_files(
    folder: Path,
    final: Path,
    weights: Mapping[str, Tensor],
    train_state: Mapping[str, Any],
    meta: Mapping[str, Any],
) -> None:
    # Copies: safetensors refuses channels-last tensors and tensors that share memory.
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in weights.items()}
    model = sealed_safetensors(plain, {"format": "pt"})
    files = {MODEL_FILE: _write(folder / MODEL_FILE, model, final)}
    # In memory first: on a full disk torch's own writer raises no error that names the file.
    state = io.BytesIO()
    torch.save(dict(train_state), state)
    files[STATE_FILE] = _write(folder / STATE_FILE, state.getvalue(), final)
    _write(folder / META_FILE, sealed_json({**meta, "files": files}).encode(), final)
    sync_path(folder)


def _write(path: Path, content: bytes, final: Path) -> dict[str, Any]:
    """Write a file that will lie in the folder `final`, and return its entry in the meta data."""
    write_through(path, content, final / path.name)
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def _put_in_place(temporary: Path, final: Path) -> None:
    """Rename a finished checkpoint to its name; an older checkpoint of the same step is deleted."""
    if final.exists():
        aside = temporary.with_name(f"{TEMPORARY}{final.name}.old")
        os.replace(final, aside)
        try:
            os.replace(temporary, final)
        except BaseException:
            os.replace(aside, final)
            raise
        remove(aside)
    else:
        os.replace(temporary, final)
    sync_path(final.parent)


def remove_unfinished(folder: Path) -> None:
    """Delete the files that a killed process left in a folder of checkpoints. Only one process may write there.

    A process may have been killed after it moved a checkpoint aside and before the new checkpoint of the same step
    was in its place. The older checkpoint is then put back.
    """
    latest = folder / LATEST
    if latest.is_symlink() and not latest.exists():
        name = os.readlink(latest)
        aside = folder / f"{TEMPORARY}{name}.old"
        if _NAME.fullmatch(name) and aside.is_dir():
            os.replace(aside, folder / name)
    for path in folder.glob(f"{TEMPORARY}*"):
        remove(path)


def _verify(path: Path) -> dict[str, Any]:
    """Check the meta data and the hashes of both files, and return the meta data."""
    meta = _read_meta(path)
    files = meta.get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{path / META_FILE}: has no list of files")
    for name in (MODEL_FILE, STATE_FILE):
        recorded = files.get(name)
        if not isinstance(recorded, dict):
            raise CheckpointError(f"{path / META_FILE}: does not list {name}")
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file")
        if file.stat().st_size != recorded.get("bytes"):
            raise CheckpointError(
                f"{file}: has {file.stat().st_size} bytes instead of {recorded.get('bytes')}"
            )
        if sha256_of(file) != recorded.get("sha256"):
            raise CheckpointError(f"{file}: its SHA-256 differs from the one in {META_FILE}")
    _check_place(path, meta)
    return meta


def _read_meta(path: Path) -> dict[str, Any]:
    file = path / META_FILE
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint directory")
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file, so {path.name} is not a fastadv checkpoint")
    return read_sealed(file)


def _check_place(path: Path, meta: Mapping[str, Any]) -> None:
    """Refuse a checkpoint under the name of another checkpoint, or in the directory of another run."""
    name = _NAME.fullmatch(path.name)
    if name is not None and meta.get("step") != int(name[1]):
        raise CheckpointError(
            f"{path}: is the checkpoint after step {meta.get('step')} under another name"
        )
    run_file = path.parent.parent / RUN_FILE
    if path.parent.name != CHECKPOINTS or "run" not in meta or not run_file.is_file():
        return
    try:
        run = read_sealed(run_file).get("run")
    except (OSError, CheckpointError):  # code that needs the run's description reports this
        return
    if run is not None and run != meta["run"]:
        raise CheckpointError(
            f"{path}: is a checkpoint of another run ({meta['run']}) than the one in {run_file} ({run}); take it "
            "away, or read it where it is alone"
        )


def _read(path: Path, with_state: bool) -> Checkpoint:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    meta = _verify(path)
    try:
        weights = load_file(path / MODEL_FILE)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path / MODEL_FILE}: not a safetensors file ({error})") from error
    state: dict[str, Any] = {}
    if with_state:
        try:
            state = torch.load(path / STATE_FILE, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many types for foreign files
            raise CheckpointError(f"{path / STATE_FILE}: cannot be read ({error})") from error
    return Checkpoint(path, meta, weights, state)


def pack_weights(states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join several state dicts into one: the first under its own names, the others under "name/"."""
    packed: dict[str, Tensor] = {}
    for position, (name, state) in enumerate(states.items()):
        prefix = "" if position == 0 else f"{name}/"
        for key in state:
            if "/" in key:
                raise ValueError(f"names in a state dict must not have a slash, got {key!r}")
        packed.update({f"{prefix}{key}": value for key, value in state.items()})
    return packed


def unpack_average(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the first of the packed state dicts, with the averages in place of the averaged tensors."""
    averages = (unpack_weights(weights, name) for name in ("ema", "swa"))
    return unpack_weights(weights) | next(filter(None, averages), {})


def unpack_weights(weights: Mapping[str, Tensor], name: str | None = None) -> dict[str, Tensor]:
    """Return one of the packed state dicts: the first (None), or the state dict under "name/"."""
    if name is None:
        return {key: value for key, value in weights.items() if "/" not in key}
    prefix = f"{name}/"
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
