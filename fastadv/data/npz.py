"""Labelled images in a NumPy archive, as synthetic images are commonly published."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastadv.data.errors import DataFormatError
from fastadv.data.images import ImageData, from_tensors, has_channels_at
from fastadv.files import read_npz


def load_npz(path: str | os.PathLike[str], num_classes: int | None = None) -> ImageData:
    """Read labelled images from an archive with the arrays `image` and `label`.

    Args:
        path: a .npz file; `image` is uint8 [N, H, W, C], `label` integers [N].
        num_classes: number of classes; by default the largest label + 1.

    Returns:
        The images as [N, C, H, W].

    Raises:
        FileNotFoundError: if there is no such file.
        DataFormatError: if it is no such archive; the message names the file and the reason.
    """
    try:
        images, labels = read_npz(path, ("image", "label")).values()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path}: no such file; it must be a .npz archive with the arrays image and label"
        ) from error
    except Exception as error:  # a damaged archive can raise nearly anything
        raise DataFormatError(
            f"{path}: not a .npz archive with the arrays image and label, or damaged "
            f"({type(error).__name__}: {error}); download or write it again"
        ) from error
    return labelled_images(path, images, labels, num_classes)


def labelled_images(
    path: str | os.PathLike[str],
    images: NDArray[Any],
    labels: NDArray[Any],
    num_classes: int | None,
    name: str = "image",
) -> ImageData:
    """Check the arrays of a file, and make images of them.

    Args:
        path: the file, for messages and as the name of the images.
        images: uint8 [N, H, W, C].
        labels: integers [N].
        num_classes: number of classes; by default the largest label + 1.
        name: the name of the images in the file.

    Raises:
        DataFormatError: if an array has another dtype or shape, or a label is out of range.
    """
    if images.dtype != np.uint8 or images.ndim != 4:
        raise DataFormatError(
            f"{path}: {name} must be uint8 [N, H, W, C], got {images.dtype} {list(images.shape)}"
        )
    if has_channels_at(0, images.shape[1:]):
        raise DataFormatError(
            f"{path}: {name} must be [N, H, W, C], got {list(images.shape)}, which looks like [N, C, H, W]"
        )
    if labels.dtype.kind not in "biuf":
        raise DataFormatError(f"{path}: labels must be integers, got {labels.dtype}")
    try:
        # A copy, as arrays of a pickle are read-only.
        pixels = torch.from_numpy(np.array(images.transpose(0, 3, 1, 2), order="C"))
        if labels.dtype.kind in "iu":  # of any size and byte order
            labels = labels.astype(np.int64)
        return from_tensors(pixels, torch.from_numpy(labels), num_classes, os.path.basename(path))
    except (TypeError, ValueError) as error:
        raise DataFormatError(f"{path}: {error}") from error
