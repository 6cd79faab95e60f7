"""Training on pictures in folders, such as ImageNet: random crops, read during the run."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from fastadv.data.folder import FolderImages, decoded, naming_picture
from fastadv.data.images import ImageData, Splits
from fastadv.data.preprocessing import (
    Interpolation,
    default_workers,
    picture_tensor,
    resampling,
)
from fastadv.data.selection import balanced_choice
from fastadv.data.streaming import StreamedData
from fastadv.fields import arguments_checked
from fastadv.ops.values import integer

FOLDER = "folder:"
RESIZE, CROP = 256, 224
_TEST_FOLDERS = ("val", "validation", "valid", "test")
_AREA = (0.08, 1.0)  # smallest and largest area of the crop, as a part of the picture
_SHAPE = (3 / 4, 4 / 3)  # smallest and largest ratio of the crop's width to its height
_TRIES = 10
_BATCH = 64


class RandomCrops(Dataset[tuple[Tensor, int]]):
    """The pictures of a folder for training: a random part, brought to one size, and mirrored or not.

    Source: Szegedy et al. 2015, as in the usual recipes for ImageNet. The area of the part is uniform in 8 % to
    100 % of the picture's area. The logarithm of its ratio of width to height is uniform between 3/4 and 4/3.
    Random numbers come from torch's generator, which `StreamLoader` seeds for each picture by seed, epoch and
    index.

    Args:
        pictures: the folder.
        size: pixels of each side of the result.
        flip: mirror at random.
        interpolation: interpolation of the resizing, which is antialiased.
    """

    def __init__(
        self, pictures: FolderImages, size: int, flip: bool, interpolation: Interpolation
    ) -> None:
        self.pictures = pictures
        self.size = size
        self.flip = flip
        self.interpolation = interpolation

    def __len__(self) -> int:
        return len(self.pictures)

    def listing(self) -> str:
        """The pictures' own `listing`, by which a resumed run recognises them."""
        return self.pictures.listing()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """A picture, uint8 [3, size, size], and its label.

        Raises:
            DataFormatError: if the file is damaged, no picture, or has more than 8 bits per channel.
        """
        path = self.pictures.path(index)
        with naming_picture(path):
            picture = decoded(path)
        numbers = torch.rand(_TRIES + 1, 4, dtype=torch.float64, device="cpu").tolist()
        width, height = picture.size
        part = picture.crop(random_box(width, height, numbers[:_TRIES]))
        pixels = picture_tensor(part.resize((self.size,) * 2, resampling(self.interpolation)))
        if self.flip and numbers[_TRIES][0] < 0.5:
            pixels = pixels.flip(2)
        return pixels, int(self.pictures.targets[index])


def random_box(width: int, height: int, numbers: list[list[float]]) -> tuple[int, int, int, int]:
    """Choose a part of a picture.

    Args:
        width: width of the picture in pixels.
        height: height of the picture in pixels.
        numbers: four numbers in 0..1 for each try: for the area, the shape, the place from the left and from the
            top.

    Returns:
        Left, top, right and bottom of the first try that fits into the picture. If no try fits, the largest part
        in the middle with an allowed shape.
    """
    low, high = (math.log(value) for value in _SHAPE)
    for area, shape, left, top in numbers:
        pixels = width * height * (_AREA[0] + area * (_AREA[1] - _AREA[0]))
        ratio = math.exp(low + shape * (high - low))
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(left * (width - w + 1)), int(top * (height - h + 1))
            return x, y, x + w, y + h
    w = max(1, min(width, round(height * _SHAPE[1])))
    h = max(1, min(height, round(width / _SHAPE[0])))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


@arguments_checked
def load_folders(
    root: str | os.PathLike[str],
    *,
    resize: int = RESIZE,
    crop: int = CROP,
    interpolation: Interpolation = "bilinear",
    workers: int | None = None,
    flip: bool = True,
    test_images: int | None = None,
    seed: int = 0,
) -> Splits:
    """Load pictures in the folders ROOT/train/CLASS/ and ROOT/val/CLASS/ for training.

    Worker processes read training pictures when they are needed, as `RandomCrops`. Test pictures are resized and
    cropped in the middle, and stay in memory.

    Args:
        root: the folder that holds `train` and `val` (or `validation`, `valid`, `test`).
        resize: pixels of the shorter side of a test picture, before the crop.
        crop: pixels of each side of all images.
        interpolation: interpolation of the resizing, which is antialiased.
        workers: processes that read ahead, for each process that trains; by default its share of the cores, at
            most 8.
        flip: mirror training pictures at random.
        test_images: the number of test pictures to choose, evenly over the classes; None takes all.
        seed: seed of this choice.

    Returns:
        Training and test images.

    Raises:
        FileNotFoundError: if a folder is not there, or holds no pictures.
        ImportError: if Pillow is not installed.
        ValueError: if a number is out of range, or the two folders have other classes.
    """
    place = Path(root).expanduser()
    test_folder = folder_of_tests(place)
    wanted = None if test_images is None else integer("test_images", test_images, at_least=1)
    training = FolderImages(place / "train", interpolation=interpolation)
    tests = FolderImages(test_folder, resize=resize, crop=crop, interpolation=interpolation)
    _check_same_classes(training, tests)
    processes = _share_of_cores() if workers is None else integer("workers", workers, at_least=0)
    name = place.resolve().name
    train = StreamedData(
        RandomCrops(training, crop, flip, interpolation),
        training.num_classes,
        f"{name} train (random crops of {crop} pixels)",
        processes,
        supports=frozenset({"flip"}),
    )
    count = len(tests) if wanted is None else min(wanted, len(tests))
    chosen = balanced_choice(tests.targets, count, seed)
    test = _in_memory(tests, chosen, f"{name} {test_folder.name}", processes)
    reading = {"resize": resize, "crop": crop, "interpolation": interpolation}
    return Splits(train, test, {"dataset": f"{FOLDER}{place.resolve()}", "reading": reading})


def folder_of_tests(root: Path) -> Path:
    """Return the folder of the test pictures beside `train`.

    Raises:
        FileNotFoundError: if one of the two is not there.
    """
    found = [name for name in _TEST_FOLDERS if (root / name).is_dir()]
    if not (root / "train").is_dir() or not found:
        there = "is no folder" if not root.is_dir() else "does not hold both"
        raise FileNotFoundError(
            f"{root}: must hold the folders train and val, each with one folder per class; it {there}"
        )
    return root / found[0]


def _check_same_classes(training: FolderImages, tests: FolderImages) -> None:
    """Refuse test folders whose classes differ, because labels are numbers of the sorted class names."""
    if training.classes != tests.classes:
        differing = sorted(set(training.classes) ^ set(tests.classes))
        raise ValueError(
            f"{tests.root} must have the {training.num_classes} classes of {training.root}, got "
            f"{tests.num_classes}; in one of the two alone: {', '.join(differing[:5])}. A class without pictures "
            "is an empty folder"
        )


def _in_memory(tests: FolderImages, chosen: Tensor, name: str, workers: int) -> ImageData:
    some: Dataset[Any] = Subset(tests, chosen.tolist())
    reader: DataLoader[Any] = DataLoader(
        some,
        _BATCH,
        num_workers=min(workers, math.ceil(len(chosen) / _BATCH)),
        generator=torch.Generator().manual_seed(0),
    )
    images = torch.cat([x for x, _ in reader])
    return ImageData(images, tests.targets[chosen], tests.num_classes, name)


def _share_of_cores() -> int:
    """Worker processes of each process that trains on this machine."""
    beside = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return default_workers(beside)
