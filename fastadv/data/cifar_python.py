"""Reading one file of CIFAR's python layout, a pickle, without letting it run anything."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastadv.data.cifar_layout import PIXEL_BYTES, CifarLayout, Records, SplitLayout
from fastadv.data.errors import DataFormatError


def read_python(path: Path, layout: CifarLayout, split: SplitLayout) -> Records:
    """Read one file.

    Raises:
        DataFormatError: if it is no such pickle, wants anything but arrays and plain values, or
            its contents are not what the layout says.
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


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles plain values and numpy arrays; any other name in the file is refused, not run."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        allowed = _allowed_globals()
        if (module_name, global_name) not in allowed:
            raise pickle.UnpicklingError(
                f"it refers to {module_name}.{global_name}, which such a file has no need of"
            )
        return allowed[module_name, global_name]


def _allowed_globals() -> dict[tuple[str, str], Any]:
    """What an array's pickle refers to, under the names of old and new numpy."""
    empty = np.empty(0, np.uint8)
    rebuild, from_buffer = empty.__reduce__()[0], empty.__reduce_ex__(5)[0]
    allowed: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _encode_latin1,  # how Python 3 writes bytes for Python 2
    }
    for package in ("numpy.core", "numpy._core"):
        allowed[f"{package}.multiarray", "_reconstruct"] = rebuild
        allowed[f"{package}.numeric", "_frombuffer"] = from_buffer
    return allowed


def _encode_latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes text as {encoding!r}, only latin1 is in use")
    return text.encode("latin1")


def _unpickle(path: Path, expected: str) -> Any:
    with path.open("rb") as file:
        try:
            return _ArrayUnpickler(file, encoding="bytes").load()
        except Exception as error:  # a damaged pickle can raise nearly anything
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
