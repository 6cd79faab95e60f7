"""One item of a torch Dataset as an image and a label, with checks whose messages give its index."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastadv.data.errors import DataFormatError
from fastadv.data.images import check_channels_first, item_image, item_label

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")


def read_item(dataset: Any, index: int, bounds: tuple[float, float]) -> tuple[Tensor, int]:
    """Read an image and its label.

    Args:
        dataset: a map-style Dataset of pairs (image, label), or of dicts with the keys `IMAGE_COLUMNS` and
            `LABEL_COLUMNS`. An image is a tensor or floating-point array [C, H, W], or a PIL image or uint8 array
            [H, W] or [H, W, C].
        index: the item's index.
        bounds: smallest and largest value of a floating-point image.

    Returns:
        The image, uint8 or float32 and contiguous on the CPU, and the label.

    Raises:
        DataFormatError: if the dataset raises it, because a file is damaged.
        RuntimeError: if the dataset raises another exception.
        TypeError: if the item is of another kind.
        ValueError: if its image has the channels last, or values out of bounds, or its label is no class index.
    """
    try:
        item = dataset[index]
    except DataFormatError:
        raise
    except Exception as error:
        raise RuntimeError(
            f"item {index} of data cannot be read: {type(error).__name__}: {error}"
        ) from error
    image, label = _pair(item, index)
    try:
        return _pixels(image, bounds), _class(label, index)
    except (TypeError, ValueError) as error:
        raise type(error)(f"item {index} of data: {error}") from error


def column(names: Any, known: tuple[str, ...]) -> str | None:
    """The first of the known names that is among ``names``; None if there is none of them."""
    return next((name for name in known if name in names), None)


def _pair(item: Any, index: int) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        image, label = column(item, IMAGE_COLUMNS), column(item, LABEL_COLUMNS)
        if image is not None and label is not None:
            return item[image], item[label]
        found = f"a dict with {', '.join(map(str, item))}"
    elif isinstance(item, tuple | list):
        if len(item) == 2:
            return item[0], item[1]
        found = f"a {type(item).__name__} of {len(item)}"
    else:
        found = type(item).__name__
    raise TypeError(
        f"item {index} of data must be a pair (image, label), or a dict with {' or '.join(IMAGE_COLUMNS)} and "
        f"{' or '.join(LABEL_COLUMNS)}, got {found}"
    )


def _pixels(image: Any, bounds: tuple[float, float]) -> Tensor:
    if isinstance(image, np.ndarray) and image.dtype.kind == "f":
        image = torch.from_numpy(image)  # as the default collate function takes it
    pixels = item_image(image).detach().cpu()
    if pixels.dim() == 0 or pixels.numel() == 0:
        raise ValueError(f"an image must be [C, H, W], got shape {tuple(pixels.shape)}")
    check_channels_first("an image", tuple(pixels.shape))
    if pixels.dtype == torch.uint8:
        return pixels.contiguous()
    if not pixels.is_floating_point():
        raise TypeError(f"an image must be uint8 or floating point, got {pixels.dtype}")
    low, high = (float(value) for value in torch.aminmax(pixels))
    if not (low >= bounds[0] and high <= bounds[1]):  # written so that NaN fails too
        raise ValueError(
            f"an image must lie within bounds {bounds}, got values from {low} to {high}; leave a normalisation to "
            "the model"
        )
    return pixels.to(torch.float32).contiguous()


def _class(label: Any, index: int) -> int:
    found = item_label(label, index)
    if found < 0:
        raise ValueError(f"a label must be >= 0, got {found}")
    return found
