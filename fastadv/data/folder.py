"""Pictures in one folder per class, like torchvision's ImageFolder, decoded when they are needed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastadv.data.errors import DataFormatError
from fastadv.data.preprocessing import (
    Interpolation,
    Preprocessing,
    check_workers,
    import_pil,
    picture_tensor,
    same_size_hint,
)
from fastadv.data.selection import evenly_spread

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
_SPLITS = {"train", "val", "valid", "validation", "test"}
_HASHED_FILES = 4096  # whose bytes are part of a fingerprint


class FolderImages(Dataset[tuple[Tensor, int]]):
    """The pictures under ROOT/CLASS/, also in folders below.

    The classes are the folders of ROOT by name, in sorted order, whose numbers are the labels. A folder without
    pictures counts as a class, so that a part of a data set can keep the numbers of the whole. Folders and files
    whose names begin with a dot are left out.

    Args:
        root: the folder.
        resize: pixels of the shorter side; by default the size is left as it is.
        crop: pixels of each side of the square that is cut out of the middle; by default all is kept.
        interpolation: interpolation of the resizing, which is antialiased as in PIL and torchvision.
        workers: processes that decode when a model is evaluated on this data; by default one per core, at most 8.
        name: the name in reports; by default the folder's name.

    Attributes:
        classes: names of the classes.
        class_to_idx: their numbers.
        targets: labels [N] int64.
        num_classes: number of classes.
        in_channels: 3; grey pictures become RGB.

    Raises:
        FileNotFoundError: if there is no such folder, no folder in it, or no picture in these; or if a link in it
            leads nowhere.
        NotADirectoryError: if root is a file.
        ImportError: if Pillow is not installed.
        ValueError: if a number is out of range, root holds the folders of splits, a link leads back to a folder
            that it lies in, or two classes are one folder.
    """

    in_channels = 3

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        resize: int | None = None,
        crop: int | None = None,
        interpolation: Interpolation = "bilinear",
        workers: int | None = None,
        name: str | None = None,
    ) -> None:
        import_pil()  # if it is missing, raise now and not in a worker
        self.root = Path(root).expanduser()
        self.preprocessing = Preprocessing(resize, crop, interpolation)
        self.workers = check_workers(workers)
        self.classes = _class_folders(self.root)
        self.num_classes = len(self.classes)
        self.class_to_idx = {name: number for number, name in enumerate(self.classes)}
        paths, targets = [], []
        for number, folder in enumerate(self.classes):
            for path in _pictures(self.root, folder):
                paths.append(os.fsencode(path.relative_to(self.root)))
                targets.append(number)
        if not paths:
            raise FileNotFoundError(
                f"{self.root}: none of its {self.num_classes} folders holds a picture ({', '.join(SUFFIXES)})"
            )
        # An array, whose memory forked workers share with this process. They would copy a list, because reading it
        # changes reference counts.
        self._paths = np.array(paths)
        self.targets = torch.tensor(targets, device="cpu")
        self.name = self.root.resolve().name if name is None else name

    def __repr__(self) -> str:
        return f"FolderImages({str(self.root)!r}, {len(self)} images, {self.num_classes} classes)"

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """A picture, uint8 [3, H, W], and its label.

        Raises:
            DataFormatError: if the file is damaged, no picture, or has more than 8 bits per channel.
            ValueError: if the picture is smaller than the crop.
        """
        path = self.path(index)
        with naming_picture(path):
            return picture_tensor(self.preprocessing(decoded(path))), int(self.targets[index])

    @property
    def same_size_hint(self) -> str:
        """Advice for a message about pictures of different sizes."""
        return same_size_hint(self.preprocessing)

    def path(self, index: int) -> Path:
        """The file of a picture."""
        return self.root / os.fsdecode(self._paths[index])

    def listing(self) -> str:
        """SHA-256 of the names and labels of all pictures; no file is read."""
        digest = hashlib.sha256()
        for path, label in zip(self._paths, self.targets.tolist(), strict=True):
            digest.update(path + f":{label}\n".encode())
        return digest.hexdigest()

    def fingerprint(self, indices: Tensor) -> str:
        """SHA-256 of some pictures: preprocessing, names, labels and file sizes, and the bytes of up to 4096.

        Where there are more pictures than 4096, the bytes of 4096 evenly spread ones are read.
        """
        digest = hashlib.sha256(f"{self.preprocessing.describe()}\n".encode())
        for index in indices.tolist():
            size = self.path(index).stat().st_size
            digest.update(self._paths[index] + f":{int(self.targets[index])}:{size}\n".encode())
        for place in evenly_spread(len(indices), _HASHED_FILES).tolist():
            digest.update(hashlib.sha256(self.path(int(indices[place])).read_bytes()).digest())
        return digest.hexdigest()


def _class_folders(root: Path) -> list[str]:
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such folder; expected there one folder per class")
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is a file; expected a folder with one folder per class")
    with os.scandir(root) as entries:
        seen = [entry for entry in entries if not entry.name.startswith(".")]
    # Left out, it would shift the numbers of the classes after it.
    for entry in seen:
        if entry.is_symlink() and not os.path.exists(entry):
            raise FileNotFoundError(
                f"{entry.path}: a link to {os.readlink(entry)}, which is not there, so that it may be a class "
                "that is missing; mend the link or take it away"
            )
    names = sorted(entry.name for entry in seen if entry.is_dir())
    if not names:
        raise FileNotFoundError(
            f"{root} holds no folder; expected one folder per class, with pictures in it"
        )
    if len(names) > 1 and _SPLITS.issuperset(name.lower() for name in names):
        raise ValueError(
            f"{root} holds the folders {', '.join(names)}, which look like splits and not like classes; name "
            f"one of them, such as {root / names[-1]}"
        )
    _check_distinct(root, names)
    return names


def _check_distinct(root: Path, names: Sequence[str]) -> None:
    """Refuse two classes that are one folder, by a link: its pictures would have two labels."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(os.path.realpath(root / name), name)
        if other != name:
            raise ValueError(
                f"{root}: its folders {other} and {name} are the same folder by a link, so that its pictures "
                "would be of two classes; take one of them away"
            )


