"""Reading one file of CIFAR's python layout, a pickle of arrays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastadv.data.array_pickle import PickleContentError, read_arrays
from fastadv.data.cifar_layout import PIXEL_BYTES, CifarLayout, Records, SplitLayout
from fastadv.data.errors import DataFormatError


def read_python(path: Path, layout: CifarLayout, split: SplitLayout) -> Records:
    """Read one file.

    Raises:
        DataFormatError: if it is not a pickle, holds other things than arrays and plain values, or
            its content contradicts the layout.
    """
    expected = layout.describe_python(split)
    content = _unpickle(path, expected)
    if not isinstance(content, Mapping):
        raise DataFormatError(f"{path} holds a {type(content).__name__}; expected {expected}")
    pixels = _field(content, "data", path, expected)
    shape = (split.records, PIXEL_BYTES)
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != shape:
        raise DataFormatError(f"{path}: 'data' is {_describe(pixels)}; expected {expected}")
    labels = _labels(content, layout.label_key, layout.num_classes, split.records, path, expected)
    coarse = None
    if layout.num_coarse:
        coarse = _labels(content, "coarse_labels", layout.num_coarse, split.records, path, expected)
    return Records(labels, coarse, pixels)


def _unpickle(path: Path, expected: str) -> Any:
    try:
        return read_arrays(path.read_bytes())
    except PickleContentError as error:
        raise DataFormatError(
            f"{path} cannot be read as a pickle of arrays ({error}); expected {expected}"
        ) from error


def _field(content: Mapping[Any, Any], key: str, path: Path, expected: str) -> Any:
    """The entry of a key, which Python 2 wrote as bytes."""
    for form in (key.encode(), key):
        if form in content:
            return content[form]
    raise DataFormatError(f"{path} has no {key!r}; expected {expected}")


def _labels(
    content: Mapping[Any, Any], key: str, count: int, records: int, path: Path, expected: str
) -> NDArray[np.uint8]:
    raw = _field(content, key, path, expected)
    if isinstance(raw, list) and all(type(label) is int for label in raw):
        raw = np.array(raw, dtype=object)  # no overflow before the range is checked
    if not isinstance(raw, np.ndarray) or raw.shape != (records,) or raw.dtype.kind not in "iuO":
        raise DataFormatError(f"{path}: {key!r} is {_describe(raw)}; expected {expected}")
    wrong = [label for label in raw.tolist() if type(label) is not int or not 0 <= label < count]
    if wrong:
        raise DataFormatError(
            f"{path}: {key!r} has {wrong[0]!r}, must be in 0 .. {count - 1}; expected {expected}"
        )
    return raw.astype(np.uint8)


def _describe(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} {list(value.shape)}"
    size = f" of length {len(value)}" if isinstance(value, (list, tuple)) else ""
    return f"a {type(value).__name__}{size}"
