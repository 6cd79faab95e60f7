"""Labelled images of Hugging Face's `datasets`, decoded when they are needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastadv.data.images import item_label
from fastadv.data.items import IMAGE_COLUMNS, LABEL_COLUMNS, column
from fastadv.data.preprocessing import (
    Interpolation,
    Preprocessing,
    check_workers,
    import_pil,
    picture_tensor,
    same_size_hint,
)
from fastadv.data.selection import evenly_spread

_TEST_SPLITS = ("test", "validation", "val", "valid")
_GREY = ("L", "1")
_PROBED = 16  # images whose mode is looked at


class HubImages(Dataset[tuple[Tensor, int]]):
    """A split of a data set as the package `datasets` reads it.

    Args:
        dataset: a ``datasets.Dataset`` with a column image or img and one label, labels or fine_label.
        name: the name in reports.
        resize: pixels of the shorter side; by default the size is left as it is.
        crop: pixels of each side of the square that is cut out of the middle; by default all is kept.
        interpolation: interpolation of the resizing, which is antialiased.
        workers: processes that decode when a model is evaluated on this data; by default one per core, at most 8.

    Attributes:
        targets: labels [N] int64.
        num_classes: number of classes, from the data set's features, or else the largest label + 1.
        in_channels: 1 if 16 evenly spread images are grey, else 3, and grey images become RGB.

    Raises:
        ImportError: if Pillow is not installed.
        TypeError: if a label is no integer.
        ValueError: if there are no such columns, no items, or a label is negative.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        name: str = "hf",
        resize: int | None = None,
        crop: int | None = None,
        interpolation: Interpolation = "bilinear",
        workers: int | None = None,
    ) -> None:
        import_pil()
        self.preprocessing = Preprocessing(resize, crop, interpolation)
        self.workers = check_workers(workers)
        self.name = name
        names = list(dataset.column_names)
        image, label = column(names, IMAGE_COLUMNS), column(names, LABEL_COLUMNS)
        if image is None or label is None:
            raise ValueError(
                f"{name} must have a column {' or '.join(IMAGE_COLUMNS)} and a column "
                f"{' or '.join(LABEL_COLUMNS)}, got {', '.join(names)}"
            )
        if len(dataset) == 0:
            raise ValueError(f"{name} must have at least one item, got none")
        self._dataset, self._image = dataset, image
        # A number such as 0.9 is no class index, and would become class 0.
        classes = [
            int(value) if isinstance(value, bool) else item_label(value, index)
            for index, value in enumerate(dataset[label])
        ]
        self.targets = torch.tensor(classes, device="cpu")
        low, high = int(self.targets.min()), int(self.targets.max())
        if low < 0:
            raise ValueError(
                f"labels must be >= 0, got {low} in {name}: this split seems to have no labels"
            )
        feature = (getattr(dataset, "features", None) or {}).get(label)
        self.num_classes = int(getattr(feature, "num_classes", None) or high + 1)
        # A data set of colours may hold grey pictures as well, such as its first one.
        probed = evenly_spread(len(self), min(_PROBED, len(self))).tolist()
        grey = all(self._picture(index).mode in _GREY for index in probed)
        self._mode = "L" if grey else "RGB"
        self.in_channels = 1 if self._mode == "L" else 3

    def __repr__(self) -> str:
        return f"HubImages({self.name!r}, {len(self)} images, {self.num_classes} classes)"

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """An image, uint8 [C, H, W], and its label."""
        picture = self._picture(index)
        if self._mode == "L" and picture.mode not in _GREY:
            raise ValueError(
                f"the images of {self.name} must be of one mode, got mode {picture.mode} at index {index} after "
                f"{_PROBED} grey ones; convert all of them to RGB"
            )
        picture = self.preprocessing(picture.convert(self._mode))
        return picture_tensor(picture), int(self.targets[index])

    @property
    def same_size_hint(self) -> str:
        """Advice for a message about images of different sizes."""
        return same_size_hint(self.preprocessing)

    def _picture(self, index: int) -> Any:
        picture = self._dataset[index][self._image]
        if not hasattr(picture, "convert"):
            raise TypeError(
                f"column {self._image} of {self.name} must hold PIL images, got {type(picture).__name__}; take a "
                "format or a transform off the data set"
            )
        if picture.mode[0] in "IF":
            raise ValueError(
                f"an image of {self.name} has mode {picture.mode}, more than 8 bits per channel"
            )
        return picture


def is_plain_split(data: object) -> bool:
    """Whether an object is a split of the package `datasets` without a format or transform that changes items.

    The package need not be imported.
    """
    if not all(hasattr(data, name) for name in ("column_names", "features", "__getitem__")):
        return False
    return (getattr(data, "format", None) or {}).get("type") is None


def load_hub(name: str, **preprocessing: Any) -> HubImages:
    """Read a split of a data set through Hugging Face's `datasets`, which downloads missing files.

    Args:
        name: NAME or NAME:SPLIT of the hub; or FOLDER or FOLDER:SPLIT for a folder that ``save_to_disk`` wrote or
            ``load_dataset`` reads. The default split is test, or else validation.
        preprocessing: resize, crop, interpolation and workers, as `HubImages` takes them.

    Returns:
        The pictures of the split, which are decoded when they are read.

    Raises:
        ImportError: if `datasets` or Pillow is not installed.
        FileNotFoundError: if the data set cannot be read.
        ValueError: if it has no such split, or not the columns.
    """
    datasets = _import_datasets()
    source, split = name, ""
    if not Path(name).exists() and ":" in name:
        source, _, split = name.rpartition(":")
    if not source:
        raise ValueError(f"data must be hf:NAME or hf:NAME:SPLIT, got 'hf:{name}'")
    try:
        saved = _saved(datasets, source)
        names = list(datasets.get_dataset_split_names(source) if saved is None else saved)
    except Exception as error:
        raise _unreadable(source, error) from error
    chosen = split or next((known for known in _TEST_SPLITS if known in names), "")
    if not chosen and len(names) == 1:
        chosen = names[0]
    if chosen not in names:
        raise ValueError(
            f"data must name a split of {source}, which has {', '.join(names)}: hf:{source}:SPLIT"
            + (f", got {split!r}" if split else "")
        )
    try:
        found = datasets.load_dataset(source, split=chosen) if saved is None else saved[chosen]
    except Exception as error:
        raise _unreadable(source, error) from error
    return HubImages(found, name=f"{Path(source).name} {chosen}".strip(), **preprocessing)


def _saved(datasets: Any, source: str) -> dict[str, Any] | None:
    """The splits by name in a folder that ``save_to_disk`` wrote; a single split is "". None for other folders."""
    path = Path(source)
    if (path / "dataset_dict.json").is_file():
        return dict(datasets.load_from_disk(source))
    if (path / "state.json").is_file():
        return {"": datasets.load_from_disk(source)}
    return None


def _unreadable(source: str, error: Exception) -> FileNotFoundError:
    """The exception for an error of the network, the hub or a file."""
    return FileNotFoundError(
        f"hf:{source}: datasets could not read it ({type(error).__name__}: {error})"
    )


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "data sets by hf:NAME are read by Hugging Face's datasets: pip install datasets"
        ) from error
    return datasets
