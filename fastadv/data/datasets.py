"""Data sets by name."""

from __future__ import annotations

from pathlib import Path

from fastadv.data.cifar import load_cifar10, load_cifar100
from fastadv.data.digits import load_digits
from fastadv.data.images import Splits
from fastadv.ops.values import check_choice

_FROM_FILES = {"cifar10": load_cifar10, "cifar100": load_cifar100}


def dataset_names() -> list[str]:
    """Return the names that `load_dataset` knows."""
    return ["digits", *_FROM_FILES]


def check_source(name: str, root: str | Path | None) -> None:
    """Check the name of a data set, and that a folder of its files is given only where it has files.

    Raises:
        ValueError: for an unknown name, or a folder for digits.
    """
    check_choice("data", name, dataset_names())
    if root is not None and name not in _FROM_FILES:
        raise ValueError(f"root must be left out with {name}, which need no files, got {root!r}")


def load_dataset(name: str, root: str | Path | None = None, verify: bool = True) -> Splits:
    """Load a data set by name.

    Args:
        name: "digits" (embedded in scikit-learn), "cifar10" or "cifar100".
        root: for CIFAR, the unpacked folder of the official files or its parent.
        verify: for CIFAR, check that the content is the genuine one; see `read_cifar`.

    Returns:
        Training and test images.

    Raises:
        ValueError: for an unknown name, or if root is missing.
        FileNotFoundError: if a file is absent.
        DataFormatError: if a file is damaged or is not the genuine one.
    """
    check_choice("name", name, dataset_names())
    if name == "digits":
        return load_digits()
    if root is None:
        raise ValueError(f"root must be the folder that holds the files of {name}, got None")
    return _FROM_FILES[name](root, verify)
