"""The frozen models of a method: their names, and a model with the architecture of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import nn

from fastadv.data import ImageData, StreamedData
from fastadv.models import create_model
from fastadv.trainers.methods import MethodClass
from fastadv.trainers.recipe import Recipe
from fastadv.trainers.weights import WeightSource

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
