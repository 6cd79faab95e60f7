"""Trained weights from wherever they are: a run, a checkpoint, a file, a module."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastadv.models import (
    create_model,
    form_of,
    forms_of,
    in_form,
    load_published_state_dict,
    usual_form,
)
from fastadv.trainers.checkpoint import (
    LATEST,
    CheckpointError,
    find_checkpoint,
    load_checkpoint,
    unpack_average,
    unpack_weights,
)

WeightSource: TypeAlias = "str | os.PathLike[str] | nn.Module"
_FILE_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".tar")


def load_model(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    checkpoint: str = LATEST,
    averaged: bool = True,
) -> nn.Module:
    """Load the trained model of a run.

    Args:
        path: a run directory or a checkpoint.
        model: a module to fill, for runs whose model was not made by name.
        checkpoint: which one of a run: "latest", "best" or a name such as "step_000123".
        averaged: take the average of the weights (EMA or SWA) where the checkpoint has one.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: if there is no such checkpoint, or it is damaged.
        ValueError: if the run's model has no name and `model` is None, or does not fit.
    """
    read = load_checkpoint(find_checkpoint(path, checkpoint), with_state=False)
    if model is None:
        model = build_model(read.meta.get("model", {}), read.path)
    else:
        _check_form(model, read.meta.get("model", {}), read.path)
    state = (unpack_average if averaged else unpack_weights)(read.weights)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{read.path}: does not fit {type(model).__name__}: {error}") from error
    return model.eval()


def build_model(description: dict[str, Any], path: Path) -> nn.Module:
    """Build the model that a run recorded, with fresh weights.

    Args:
        description: "name", "num_classes" and "in_channels".
        path: where the description comes from, for messages.

    Raises:
        ValueError: if the model was not made by name.
    """
    name = description.get("name")
    if not name:
        kind = description.get("class", "a module of your own")
        raise ValueError(f"{path}: was trained with {kind}, not a model by name; pass model=")
    return create_model(name, description["num_classes"], description["in_channels"])


def load_teacher(
    source: WeightSource, like: nn.Module, architecture: str | None = None
) -> nn.Module:
    """Make a frozen model of given weights.

    Args:
        source: a run directory (its latest checkpoint), a checkpoint directory, a state dict in a
            `.safetensors`, `.pt` or `.pth` file, or a module, which is copied.
        like: the model to be trained; the teacher is of the same kind unless the source is a run
            that says otherwise.
        architecture: name that the caller gives the teacher's network, of which `like` then is. It is needed for a
            state dict that several networks take, which compute different functions.

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
    elif Path(source).suffix in _FILE_SUFFIXES:
        try:
            teacher = _load_file(Path(source), like, named=architecture is not None)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {error}") from error
    else:
        path = find_checkpoint(source)
        recorded = load_checkpoint(path, with_state=False).meta.get("model", {})
        _check_architecture(recorded, architecture, path)
        same = recorded.get("name") is None
        teacher = load_model(path, copy.deepcopy(like) if same else None)
    return teacher.eval().requires_grad_(False)


def _load_file(path: Path, like: nn.Module, named: bool) -> nn.Module:
    """Load a state dict into a model of the kind of another one, or of the form that the file itself says."""
    state, recorded = _read_state_dict(path), _recorded_form(path)
    other = recorded is not None and recorded != form_of(like)
    teacher = in_form(like, recorded) if other and recorded else copy.deepcopy(like)
    known = named or recorded is not None
    load_published_state_dict(teacher, state, form=form_of(teacher) if known else None)
    return teacher


def _recorded_form(path: Path) -> str | None:
    """The form that a run's copy of a frozen model records; see `fastadv.models.forms_of`."""
    if path.suffix != ".safetensors":
        return None
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("form")


def _check_architecture(recorded: dict[str, Any], given: str | None, path: Path) -> None:
    name = recorded.get("name")
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


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it must be a state dict")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return unpack_average(load_file(path))
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise many types for foreign files
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
