"""Trained weights from wherever they are: a run, a checkpoint, a file, a module."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastadv.models import (
    Normalized,
    StateFileError,
    check_form_named,
    create_model,
    form_of,
    forms_of,
    in_form,
    load_published_state_dict,
    names_code,
    read_state_file,
    usual_form,
)
from fastadv.trainers.checkpoint import (
    LATEST,
    Checkpoint,
    CheckpointError,
    find_checkpoint,
    in_its_run,
    load_checkpoint,
    unpack_average,
    unpack_weights,
)

ROBUST = "model"  # the methods' name of the network that is attacked and evaluated

WeightSource: TypeAlias = "str | os.PathLike[str] | nn.Module"


def load_model(
    path: str | os.PathLike[str],
    model: nn.Module | str | None = None,
    *,
    checkpoint: str = LATEST,
    averaged: bool = True,
    network: str = ROBUST,
) -> nn.Module:
    """Load the trained model of a run.

    Args:
        path: a run directory or a checkpoint.
        model: a module to fill, for runs whose model was not made by name; or a name for `create_model`, which is
            needed where the run names a function of your own, "package.module:function": its code runs only when
            you name it.
        checkpoint: which one of a run: "latest", "best" or a name such as "step_000123".
        averaged: take the average of the weights (EMA or SWA) where the checkpoint has one.
        network: which of the networks that were trained together: "model", the robust one, or "natural", the one
            of clean images beside it in ACT and LBGAT, of whose weights there is no average.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: if there is no such checkpoint, or it is damaged.
        ValueError: if the run's model has no name, or the name of your own function, and `model` is None; if it
            does not fit; or if the run has no such network.
    """
    read = load_checkpoint(find_checkpoint(path, checkpoint), with_state=False)
    recorded = _recorded_model(read)
    if network == ROBUST:
        state = (unpack_average if averaged else unpack_weights)(read.weights)
    else:
        state = _state_beside(read, network)
        recorded = {**recorded, **_architecture_beside(read, network)}
    if not isinstance(model, nn.Module):
        model = build_model(recorded, read.path, model)
    _check_form(model, recorded, read.path)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{read.path}: does not fit {type(model).__name__}: {error}") from error
    return model.eval()


def trained_beside(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the names of the networks that were trained beside the robust one, as methods call them."""
    names = {key.partition("/")[0] for key in checkpoint.weights if "/" in key}
    return tuple(sorted(names - {"ema", "swa"}))


def _state_beside(checkpoint: Checkpoint, network: str) -> dict[str, Tensor]:
    """The weights of a network that was trained beside the robust one."""
    there = trained_beside(checkpoint)
    if network not in there:
        raise ValueError(
            f"network must be one of {', '.join((ROBUST, *there))}, which {checkpoint.path} holds, got {network!r}"
        )
    return unpack_weights(checkpoint.weights, network)


def _architecture_beside(checkpoint: Checkpoint, network: str) -> dict[str, Any]:
    """The record of a network beside the robust one; empty where it is of the robust one's kind."""
    recipe = checkpoint.meta.get("recipe", {})
    name = recipe.get(network) if isinstance(recipe, dict) else None
    return {} if name is None else {"name": name, "form": _form_named(name)}


def _form_named(name: str) -> str | None:
    """The form that a network's name stands for; None for the usual one, and where there is one alone."""
    if ":" in name:  # of timm, or code of others
        return None
    with torch.device("meta"):
        network = create_model(name)
    return None if usual_form(network) else form_of(network)


def build_model(description: dict[str, Any], path: Path, named: str | None = None) -> nn.Module:
    """Build the model that a run recorded, with fresh weights.

    Args:
        description: "name", "num_classes" and "in_channels".
        path: where the description comes from, for messages.
        named: the name that the user gives, which counts before the recorded one.

    Raises:
        ValueError: if the model was not made by name, or its name stands for code and the user does not give it.
        CheckpointError: if the description is damaged.
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
    """A checkpoint's description of its model."""
    recorded = checkpoint.meta.get("model", {})
    if not isinstance(recorded, dict):
        raise CheckpointError(f"{checkpoint.path}: does not say which model it is of: {recorded!r}")
    return recorded