def _pictures(root: Path, name: str) -> Iterator[Path]:
    """The pictures in a class's folder and below it, sorted by folder and name; links are followed.

    Raises:
        OSError: if a folder cannot be read.
        ValueError: if a link leads back to a folder that it lies in, so that pictures would be there many times.
    """
    # For each folder its real path and the real paths of the folders around it.
    around = {root: frozenset({os.path.realpath(root)})}
    folders = []
    for here, below, files in os.walk(root / name, onerror=_raise, followlinks=True):
        folder, real = Path(here), os.path.realpath(here)
        if real in around[folder.parent]:
            raise ValueError(
                f"{folder}: a link to {real}, in which it lies itself, so that its pictures would be there many "
                "times; take the link away"
            )
        around[folder] = around[folder.parent] | {real}
        below[:] = [one for one in below if not one.startswith(".")]
        folders.append((here, files))
    for parent, files in sorted(folders):
        for file in sorted(files):
            if file.lower().endswith(SUFFIXES) and not file.startswith("."):
                yield Path(parent, file)


def _raise(error: OSError) -> None:
    """Refuse a folder that cannot be read, which `os.walk` by itself would take for an empty one."""
    raise error


@contextmanager
def naming_picture(path: Path) -> Iterator[None]:
    """Put a file's name before the message of a ValueError about its picture."""
    try:
        yield
    except ValueError as error:
        raise type(error)(f"{path}: {error}") from error


def decoded(path: Path) -> Any:
    """A PIL image in mode RGB.

    Raises:
        DataFormatError: if the file is damaged, or no picture.
        ValueError: if it has more than 8 bits per channel.
    """
    image = import_pil()
    try:
        with image.open(path) as picture:
            if picture.mode[0] in "IF":
                raise ValueError(f"it has mode {picture.mode}, more than 8 bits per channel")
            return picture.convert("RGB")
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        raise DataFormatError(
            f"not a picture that can be read, or damaged ({type(error).__name__}: {error})"
        ) from error
