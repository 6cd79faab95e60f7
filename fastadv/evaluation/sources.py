"""The source of an evaluation's images: a tensor, or a Dataset that is read image by image."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sized
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from fastadv.data.item_reader import CHUNK, ItemReader
from fastadv.data.lazy import LazyData, known_labels
from fastadv.data.selection import evenly_spread
from fastadv.digest import digest_of

_PROBED = 16  # items that are read twice at the beginning
_HASHED = 64  # images of a Dataset that are part of its fingerprint


class ImageSource(Protocol):
    """Images by index."""

    @property
    def shape(self) -> torch.Size:
        """The shape of one image."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the images, uint8 or floating point."""

    def read(self, indices: Tensor) -> Tensor:
        """Return the images [B, ...] at indices int64 [B]."""

    def expect(self, indices: Tensor) -> None:
        """Announce the images that will be read next, in their order."""

    def part(self, indices: Tensor) -> ImageSource:
        """Return some of the images as a source of their own."""

    def fingerprint(self, labels: Tensor) -> str:
        """Return a SHA-256 that identifies the images with their labels [N]."""


@dataclass(frozen=True)
class TensorSource:
    """Images [N, ...] in memory."""

    images: Tensor

    @property
    def shape(self) -> torch.Size:
        """The shape of one image."""
        return self.images.shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the images."""
        return self.images.dtype

    def read(self, indices: Tensor) -> Tensor:
        """The images [B, ...] at indices int64 [B], on the device of the tensor."""
        return self.images[indices.to(self.images.device)]

    def expect(self, indices: Tensor) -> None:
        """Do nothing: all images are in memory."""

    def part(self, indices: Tensor) -> TensorSource:
        """Some of the images, copied."""
        return TensorSource(self.read(indices))

    def fingerprint(self, labels: Tensor) -> str:
        """SHA-256 of all images and labels."""
        return digest_of({"images": self.images, "labels": labels})


@dataclass(frozen=True)
class DatasetSource:
    """Images of a Dataset, which are read when they are asked for.

    Attributes:
        dataset: the Dataset.
        reader: the reader of the Dataset, which the parts of a source share.
        items: int64 [N], for each image the index of its item in the Dataset.
    """

    dataset: Any
    reader: ItemReader
    items: Tensor

    @property
    def shape(self) -> torch.Size:
        """The shape of one image."""
        return self.reader.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the images, uint8 or float32."""
        return cast(torch.dtype, self.reader.dtype)

    def read(self, indices: Tensor) -> Tensor:
        """The images [B, ...] at indices int64 [B], on the CPU."""
        return self.reader.read(self.items[indices.cpu()].tolist())

    def expect(self, indices: Tensor) -> None:
        """Read ahead in this order, where there are worker processes."""
        self.reader.expect(self.items[indices.cpu()])

    def part(self, indices: Tensor) -> DatasetSource:
        """Some of the images; nothing is read."""
        return DatasetSource(self.dataset, self.reader, self.items[indices.cpu()])

    def fingerprint(self, labels: Tensor) -> str:
        """SHA-256 of the labels and the result of the Dataset's own ``fingerprint(items)``.

        For a Dataset without this method the first, the last and 62 evenly spread images are hashed.
        """
        own = getattr(self.dataset, "fingerprint", None)
        if callable(own):
            said = hashlib.sha256(str(own(self.items)).encode())
            said.update(digest_of({"labels": labels}).encode())
            return said.hexdigest()
        n = len(self.items)
        chosen = torch.cat([torch.tensor([0, n - 1]), evenly_spread(n, _HASHED - 2)]).unique()
        return digest_of({"images": self.read(chosen), "labels": labels, "items": self.items})


def open_source(
    data: LazyData, bounds: tuple[float, float], max_examples: int | None
) -> tuple[DatasetSource, Tensor]:
    """Begin to read a Dataset.

    Args:
        data: the Dataset.
        bounds: smallest and largest value of floating-point images.
        max_examples: number of images to choose: evenly spread ones where the items are listed class by class,
            else the first ones.

    Returns:
        The source, and the labels [N] int64 of its images.

    Raises:
        TypeError: if an item is not an image with a label.
        ValueError: if there are no items, or they change from one reading to the next.
    """
    n = len(cast(Sized, data.dataset))
    if n == 0:
        raise ValueError("data must have at least one image, got an empty Dataset")
    count = n if max_examples is None else min(n, max_examples)
    workers = min(data.workers, math.ceil(count / CHUNK))
    options = data.options if workers else {}
    reader = ItemReader(data.dataset, bounds, workers=workers, **options)
    listed = known_labels(data.dataset)
    items = torch.arange(count)
    if listed is not None:
        items = first_or_spread(listed, count)
    probed = items[:_PROBED]
    first = reader.probe(probed.tolist())
    # The Dataset's list of labels is used only if it agrees with the labels of the probed items.
    if listed is not None and torch.equal(listed[probed], first):
        labels = listed[items]
        reader.trust(items, labels)
    else:
        labels = reader.labels(items)
    return DatasetSource(data.dataset, reader, items), labels


def first_or_spread(labels: Tensor, count: int) -> Tensor:
    """The first ``count`` indices of labels [N], int64; where images lie class by class, evenly spread ones."""
    n = len(labels)
    if count < n and _by_class(labels):
        return evenly_spread(n, count)
    return torch.arange(min(n, count))


def _by_class(labels: Tensor) -> bool:
    """Whether labels [N] are in ascending order, and not all the same."""
    return bool((labels[1:] >= labels[:-1]).all()) and bool(labels[0] != labels[-1])
