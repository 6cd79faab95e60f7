"""CIFAR-10 and CIFAR-100 from the official files, in the binary or the python layout."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fastadv.data.cifar_binary import read_binary
from fastadv.data.cifar_content import check_content, check_file_md5
from fastadv.data.cifar_layout import (
    CIFAR10,
    CIFAR100,
    SIDE,
    CifarLayout,
    Records,
    SplitLayout,
    concatenate,
    require_file,
)
from fastadv.data.cifar_python import read_python
from fastadv.data.images import ImageData, Splits
from fastadv.ops.values import check_bool


def load_cifar10(root: str | Path, verify: bool = True) -> Splits:
    """Read both splits of CIFAR-10 from the official files in either layout.

    Args:
        root: the unpacked folder, such as cifar-10-batches-bin, or its parent.
        verify: check that the content is the genuine one, as `read_cifar` does. Turn it off for data that were
            changed on purpose.

    Returns:
        Training and test images.

    Raises:
        FileNotFoundError: if there is nothing at root, or a file is missing.
        DataFormatError: if the content of a file is wrong.
    """
    return read_cifar(CIFAR10, root, verify)


def load_cifar100(root: str | Path, verify: bool = True) -> Splits:
    """Read both splits of CIFAR-100, with its 100 fine labels, from the official files in either layout.

    Args:
        root: the unpacked folder, such as cifar-100-binary, or its parent.
        verify: check that the content is the genuine one, as `read_cifar` does. Turn it off for data that were
            changed on purpose.

    Returns:
        Training and test images.

    Raises:
        FileNotFoundError: if there is nothing at root, or a file is missing.
        DataFormatError: if the content of a file is wrong.
    """
    return read_cifar(CIFAR100, root, verify)


def read_cifar(layout: CifarLayout, root: str | Path, verify: bool = True) -> Splits:
    """Read both splits of a data set.

    Args:
        layout: which data set.
        root: the unpacked folder (e.g. cifar-10-batches-bin) or its parent. If both layouts are
            there, the binary one is read.
        verify: check the content besides sizes and label ranges. CIFAR-10's records must be the
            genuine records in any order, and CIFAR-100's python files must have the MD5 of the
            official files. In CIFAR-100's binary files only the numbers of images per class and
            of classes per coarse class are checked. Turn it off for data that were changed on
            purpose.

    Raises:
        FileNotFoundError: if there is nothing at root, or a file is missing.
        DataFormatError: if the content of a file is wrong.
    """
    verify = check_bool("verify", verify)
    folder, is_binary = find_folder(layout, _folder(root))
    return Splits(
        train=_read_split(layout, layout.train, "train", folder, is_binary, verify),
        test=_read_split(layout, layout.test, "test", folder, is_binary, verify),
    )


def read_cifar_test(layout: CifarLayout, root: str | Path) -> ImageData:
    """Read the test images alone, with the checks and the errors of `read_cifar`."""
    folder, is_binary = find_folder(layout, _folder(root))
    return _read_split(layout, layout.test, "test", folder, is_binary, verify=True)


def _folder(root: str | os.PathLike[str]) -> Path:
    if not isinstance(root, str | os.PathLike):
        raise TypeError(f"root must be the path of a folder, got {root!r}")
    return Path(root).expanduser()


def find_folder(layout: CifarLayout, root: Path) -> tuple[Path, bool]:
    """Return the folder with the files, and whether they are in the binary layout.

    Args:
        layout: which data set.
        root: that folder or its parent.

    Raises:
        FileNotFoundError: if not one of the files is there; the message says how they must lie.
    """
    candidates = (
        (root / layout.binary_folder, layout.train.binary_files + layout.test.binary_files, True),
        (root, layout.train.binary_files + layout.test.binary_files, True),
        (root / layout.python_folder, layout.train.python_files + layout.test.python_files, False),
        (root, layout.train.python_files + layout.test.python_files, False),
    )
    for folder, names, is_binary in candidates:
        # One file is enough: further missing files are then reported by name.
        if any((folder / name).is_file() for name in names):
            return folder, is_binary
    raise FileNotFoundError(
        f"no {layout.name} at {root}{_state_of(layout, root)}; expected there a folder "
        f"{layout.binary_folder} with {', '.join(candidates[0][1])} "
        f"(each file of the training split: {layout.describe_binary(layout.train)}), or a folder "
        f"{layout.python_folder} with {', '.join(candidates[2][1])}. {layout.origin}"
    )


def _state_of(layout: CifarLayout, root: Path) -> str:
    """The likely reason why root has no files of the data set, in parentheses; empty if it is not known."""
    if not root.exists():
        return " (there is no such folder)"
    if not root.is_dir():
        return " (it is a file, not a folder)"
    archives = sorted(path.name for path in root.glob(f"{layout.stem}-*.tar.gz"))
    return f" (found {', '.join(archives)}: unpack it first)" if archives else ""


def read_file(
    path: Path, layout: CifarLayout, split: SplitLayout, is_binary: bool, verify: bool
) -> Records:
    """Read one file.

    Args:
        path: the file.
        layout: which data set.
        split: which of its splits.
        is_binary: whether the file is in the binary layout.
        verify: check the MD5 of a file in the python layout, where it is known.

    Raises:
        FileNotFoundError: if it is not there.
        DataFormatError: if its content contradicts the layout.
    """
    require_file(path, (layout.describe_binary if is_binary else layout.describe_python)(split))
    if is_binary:
        return read_binary(path, layout, split)
    if verify and split.python_md5 is not None:
        check_file_md5(path, split.python_md5)  # before anything in it is interpreted
    return read_python(path, layout, split)


def files_of(split: SplitLayout, is_binary: bool) -> tuple[str, ...]:
    """Return the names of a split's files in one of the layouts."""
    return split.binary_files if is_binary else split.python_files


def _read_split(
    layout: CifarLayout,
    split: SplitLayout,
    split_name: str,
    folder: Path,
    is_binary: bool,
    verify: bool,
) -> ImageData:
    parts = [
        read_file(folder / name, layout, split, is_binary, verify)
        for name in files_of(split, is_binary)
    ]
    records = concatenate(parts)
    if verify:
        check_content(records, layout, split, split_name, folder)
    return ImageData(
        images=torch.from_numpy(records.pixels.reshape(-1, 3, SIDE, SIDE)),
        labels=torch.from_numpy(records.labels).to(torch.int64),
        num_classes=layout.num_classes,
        name=f"{layout.name} {split_name}",
    )
