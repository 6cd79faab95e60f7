"""Building the models of a run and its method, on the run's device and in its memory layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fastadv.data import Splits
from fastadv.models import create_model
from fastadv.ranks import Ranks
from fastadv.seeding import derive_seed
from fastadv.trainers.classes import check_classes
from fastadv.trainers.distributed import with_synced_norms
from fastadv.trainers.hardware import autocast_dtype
from fastadv.trainers.method import Method, Runtime
from fastadv.trainers.methods import MethodClass
from fastadv.trainers.opening import Images
from fastadv.trainers.phases import PhaseTimer
from fastadv.trainers.recipe import Recipe


def build_model(
    model: nn.Module | str, data: Images, recipe: Recipe, device: torch.device
) -> nn.Module:
    """Build the model of a run by its name, or take a module, on the device and in the memory layout of the run.

    Args:
        model: a name for `create_model`, whose weights then follow from the recipe's seed; or the module.
        data: the training images, for the numbers of classes and channels.
        recipe: the method's recipe.
        device: the device of the run.
    """
    if isinstance(model, str):
        torch.manual_seed(derive_seed(recipe.seed, "init"))
        model = create_model(model, data.num_classes, data.in_channels)
    return _on_device(model, recipe, device)


def build_method(
    method: MethodClass,
    recipe: Recipe,
    model: nn.Module,
    name: str | None,
    teachers: Mapping[str, nn.Module],
    splits: Splits,
    device: torch.device,
    ranks: Ranks,
) -> Method[Any, Any]:
    """Build the method of a run with its models.

    Args:
        method: the training method.
        recipe: the method's recipe.
        model: the model to be trained, on the device.
        name: the model's name for `create_model`; None for a module.
        teachers: the frozen models by name, which are moved to the device.
        splits: the training and test images.
        device: the device of the run.
        ranks: the processes that train together.

    Raises:
        ValueError: if the model has fewer classes than the data, or the method refuses a number of the recipe.
    """
    dtype, timer = autocast_dtype(recipe.precision, device), PhaseTimer(device)
    check_classes(model, splits, device, dtype)
    builder = _model_builder(method, splits.train, recipe, device, ranks)
    runtime = Runtime(device, dtype, timer, ranks, builder, name)
    frozen = {key: _on_device(one, recipe, device) for key, one in teachers.items()}
    return method(recipe, model, runtime, frozen)


def _model_builder(
    method: MethodClass, data: Images, recipe: Recipe, device: torch.device, ranks: Ranks
) -> Callable[[str], nn.Module]:
    """Return a function that builds further models by name, on the run's device and in its memory layout."""

    def build(name: str) -> nn.Module:
        model = _on_device(create_model(name, data.num_classes, data.in_channels), recipe, device)
        if not recipe.sync_bn:
            return model
        return with_synced_norms(model, ranks, method.differentiates_twice)

    return build


def _on_device(model: nn.Module, recipe: Recipe, device: torch.device) -> nn.Module:
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    return model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
