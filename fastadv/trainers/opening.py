"""Opening a run: its description, its directory, and the checkpoint from which it goes on."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

import fastadv
from fastadv.data import ImageData, StreamedData
from fastadv.data.lazy import known_labels
from fastadv.digest import digest_of
from fastadv.models import form_of, usual_form
from fastadv.ranks import Ranks
from fastadv.trainers.checkpoint import (
    LATEST,
    STATE_FILE,
    Checkpoint,
    CheckpointError,
    checkpoints_in,
    find_checkpoint,
    load_checkpoint,
)
from fastadv.trainers.loop import Loop
from fastadv.trainers.plain_recipe import differences
from fastadv.trainers.run_directory import Description, RunDirectory

Images: TypeAlias = ImageData | StreamedData


def describe_model(model: nn.Module, name: str | None, data: Images) -> dict[str, Any]:
    """Return the facts about a model by which a resumed run recognises it."""
    description = {
        "name": name,
        "class": type(model).__name__,
        "num_classes": data.num_classes,
        "in_channels": data.in_channels,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    return description if usual_form(model) else {**description, "form": form_of(model)}


def describe_data(train: Images, extra: ImageData | None = None) -> dict[str, Any]:
    """Return the facts about the training images by which a resumed run recognises them."""
    if isinstance(train, StreamedData):
        facts = {"name": train.name, "images": len(train), "size": list(train.image_shape)}
        labels, listing = known_labels(train.dataset), getattr(train.dataset, "listing", None)
        if labels is not None:
            facts["labels"] = digest_of({"labels": labels})
        return facts | ({"files": str(listing())} if callable(listing) else {})
    description = {
        "name": train.name,
        "images": len(train),
        "size": list(train.images.shape[1:]),
        "labels": digest_of({"labels": train.labels}),
        "pixels": digest_of({"images": train.images}),
    }
    return description if extra is None else {**description, "extra": describe_data(extra)}


def open_run(
    run: RunDirectory,
    description: Description,
    defaults: Mapping[str, Any],
    source: Mapping[str, Any],
    teachers: Mapping[str, nn.Module],
    resume: bool | str,
    overwrite: bool,
    allow_changes: bool,
    ranks: Ranks,
    facts: Mapping[str, Any],
) -> Checkpoint | None:
    """Lock the run directory, write the run's description, and return the checkpoint to go on from, if any.

    Args:
        run: the run directory.
        description: the description of the run.
        defaults: the recipe's defaults, for runs that were recorded before a number existed.
        source: where the images come from, to be recorded.
        teachers: the frozen models by name, whose weights are copied into the directory.
        resume: whether to go on with an existing run, or the name of the checkpoint to go on from.
        overwrite: whether to delete an existing run.
        allow_changes: whether the existing run may differ from the description.
        ranks: the processes that train together; only the first writes.
        facts: further facts to record.
    """
    if ranks.first:
        run.take()
        run.check_free(bool(resume), overwrite)  # again, now that no other process can write there
    start: Checkpoint | None = None
    clear = run.exists and overwrite
    if run.exists and not clear:
        if not allow_changes:
            run.check_same(description, defaults)
        if isinstance(resume, str) or checkpoints_in(run.checkpoints):
            which = resume if isinstance(resume, str) else LATEST
            start = load_checkpoint(find_checkpoint(run.path, which))
    ranks.wait()  # until all have read the files of the run
    if not ranks.first:
        return start
    if clear:
        run.clear()
    run.begin(description, {"source": dict(source), **facts})
    for name, teacher in teachers.items():
        run.save_teacher(name, teacher)
    return start


def restore(loop: Loop, start: Checkpoint) -> None:
    """Load the state of a checkpoint into the loop.

    Raises:
        CheckpointError: if the state does not fit, for example because the recipe has changed, or another version
            wrote it.
    """
    try:
        loop.restore(start)
    except torch.OutOfMemoryError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        changed = _changed_since(start, loop)
        if changed:
            raise CheckpointError(
                f"{start.path / STATE_FILE}: its state does not fit a run with these changes: "
                f"{'; '.join(changed)} ({type(error).__name__}: {error}). Go on without them, or begin a new run"
            ) from error
        writer = start.meta.get("versions", {}).get("fastadv", "of an unknown version")
        raise CheckpointError(
            f"{start.path / STATE_FILE}: its state, written by fastadv {writer}, is not one that fastadv "
            f"{fastadv.__version__} can go on with ({type(error).__name__}: {error}). Go on with the version that "
            "wrote it, or begin a new run"
        ) from error


def _changed_since(start: Checkpoint, loop: Loop) -> list[str]:
    """What the caller has changed of the recipe and the model since a checkpoint: "name: old -> new" each."""
    changed = []
    for part in ("recipe", "model"):
        old, new = start.meta.get(part), loop.meta[part]
        if isinstance(old, dict):  # what an older version has not recorded is no change
            changed += differences(old, {name: new[name] for name in old if name in new})
    return changed


def versions() -> dict[str, str]:
    """Return the versions of the software that computes a run."""
    return {
        "fastadv": fastadv.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
