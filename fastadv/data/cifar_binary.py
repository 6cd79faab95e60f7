"""Reading one file of CIFAR's binary layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastadv.data.cifar_layout import CifarLayout, Records, SplitLayout
from fastadv.data.errors import DataFormatError


def read_binary(path: Path, layout: CifarLayout, split: SplitLayout) -> Records:
    """Read one file.

    Raises:
        DataFormatError: if its size or a label contradicts the layout.
    """
    expected = layout.describe_binary(split)
    size = path.stat().st_size
    if size != layout.binary_size(split):
        raise DataFormatError(f"{path} has {size:,} bytes; expected {expected}")
    records = np.fromfile(path, dtype=np.uint8).reshape(split.records, layout.record_bytes)
    labels = records[:, layout.label_bytes - 1]
    _check_labels(path, "label", labels, layout.num_classes, expected)
    coarse = records[:, 0] if layout.num_coarse else None
    if coarse is not None:
        _check_labels(path, "coarse label", coarse, layout.num_coarse, expected)
    return Records(labels, coarse, records[:, layout.label_bytes :])


def _check_labels(
    path: Path, kind: str, labels: NDArray[np.uint8], count: int, expected: str
) -> None:
    wrong = np.flatnonzero(labels >= count)
    if len(wrong):
        first = int(wrong[0])
        raise DataFormatError(
            f"{path}: {kind} of record {first} is {labels[first]}, must be in 0 .. {count - 1} "
            f"({len(wrong)} records are out of range); expected {expected}"
        )
