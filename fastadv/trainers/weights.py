"""Trained weights from wherever they are: a run, a checkpoint, a file, a module."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn

from fastadv.models import (
    Normalized,
    StateFileError,
    create_model,
    load_published_state_dict,
    names_code,
    read_state_file,
)
from fastadv.trainers.checkpoint import (
    LATEST,
    Checkpoint,
    CheckpointError,
    find_checkpoint,
    load_checkpoint,
    unpack_average,
    unpack_weights,
)

WeightSource: TypeAlias = "str | os.PathLike[str] | nn.Module"


def load_model(
    path: str | os.PathLike[str],
    model: nn.Module | str | None = None,
    *,
    checkpoint: str = LATEST,
    averaged: bool = True,
) -> nn.Module:
    """Load the trained model of a run.

    Args:
        path: a run directory or a checkpoint.
        model: a module to fill, for runs whose model was not made by name; or a name for `create_model`, which is
            needed where the run names a function of your own, "package.module:function": its code runs only when
            you name it.
        checkpoint: which one of a run: "latest", "best" or a name such as "step_000123".
        averaged: take the average of the weights (EMA or SWA) where the checkpoint has one.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: if there is no such checkpoint, or it is damaged.
        ValueError: if the run's model has no name, or that of a function of your own, and `model` is None; or if
            it does not fit.
    """
    read = load_checkpoint(find_checkpoint(path, checkpoint), with_state=False)
    if not isinstance(model, nn.Module):
        model = build_model(_recorded_model(read), read.path, model)
    state = (unpack_average if averaged else unpack_weights)(read.weights)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{read.path}: does not fit {type(model).__name__}: {error}") from error
    return model.eval()


def build_model(description: dict[str, Any], path: Path, named: str | None = None) -> nn.Module:
    """Build the model that a run recorded, with fresh weights.

    Args:
        description: "name", "num_classes" and "in_channels".
        path: where the description comes from, for messages.
        named: the name that the user gives, which counts before the recorded one.

    Raises:
        ValueError: if the model was not made by name, or its name stands for code and the user does not give it.
        CheckpointError: if the description is none.
    """
    name = description.get("name") if named is None else named
    if not name:
        kind = description.get("class", "a module of your own")
        raise ValueError(f"{path}: was trained with {kind}, not a model by name; pass model=")
    if named is None:
        check_no_code(name, path)
    classes, channels = (description.get(key) for key in ("num_classes", "in_channels"))
    if not (isinstance(name, str) and isinstance(classes, int) and isinstance(channels, int)):
        raise CheckpointError(f"{path}: does not say which model it is of: {description}")
    return create_model(name, classes, channels)


def _recorded_model(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint says of its model."""
    recorded = checkpoint.meta.get("model", {})
    if not isinstance(recorded, dict):
        raise CheckpointError(f"{checkpoint.path}: does not say which model it is of: {recorded!r}")
    return recorded


def check_no_code(name: Any, path: str | os.PathLike[str], argument: str = "model") -> None:
    """Refuse to build a model by a recorded name that stands for code.

    Args:
        name: what a run says its model is.
        path: where it says so.
        argument: by which the user can give the name.

    Raises:
        ValueError: if it stands for code.
    """
    if names_code(name):
        raise ValueError(
            f"{path}: says that its model is {name!r}, whose code runs only when you name it yourself: give "
            f"{argument}={name!r} (on the command line --{argument} {name}), if you trust that code"
        )


def load_teacher(
    source: WeightSource, like: nn.Module, architecture: str | None = None
) -> nn.Module:
    """Make a frozen model of given weights.

    Args:
        source: a run directory (its latest checkpoint), a checkpoint directory, a file with a state dict in any of
            the published wrappings, or a module, which is copied.
        like: the model to be trained; the teacher is of the same kind unless the source is a run
            that says otherwise. It is `Normalized` as well where a file holds mean and std.
        architecture: name that the caller gives the teacher's network, of which `like` then is. It is needed for a
            run that names a function of your own.

    Returns:
        A module of its own, in evaluation mode, without gradients.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is damaged.
        ValueError: if the weights do not fit the model.
    """
    if isinstance(source, nn.Module):
        teacher = copy.deepcopy(source)
    elif Path(source).is_file() or not Path(source).exists():
        try:
            teacher = _load_file(Path(source), like)
        except StateFileError as error:
            raise CheckpointError(str(error)) from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {error}") from error
    else:
        teacher = _load_run(find_checkpoint(source), like, architecture)
    return teacher.eval().requires_grad_(False)


def _load_file(path: Path, like: nn.Module) -> nn.Module:
    """Load a state dict into a model like another one, which normalises its inputs if the file says how."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file or directory; it must be a run, a checkpoint or a file with a state dict"
        )
    state = read_state_file(path)
    if isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values()):
        state = unpack_average(state)  # of a run's checkpoint
    teacher = copy.deepcopy(like)
    if isinstance(teacher, Normalized):
        load_published_state_dict(teacher, state)
        return teacher
    normalized = Normalized(teacher)
    report = load_published_state_dict(normalized, state)
    return normalized if report.normalizes else teacher


def _load_run(path: Path, like: nn.Module, architecture: str | None) -> nn.Module:
    """Load the model of a run, built as the run says unless that would run code of its choosing."""
    name = _recorded_model(load_checkpoint(path, with_state=False)).get("name")
    named = name is not None and name == architecture
    if name is not None and not named:
        check_no_code(name, path, "teacher_model")
    return load_model(path, copy.deepcopy(like) if name is None or named else None)
