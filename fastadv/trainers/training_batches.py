"""Building the training batches of a run, and choosing the images for its validation."""

from __future__ import annotations

from typing import Any

import torch

from fastadv.data import (
    Batches,
    ImageData,
    Loader,
    Splits,
    StreamedData,
    StreamLoader,
    split_validation,
    subset,
)
from fastadv.ranks import Ranks
from fastadv.trainers.recipe import Recipe


def build_loader(
    splits: Splits,
    extra: ImageData | None,
    recipe: Recipe,
    device: torch.device,
    ranks: Ranks,
) -> tuple[Batches, ImageData]:
    """Return the training batches, and the images for validation: the held-out training images or the test images.

    Raises:
        ValueError: if a number of the recipe does not fit the data.
    """
    training, watched = splits.train, splits.test
    common: dict[str, Any] = {
        "seed": recipe.seed,
        "device": device,
        "channels_last": recipe.channels_last,
        "rank": ranks.rank,
        "world_size": ranks.world_size,
    }
    if isinstance(training, StreamedData):
        _check_streamed(recipe, extra, training.supports)
        return StreamLoader(training, recipe.batch_size, **common), watched
    if recipe.holdout:
        if recipe.holdout >= len(training):
            raise ValueError(
                f"holdout must be < {len(training)}, the training images there, got {recipe.holdout}"
            )
        training, watched = split_validation(training, recipe.holdout, recipe.seed)
    if recipe.train_images is not None:
        training = _some_of(training, recipe.train_images, recipe.seed)
    loader = Loader(
        training,
        recipe.batch_size,
        train=True,
        pad=recipe.pad,
        mode=recipe.pad_mode,
        flip=recipe.flip,
        extra=extra,
        extra_fraction=recipe.extra_fraction,
        **common,
    )
    return loader, watched


def _check_streamed(recipe: Recipe, extra: ImageData | None, supported: frozenset[str]) -> None:
    """Refuse options that need all images in memory."""
    if extra is not None:
        raise ValueError(
            f"extra must be None with StreamedData, got {len(extra)} images of {extra.name!r}: let the "
            "dataset hold all images"
        )
    wanted = {"pad": 0, "flip": False, "holdout": 0, "train_images": None, "extra_fraction": 0}
    for name, value in wanted.items():
        if name not in supported and getattr(recipe, name) != value:
            raise ValueError(
                f"{name} must be {value} with StreamedData, whose dataset chooses and augments all "
                f"images itself, got {getattr(recipe, name)}"
            )


def _some_of(training: ImageData, count: int, seed: int) -> ImageData:
    if count > len(training):
        raise ValueError(f"train_images must be <= {len(training)}, the images there, got {count}")
    return subset(training, count, seed)
