"""The training and test images of a reproduction: a data set by name, or pictures in folders."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fastadv.data import ImageData, Splits, load_dataset, load_folders, subset
from fastadv.data.datasets import dataset_names, load_test_images
from fastadv.data.folder import FolderImages
from fastadv.data.training_folders import CROP, FOLDER, RESIZE, folder_of_tests
from fastadv.reproduction.specs import CannotRun
from fastadv.trainers import Recipe

_TRAIN_IMAGES = {"digits": 1297, "cifar10": 50_000, "cifar100": 50_000}
_TEST_IMAGES = {"digits": 500, "cifar10": 10_000, "cifar100": 10_000}
_SHAPES = {"digits": (1, 8, 8)}
_CLASSES = {"cifar100": 100}
_DIGITS = 8  # of a digest in a name


@dataclass(frozen=True)
class Source:
    """Where the images of a reproduction are.

    Attributes:
        data: name of a data set, or folder:PATH.
        root: folder of the files of a data set by name.
    """

    data: str
    root: str | None = None

    @property
    def is_folder(self) -> bool:
        """Whether they are pictures in folders, which are read when they are needed."""
        return self.data.startswith(FOLDER)

    @property
    def name(self) -> str:
        """The data set's name in tables.

        Pictures have the name of their folder. A folder that is named like a data set gets the prefix "folder-",
        so that its tables cannot be taken for tables of the data set.
        """
        if not self.is_folder:
            return self.data
        name = self._folder.resolve().name.lower()
        return f"folder-{name}" if name in dataset_names() else name

    @property
    def place(self) -> str:
        """The data set's name, or folder: and the whole path, which is the same from every working directory."""
        return f"{FOLDER}{self._folder.resolve()}" if self.is_folder else self.data

    @property
    def file_name(self) -> str:
        """The data set's name in names of files. A digest is added for folders, which may have the same name."""
        if not self.is_folder:
            return self.name
        place = os.fsencode(self._folder.resolve())
        return f"{self.name}-{hashlib.sha256(place).hexdigest()[:_DIGITS]}"

    @property
    def _folder(self) -> Path:
        return Path(self.data.removeprefix(FOLDER)).expanduser()

    @cached_property
    def tests(self) -> ImageData | FolderImages:
        """The test images."""
        if self.is_folder:
            return FolderImages(folder_of_tests(self._folder), resize=RESIZE, crop=CROP)
        return load_test_images(self.data, self.root)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """[C, H, W]."""
        return (3, CROP, CROP) if self.is_folder else _SHAPES.get(self.data, (3, 32, 32))

    @property
    def num_classes(self) -> int:
        """Number of classes; the classes of a folder of pictures are counted on the disk."""
        return self.tests.num_classes if self.is_folder else _CLASSES.get(self.data, 10)

    @cached_property
    def train_count(self) -> int:
        """The number of training images."""
        if self.is_folder:
            return len(FolderImages(self._folder / "train"))
        return _TRAIN_IMAGES[self.data]

    @property
    def test_count(self) -> int:
        """The number of test images; a data set by name is not read for this."""
        return len(self.tests) if self.is_folder else _TEST_IMAGES[self.data]

    def first_train_images(self, n: int | None) -> ImageData:
        """Return ``n`` training images, or all for None.

        Raises:
            CannotRun: for pictures in folders, which do not stay in memory.
        """
        if self.is_folder:
            raise CannotRun("pictures in folders do not stay in memory, as this analysis needs")
        whole = load_dataset(self.data, self.root).train
        assert isinstance(whole, ImageData)  # data sets by name are in memory
        return whole if n is None else subset(whole, min(n, len(whole)))

    def for_training(self, recipe: Recipe) -> Splits | str:
        """The value of the argument `data` of `train`."""
        if not self.is_folder:
            return self.data
        return load_folders(
            self._folder,
            resize=RESIZE,
            crop=CROP,
            flip=recipe.flip,
            test_images=recipe.monitor_images,
            seed=recipe.seed,
        )
