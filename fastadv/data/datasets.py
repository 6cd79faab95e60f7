"""Data sets by name."""

from __future__ import annotations

from pathlib import Path

from fastadv.data.cifar import read_cifar, read_cifar_test
from fastadv.data.cifar_layout import CIFAR10, CIFAR100, CifarLayout
from fastadv.data.digits import load_digits
from fastadv.data.images import ImageData, Splits
from fastadv.ops.values import check_choice

_FROM_FILES = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def dataset_names() -> list[str]:
    """Return the names that `load_dataset` knows."""
    return ["digits", *_FROM_FILES]


def layout_of(name: str) -> CifarLayout:
    """Return the layout of the files of a data set.

    Raises:
        ValueError: for a data set that has no files, or an unknown name.
    """
    check_choice("name", name, list(_FROM_FILES))
    return _FROM_FILES[name]


def check_source(name: str, root: str | Path | None) -> None:
    """Check the name of a data set, and that a folder of its files is given only where it has files.

    Raises:
        ValueError: for an unknown name, or a folder for digits.
    """
    if name.startswith("hf:") or name.endswith(".npz"):
        raise ValueError(
            f"data must be one of {', '.join(dataset_names())} or folder:PATH for training, got {name!r}: fastadv "
            "eval alone takes .npz files and Hugging Face's data sets. From Python, fastadv.trainers.train takes "
            "any Dataset as StreamedData"
        )
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
    return read_cifar(*_files(name, root), verify)


def load_test_images(name: str, root: str | Path | None) -> ImageData:
    """Load the test images of a data set by name. The files of the training images may be missing.

    The arguments and the errors are as in `load_dataset`.
    """
    check_choice("name", name, dataset_names())
    if name == "digits":
        return load_digits().test
    return read_cifar_test(*_files(name, root))


def _files(name: str, root: str | Path | None) -> tuple[CifarLayout, str | Path]:
    """The layout of the files of a data set, and their folder."""
    if root is None:
        raise ValueError(
            f"root must be the folder that holds the files of {name}, got None: --root DATA on the command line. "
            f"`fastadv data {name} --root DATA --download` fetches them. {_FROM_FILES[name].origin}"
        )
    return _FROM_FILES[name], root