def check_no_code(name: Any, path: str | os.PathLike[str], argument: str = "model") -> None:
    """Refuse to build a model by a recorded name that stands for code.

    Args:
        name: the name of the model in a run.
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
        source: a run directory (its latest checkpoint), a checkpoint directory, or its name in a run ("RUN/best",
            where the paper stops early); a file with a state dict in any of the published wrappings; or a module,
            which is copied.
        like: the model to be trained; the teacher is of the same kind unless the source is a run
            that says otherwise. It is `Normalized` as well where a file holds mean and std.
        architecture: name that the caller gives the teacher's network, of which `like` then is. It is needed for a
            run that names a function of your own, and for a state dict that several networks take, which compute
            different functions.

    Returns:
        A module of its own, in evaluation mode, without gradients.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is damaged.
        ValueError: if the weights do not fit the model, or it is not said of which network they are.
    """
    if isinstance(source, nn.Module):
        if architecture is not None:
            raise ValueError(f"teacher_model must be None for a module, got {architecture!r}")
        teacher = copy.deepcopy(source)
    elif Path(source).is_file() or not in_its_run(Path(source)).exists():
        try:
            teacher = _load_file(Path(source), like, named=architecture is not None)
        except StateFileError as error:
            raise CheckpointError(str(error)) from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {error}") from error
    else:
        teacher = _load_run(find_checkpoint(source), like, architecture)
    return teacher.eval().requires_grad_(False)


def _load_file(path: Path, like: nn.Module, named: bool) -> nn.Module:
    """Load a state dict into a model of the kind of another one, or of the form that the file itself says.

    It normalises its inputs if the file says how.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file or directory; it must be a run, a checkpoint or a file with a state dict"
        )
    state, recorded = read_state_file(path), _recorded_form(path)
    if isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values()):
        state = unpack_average(state)  # of a run's checkpoint
    other = recorded is not None and recorded != form_of(like)
    teacher = in_form(like, recorded) if other and recorded else copy.deepcopy(like)
    normalized = teacher if isinstance(teacher, Normalized) else Normalized(teacher)
    report = load_published_state_dict(normalized, state, form=form_of(teacher))
    if not named and recorded is None:
        check_form_named(teacher, None)
    return normalized if report.normalizes else teacher


def _recorded_form(path: Path) -> str | None:
    """The form that a run's copy of a frozen model records; see `fastadv.models.forms_of`."""
    if path.suffix != ".safetensors":
        return None
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("form")


def _check_architecture(name: str | None, given: str | None, path: Path) -> None:
    if given is not None and given.lower().replace("-", "_") != str(name).lower().replace("-", "_"):
        raise ValueError(
            f"{path}: teacher_model must be what the run says, {name!r}, got {given!r}"
        )


def _check_form(model: nn.Module, recorded: dict[str, Any], path: Path) -> None:
    """Refuse a model that would compute something else of a run's weights."""
    form = recorded.get("form")
    if not (usual_form(model) if form is None else form_of(model) == form):
        raise ValueError(
            f"{path}: model must be {form or next(iter(forms_of(model)))!r}, got {form_of(model)!r}, "
            "which computes another function of the same weights"
        )


def _load_run(path: Path, like: nn.Module, architecture: str | None) -> nn.Module:
    """Load the model of a run, built as the run says unless that would run code of its choosing."""
    name = _recorded_model(load_checkpoint(path, with_state=False)).get("name")
    _check_architecture(name, architecture, path)
    named = name is not None and name == architecture
    if name is not None and not named:
        check_no_code(name, path, "teacher_model")
    return load_model(path, copy.deepcopy(like) if name is None or named else None)
