"""The images that a command names: of a run, a data set by name, a file, a folder of pictures, or Hugging Face."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastadv.data import FolderImages, HubImages, ImageData, load_hub, load_npz
from fastadv.data.datasets import check_source, dataset_names, load_test_images
from fastadv.data.preprocessing import Interpolation
from fastadv.data.training_folders import FOLDER, folder_of_tests
from fastadv.ops.values import did_you_mean
from fastadv.trainers.run_directory import RunDirectory

Images = ImageData | FolderImages | HubImages
HUB = "hf:"


@dataclass(frozen=True)
class Reading:
    """How pictures of a folder or of Hugging Face are read.

    Attributes:
        resize: pixels of the shorter side.
        crop: pixels of each side of the square in the middle.
        interpolation: the interpolation of the resizing; None for bilinear.
        workers: number of processes that decode; None for one per core.
    """

    resize: int | None = None
    crop: int | None = None
    interpolation: Interpolation | None = None
    workers: int | None = None

    def given(self) -> dict[str, Any]:
        """Return the options that are given, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def check_none(self, data: str) -> None:
        """Refuse the options, as the data are no pictures in files.

        Raises:
            ValueError: if an option is given.
        """
        for option, value in self.given().items():
            raise ValueError(
                f"{option} must be left out with {data}, got {value!r}: it is for folder:PATH and hf:NAME"
            )


def images_of_run(
    directory: RunDirectory, data: str | None, root: str | None, reading: Reading
) -> Images:
    """Return the test images of a data set, by default the data set of the run."""
    recorded, folder = directory.source()
    name = data or recorded
    if name is None:
        raise ValueError(
            f"data must be given: {directory.path} was not trained on a data set by name"
        )
    if data is None and name.startswith(FOLDER):
        check_no_root(name, root)
        tests = folder_of_tests(Path(name.removeprefix(FOLDER)))
        return FolderImages(tests, **{**directory.reading(), **reading.given()})
    if _is_named(name):
        if root is not None:
            check_source(name, root)
        root = root or folder
    return images_named(name, root, reading)


def images_of_models(
    paths: Sequence[str], data: str | None, root: str | None, reading: Reading
) -> Images:
    """Return the test images of the named data set, or else of the data set on which all runs were trained.

    Raises:
        ValueError: if no data set is named, and there is no run, or the runs were trained on different data.
    """
    runs = [RunDirectory(path) for path in paths if Path(path).is_dir()]
    if data is not None and (root is not None or not runs):
        return images_named(data, root, reading)
    if not runs:
        raise ValueError("data must be given, as no model is a run, which knows its data")
    if data is None:
        trained = {str(run.path): run.source()[0] for run in runs}
        if len(set(trained.values())) > 1:
            runs_and_data = ", ".join(f"{path} on {name}" for path, name in trained.items())
            raise ValueError(
                f"data must be given, as the runs were trained on different data: {runs_and_data}"
            )
    return images_of_run(runs[0], data, root, reading)


def images_named(data: str, root: str | None, reading: Reading) -> Images:
    """Return a data set's test images, or all images of a .npz file, a folder or a Hugging Face split.

    Args:
        data: digits, cifar10, cifar100, FILE.npz, folder:PATH or hf:NAME[:SPLIT].
        root: folder of the files of a data set by name.
        reading: how pictures are read.

    Raises:
        FileNotFoundError: if the files are not there.
        ValueError: if the name is unknown, or does not take a given option.
    """
    if not _is_named(data):
        check_no_root(data, root)
    if data.startswith(FOLDER):
        return FolderImages(data.removeprefix(FOLDER), **reading.given())
    if data.startswith(HUB):
        return load_hub(data.removeprefix(HUB), **reading.given())
    reading.check_none(data)
    if data.endswith(".npz"):
        return load_npz(data)
    if data not in dataset_names():
        kinds = f"{', '.join(dataset_names())}, a .npz file, folder:PATH or hf:NAME"
        raise ValueError(f"data must be {kinds}, got {data!r}{_meant(data)}")
    check_source(data, root)
    return load_test_images(data, root)


def check_training_images(data: str, root: str | None) -> None:
    """Refuse images for training that are not there, before anything else is done.

    Args:
        data: digits, cifar10, cifar100 or folder:PATH.
        root: folder of the files of a data set by name.

    Raises:
        FileNotFoundError: if the files are not there.
        ValueError: if the name is unknown, or if the root is missing or has no effect.
    """
    if data.startswith(FOLDER):
        check_no_root(data, root)
        return
    if _is_named(data) and data not in dataset_names():
        raise ValueError(
            f"data must be one of {', '.join(dataset_names())}, or folder:PATH, got {data!r}{_meant(data)}"
        )
    check_source(data, root)


def check_no_root(data: str, root: str | None) -> None:
    """Refuse a folder for data whose name says where they are.

    Raises:
        ValueError: if the folder is given.
    """
    if root is not None:
        raise ValueError(f"root must be left out with {data}, got {root!r}")


def _meant(data: str) -> str:
    """What an unknown name of data may stand for, for a message."""
    if Path(data).is_dir():
        return f"; did you mean 'folder:{data}'?"
    return did_you_mean(data, dataset_names())


def _is_named(data: str) -> bool:
    """Whether the data are a data set by name, whose files lie in a root folder."""
    return not data.endswith(".npz") and not data.startswith((FOLDER, HUB))
