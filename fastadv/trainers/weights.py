"""Loading trained models and teachers from a run, a checkpoint, a file or a module."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastadv.models import (
    LoadReport,
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

ROBUST = "model"  # the methods' name for the network that is attacked and evaluated

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
        model: a module into which the weights are loaded, for runs whose model was not made by name; or a name for
            `create_model`. The name is needed if the run names a function of your own, "package.module:function":
            its code runs only if you name it.
        checkpoint: the checkpoint of a run: "latest", "best" or a name such as "step_000123".
        averaged: take the average of the weights (EMA or SWA) if the checkpoint has one.
        network: which of the networks that were trained together: "model", the robust network, or "natural", which
            ACT and LBGAT train on clean images beside it. There is no average of the natural network's weights.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: if there is no such checkpoint, or it is damaged.
        ValueError: if `model` is None and the run's model has no name or is a function of your own; if the weights
            do not fit the model; or if the run has no such network.
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
        misfits = "; ".join(_misfits(model, state)) or error
        raise ValueError(f"{read.path}: does not fit {type(model).__name__}: {misfits}") from error
    return model.eval()


def _misfits(model: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """The misfits in a few words; torch's error has the name of every entry."""
    own = model.state_dict()
    both = [name for name in own if name in state and state[name].shape != own[name].shape]
    return LoadReport(
        missing=[name for name in own if name not in state],
        unexpected=[name for name in state if name not in own],
        mismatched=[
            f"{name}: {tuple(state[name].shape)}, {tuple(own[name].shape)}" for name in both
        ],
    ).misfits


def trained_beside(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the methods' names of the networks that were trained beside the robust network."""
    names = {key.partition("/")[0] for key in checkpoint.weights if "/" in key}
    return tuple(sorted(names - {"ema", "swa"}))


def _state_beside(checkpoint: Checkpoint, network: str) -> dict[str, Tensor]:
    """The weights of a network that was trained beside the robust network."""
    there = trained_beside(checkpoint)
    if network not in there:
        raise ValueError(
            f"network must be one of {', '.join((ROBUST, *there))}, which {checkpoint.path} holds, got {network!r}"
        )
    return unpack_weights(checkpoint.weights, network)


def _architecture_beside(checkpoint: Checkpoint, network: str) -> dict[str, Any]:
    """The recorded architecture of a network beside the robust network; empty if both have the same."""
    recipe = checkpoint.meta.get("recipe", {})
    name = recipe.get(network) if isinstance(recipe, dict) else None
    return {} if name is None else {"name": name, "form": _form_named(name)}


def _form_named(name: str) -> str | None:
    """The form that a network's name stands for; None for the usual form, and for networks with a single form."""
    if ":" in name:  # a network of timm, or a user's own function
        return None
    with torch.device("meta"):
        network = create_model(name)
    return None if usual_form(network) else form_of(network)


def build_model(description: dict[str, Any], path: Path, named: str | None) -> nn.Module:
    """Build the model that a run recorded, with fresh weights.

    Args:
        description: "name", "num_classes" and "in_channels".
        path: the path of the run, for messages.
        named: the name that the user gives; it is used in place of the recorded name.

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
        path: the path of the run, for messages.
        argument: the argument by which the user can give the name, for messages.

    Raises:
        ValueError: if the name stands for code.
    """
    if names_code(name):
        raise ValueError(
            f"{path}: says that its model is {name!r}, whose code runs only when you name it yourself: give "
            f"{argument}={name!r} (on the command line --{argument} {name}), if you trust that code"
        )


def load_teacher(
    source: WeightSource, like: nn.Module, architecture: str | None = None
) -> nn.Module:
    """Make a frozen model from trained weights.

    Args:
        source: a run directory (its latest checkpoint), a checkpoint directory, or a checkpoint's name in a run,
            such as "RUN/best"; a file with a state dict in any of the published wrappings; or a module, which is
            copied.
        like: a model with the architecture of the teacher, unless the source is a run that records another
            architecture. The teacher is `Normalized` as well if a file holds mean and std.
        architecture: the caller's name for the architecture of `like`. It is needed for a run that names a
            function of your own, and for a state dict that fits several architectures, which compute different
            functions.

    Returns:
        A new module, in evaluation mode, without gradients.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file or the checkpoint is damaged.
        ValueError: if the weights do not fit the model, or they fit several architectures and no name is given.
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


def published_state(path: Path) -> Any:
    """Read a file of weights as `read_state_file`; of a run's checkpoint only the weights that are evaluated."""
    state = read_state_file(path)
    if isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values()):
        return unpack_average(state)
    return state


def _load_file(path: Path, like: nn.Module, named: bool) -> nn.Module:
    """Load a state dict into a copy of a model, or into the form of it that the file records.

    The result normalises its inputs if the file holds mean and std.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file or directory; it must be a run, a checkpoint or a file with a state dict"
        )
    state, recorded = published_state(path), _recorded_form(path)
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
            f"{path}: teacher_model must be the name that the run records, {name!r}, got {given!r}"
        )


def _check_form(model: nn.Module, recorded: dict[str, Any], path: Path) -> None:
    """Refuse a model that would compute another function with a run's weights."""
    form = recorded.get("form")
    if not (usual_form(model) if form is None else form_of(model) == form):
        raise ValueError(
            f"{path}: model must be {form or next(iter(forms_of(model)))!r}, got {form_of(model)!r}, "
            "which computes another function of the same weights"
        )


def _load_run(path: Path, like: nn.Module, architecture: str | None) -> nn.Module:
    """Load the model of a run, built by the recorded name. A recorded name that stands for code is refused."""
    name = _recorded_model(load_checkpoint(path, with_state=False)).get("name")
    _check_architecture(name, architecture, path)
    named = name is not None and name == architecture
    if name is not None and not named:
        check_no_code(name, path, "teacher_model")
    return load_model(path, copy.deepcopy(like) if name is None or named else None)
