"""The frozen models of a method: their names, a model with the architecture of each, and loading their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import nn

from fastadv.data import ImageData, StreamedData
from fastadv.models import create_model
from fastadv.trainers.methods import MethodClass
from fastadv.trainers.recipe import Recipe
from fastadv.trainers.run_directory import RunDirectory
from fastadv.trainers.weights import WeightSource, load_teacher

Teachers: TypeAlias = "WeightSource | Mapping[str, WeightSource] | Sequence[WeightSource] | None"
Architectures: TypeAlias = "str | Mapping[str, str] | Sequence[str] | None"
# By the teacher's name: a model with its architecture, and the name that the caller gives this architecture.
Templates: TypeAlias = dict[str, tuple[nn.Module, "str | None"]]


def teacher_templates(
    method: MethodClass,
    recipe: Recipe,
    named: Architectures,
    network: nn.Module,
    data: ImageData | StreamedData,
) -> Templates:
    """Return, for each frozen model that the method needs, a model with its architecture, and its name or None.

    Args:
        method: the training method.
        recipe: the method's recipe.
        named: names of the architectures as the caller gives them, the argument `teacher_model` of `train`.
        network: the model to be trained, whose architecture a teacher has by default.
        data: the training images, for the numbers of classes and channels.

    Raises:
        ValueError: if a name is unknown, or belongs to no frozen model.
    """
    needed = method.teachers_for(recipe, network)
    if named is None:
        return {name: (template, None) for name, template in needed.items()}
    names = dict.fromkeys(needed, named) if isinstance(named, str) else by_name(named, list(needed))
    unknown = sorted(names.keys() - needed.keys())
    if unknown or not needed:
        takes = f"name {', '.join(needed)}" if needed else "be None without frozen models"
        raise ValueError(f"teacher_model must {takes} for {method.name}, got {named!r}")
    templates: Templates = {}
    for name, template in needed.items():
        architecture = names.get(name)
        if architecture is not None:
            template = named_model("teacher_model", architecture, data)
        templates[name] = template, architecture
    return templates


def load_teachers(
    method: MethodClass, needed: Templates, given: Teachers, resumed: RunDirectory | None
) -> dict[str, nn.Module]:
    """Load the frozen models that the method needs, from the caller's sources or from the resumed run.

    Args:
        method: the training method.
        needed: for each frozen model a model with its architecture; the result of `teacher_templates`.
        given: the caller's sources, the argument `teacher` of `train`.
        resumed: the run that is resumed, which has copies; None for a new run.

    Raises:
        ValueError: if a source is missing, is not taken by the method, or does not fit.
        CheckpointError: if a checkpoint cannot be read.
    """
    sources = by_name(given, list(needed))
    unknown = sorted(sources.keys() - needed.keys())
    if unknown:
        takes = f"only {', '.join(needed)}" if needed else "no frozen model"
        raise ValueError(f"{method.name} with this recipe takes {takes}, got {', '.join(unknown)}")
    for name in needed:
        if name not in sources and resumed is not None and resumed.teacher_file(name).is_file():
            sources[name] = resumed.teacher_file(name)
        if name not in sources:
            raise ValueError(
                f"{method.name} needs a {name}: the run directory, checkpoint, state-dict file or "
                "module of a trained model, got None"
            )
    try:
        return {name: load_teacher(sources[name], *like) for name, like in needed.items()}
    except ValueError as error:
        if given is not None or resumed is None:
            raise
        raise ValueError(
            f"{error}; if it is of another kind than the model, give teacher again"
        ) from error


def named_model(argument: str, name: str, data: ImageData | StreamedData) -> nn.Module:
    """Build a model by its name; messages name the argument that gives it."""
    try:
        return create_model(name, data.num_classes, data.in_channels)
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from error


def by_name(given: Teachers | Architectures, names: list[str]) -> dict[str, Any]:
    """Return the caller's values by name. A list gets the names in their order, a single value the first name."""
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return dict(given)
    several: list[Any] = list(given) if isinstance(given, list | tuple) else [given]
    # Names for values that are too many; `train` refuses them by these names.
    more = [f"teacher_{i}" for i in range(len(names) + 1, len(several) + 1)]
    return dict(zip(names + more if names else ["teacher"], several, strict=False))
