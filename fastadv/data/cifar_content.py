"""Checking that the records of CIFAR are the genuine ones, in any order."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from fastadv.data.cifar_layout import CifarLayout, Records, SplitLayout
from fastadv.data.errors import DataFormatError

_REMEDY = "if this is meant (for example changed labels), turn the check off with verify=False"


def content_digest(records: Records) -> str:
    """Digest of a set of records that does not depend on their order.

    The sum modulo 2**128 of the 16-byte BLAKE2b hashes of label byte and pixels, as 32 hex digits.
    """
    rows = np.concatenate([records.labels[:, None], records.pixels], axis=1)
    total = 0
    for row in rows:
        total += int.from_bytes(hashlib.blake2b(row, digest_size=16).digest(), "little")
    return f"{total % 2**128:032x}"


def check_content(
    records: Records, layout: CifarLayout, split: SplitLayout, split_name: str, folder: Path
) -> None:
    """Compare a split with the genuine one.

    Where the digest of the genuine records is known, the records must have it. Otherwise the labels
    must have the structure of the genuine labels: equally many images in each class, each class in
    one coarse class, and equally many classes in each coarse class.

    Raises:
        DataFormatError: if they differ.
    """
    what = f"{folder}: the {split_name} records"
    if split.digest is not None:
        found = content_digest(records)
        if found != split.digest:
            raise DataFormatError(
                f"{what} are not those of {layout.name}: content digest {found}, "
                f"expected {split.digest}; {_REMEDY}"
            )
        return
    counts = np.bincount(records.labels, minlength=layout.num_classes)
    expected = len(records.labels) // layout.num_classes
    if (counts != expected).any():
        label = int(np.flatnonzero(counts != expected)[0])
        raise DataFormatError(
            f"{what} are not those of {layout.name}: {counts[label]} images of class {label}, "
            f"expected {expected}; {_REMEDY}"
        )
    if records.coarse is not None and not _is_hierarchy(records, layout):
        raise DataFormatError(
            f"{what} are not those of {layout.name}: each of the {layout.num_coarse} coarse "
            f"classes must hold {layout.num_classes // layout.num_coarse} classes; {_REMEDY}"
        )


def check_file_md5(path: Path, expected: str) -> None:
    """Compare a file with the genuine one.

    Raises:
        DataFormatError: if their MD5 sums differ.
    """
    found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    if found != expected:
        raise DataFormatError(
            f"{path} is not the official file: MD5 {found}, expected {expected}; {_REMEDY}"
        )


def _is_hierarchy(records: Records, layout: CifarLayout) -> bool:
    """Whether every class has one coarse class and every coarse class equally many classes."""
    assert records.coarse is not None
    pairs = np.unique(np.stack([records.labels, records.coarse]), axis=1)  # [2, pairs]
    per_coarse = np.bincount(pairs[1], minlength=layout.num_coarse)
    one_each = pairs.shape[1] == layout.num_classes
    return one_each and bool((per_coarse == layout.num_classes // layout.num_coarse).all())
