"""Checks of the types of the arguments of `train`."""

from __future__ import annotations

import os

from torch import nn

from fastadv.data import ImageData, Splits, StreamedData
from fastadv.ops.values import with_article
from fastadv.trainers.methods import MethodClass
from fastadv.trainers.recipe import Recipe
from fastadv.trainers.settings import Settings


def check_kinds(
    data: object,
    root: object,
    model: object,
    run_dir: object,
    extra: object,
    settings: object,
    on_start: object,
    on_step: object,
) -> None:
    """Check the types of the arguments that are neither numbers nor switches.

    Raises:
        TypeError: if an argument has a wrong type; the message names the first.
        ValueError: if the run directory is an empty path, or the folder of a data set comes without its name.
    """
    if isinstance(data, ImageData | StreamedData) or not isinstance(data, Splits | str):
        raise TypeError(
            "data must be Splits(train=..., test=...) of ImageData, or the name of a data set, got "
            f"{type(data).__name__}; from_tensors makes ImageData of tensors"
        )
    if isinstance(data, Splits):
        _check_splits(data)
    if not isinstance(model, nn.Module | str):
        hint = "; call it to make the module" if callable(model) else ""
        raise TypeError(f"model must be a module or a name, got {type(model).__name__}{hint}")
    if not isinstance(run_dir, str | os.PathLike):
        raise TypeError(f"run_dir must be the path of a directory, got {run_dir!r}")
    if not os.fspath(run_dir):  # for example a shell variable that is not set
        raise ValueError("run_dir must be the path of a directory, got ''")
    if not isinstance(extra, ImageData | None):
        raise TypeError(f"extra must be ImageData, got {type(extra).__name__}; see from_tensors")
    if not isinstance(settings, Settings | None):
        raise TypeError(f"settings must be Settings(...), got {type(settings).__name__}")
    for name, function in (("on_start", on_start), ("on_step", on_step)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function, got {function!r}")
    if root is not None and not isinstance(data, str):
        raise ValueError(
            f"root must be left out with Splits, which hold their images, got {root!r}"
        )


def _check_splits(data: Splits) -> None:
    if not isinstance(data.train, ImageData | StreamedData):
        raise TypeError(
            f"train of data must be ImageData or StreamedData, got {type(data.train).__name__}; from_tensors "
            "makes ImageData of tensors"
        )
    if not isinstance(data.test, ImageData):
        raise TypeError(
            f"test of data must be ImageData, got {type(data.test).__name__}; from_dataset reads a Dataset into "
            "memory"
        )


def checked_recipe(method: MethodClass, recipe: Recipe | None) -> Recipe:
    """Return the recipe, or the method's own recipe if there is no recipe.

    Raises:
        TypeError: if the recipe belongs to another method.
    """
    if recipe is None:
        return method.recipe_class()
    if not isinstance(recipe, method.recipe_class):
        raise TypeError(
            f"recipe of {method.name} must be {with_article(method.recipe_class.__name__)}, "
            f"got {type(recipe).__name__}"
        )
    return recipe
