"""Pseudo-labelled images in a pickle, as the authors of robust self-training published them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from fastadv.data.array_pickle import PickleContentError, read_arrays
from fastadv.data.errors import DataFormatError
from fastadv.data.images import ImageData
from fastadv.data.npz import labelled_images, load_npz

_IMAGES, _LABELS = "data", "extrapolated_targets"
_PICKLES = (".pickle", ".pkl")


def load_extra(path: str | os.PathLike[str], num_classes: int | None = None) -> ImageData:
    """Read further images for training.

    Args:
        path: a file for `load_pseudo_labels` if it ends in .pickle or .pkl, else one for `load_npz`.
        num_classes: number of classes; by default the largest label + 1.

    Returns:
        The images as uint8 [N, C, H, W], and their labels [N].

    Raises:
        FileNotFoundError: if there is no such file.
        DataFormatError: if it is of another form; the message names the file and the reason.
    """
    if Path(path).suffix.lower() in _PICKLES:
        return load_pseudo_labels(path, num_classes)
    return load_npz(path, num_classes)


def load_pseudo_labels(path: str | os.PathLike[str], num_classes: int | None = None) -> ImageData:
    """Read the pickle of a dict with the arrays `data` and `extrapolated_targets`, without running code from it.

    The published file is ti_500K_pseudo_labeled.pickle of Carmon et al. 2019. It is read by `read_arrays`, which
    takes plain values and numeric arrays alone.

    Args:
        path: the file; `data` is uint8 [N, H, W, C], `extrapolated_targets` integers [N]. Other entries are
            left out.
        num_classes: number of classes; by default the largest label + 1.

    Returns:
        The images as [N, C, H, W].

    Raises:
        FileNotFoundError: if there is no such file.
        DataFormatError: if it is no such pickle; the message names the file and the reason.
    """
    try:
        content = read_arrays(Path(path).read_bytes())
    except PickleContentError as error:
        raise DataFormatError(
            f"{path}: not a pickle of plain arrays, or damaged ({error}); download or write it again"
        ) from error
    images, labels = (_entry(path, content, name) for name in (_IMAGES, _LABELS))
    return labelled_images(path, images, labels, num_classes, _IMAGES)


def _entry(path: str | os.PathLike[str], content: Any, name: str) -> np.ndarray[Any, Any]:
    """An array of the dict; Python 2 wrote its keys as bytes."""
    if isinstance(content, dict):
        value = content.get(name, content.get(name.encode()))
        if isinstance(value, np.ndarray):
            return value
        if isinstance(value, list) and all(type(item) is int for item in value):
            return np.array(value, dtype=np.int64)
    raise DataFormatError(
        f"{path}: must be a dict with the arrays {_IMAGES} and {_LABELS}, has no {name}"
    )
