"""Labelled images in memory, as uint8: the class that the readers return and the loader takes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastadv.ops.checks import INTEGER_DTYPES, check_values, one_hot_hint
from fastadv.ops.values import check_device, integer, shown

if TYPE_CHECKING:
    from fastadv.data.streaming import StreamedData

_CHANNELS = (1, 3, 4)  # numbers of channels that pictures have
# For modes of PIL images whose numbers are indices into a palette or single bits: the mode to convert to.
_PLAIN_MODES = {"P": "RGB", "PA": "RGBA", "1": "L"}


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images with labels.

    Attributes:
        images: uint8 [N, C, H, W], 0..255.
        labels: int64 [N], each in 0 .. num_classes - 1; other integers become int64.
        num_classes: number of classes.
        name: the name for messages and logs, e.g. "cifar10 train".

    Raises:
        TypeError: if a dtype is wrong, or num_classes is not an integer.
        ValueError: if shapes do not agree, images look like [N, H, W, C], or a label is out of range.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    name: str

    def __post_init__(self) -> None:
        for name in ("images", "labels"):
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {shown(value)}; see from_tensors")
        if self.images.dtype != torch.uint8:
            raise TypeError(f"images must be uint8, got {self.images.dtype}; see from_tensors")
        if self.images.dim() != 4:
            raise ValueError(f"images must be [N, C, H, W], got shape {tuple(self.images.shape)}")
        if self.labels.dtype not in INTEGER_DTYPES:
            raise TypeError(
                f"labels must be integers, got {self.labels.dtype}{one_hot_hint('labels', self.labels)}"
            )
        if self.labels.dtype != torch.int64:
            object.__setattr__(self, "labels", self.labels.to(torch.int64))
        if self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels must be [N] with N = {len(self.images)} as in images, "
                f"got shape {tuple(self.labels.shape)}"
            )
        check_channels_first("images", tuple(self.images.shape[1:]))
        classes = integer("num_classes", self.num_classes, at_least=1)
        object.__setattr__(self, "num_classes", classes)
        _check_label_range(self.labels, self.num_classes)

    def __repr__(self) -> str:
        size = "x".join(map(str, self.images.shape[1:]))
        return f"{type(self).__name__}({self.name!r}, {len(self)} images of {size}, {self.num_classes} classes)"

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def in_channels(self) -> int:
        """Number of channels C."""
        return self.images.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.images.shape[2], self.images.shape[3]

    def select(self, indices: Tensor, name: str | None = None) -> ImageData:
        """Return the images at `indices` (int64 [M]) as data of their own."""
        indices = indices.to(self.labels.device)
        return replace(
            self,
            images=self.images[indices],
            labels=self.labels[indices],
            name=self.name if name is None else name,
        )

    def joined(self, other: ImageData, name: str) -> ImageData:
        """Return these images followed by the images of `other`, which have the same classes.

        Args:
            other: images of the same size.
            name: the name of `other` in messages.

        Raises:
            ValueError: if it has images of another shape, or a label outside of these classes.
        """
        if other.images.shape[1:] != self.images.shape[1:]:
            raise ValueError(
                f"{name} must have images {list(self.images.shape[1:])} like {self.name!r}, "
                f"got {list(other.images.shape[1:])}"
            )
        if len(other) and int(other.labels.max()) >= self.num_classes:
            raise ValueError(
                f"{name} must have labels in 0 .. {self.num_classes - 1} like {self.name!r}, "
                f"got {int(other.labels.max())}"
            )
        return replace(
            self,
            images=torch.cat((self.images, other.images.to(self.images.device))),
            labels=torch.cat((self.labels, other.labels.to(self.labels.device))),
        )

    def to(self, device: torch.device | str | None) -> ImageData:
        """Return the same data on a device (None: where it is)."""
        if device is None:
            return self
        device = check_device(device)
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


@dataclass(frozen=True, eq=False)
class Splits:
    """A data set's training and test images.

    Attributes:
        train: training images, in memory or read when they are needed.
        test: test images.
        source: a record in JSON types by which a run finds the images again; None for images from the caller's
            code.
    """

    train: ImageData | StreamedData
    test: ImageData
    source: Mapping[str, Any] | None = None


def from_tensors(
    images: Tensor, labels: Tensor, num_classes: int | None = None, name: str = "tensors"
) -> ImageData:
    """Make data of a pair of tensors (or numpy arrays).

    Args:
        images: [N, C, H, W]; either uint8 in 0..255, or floating point in 0..1, which is rounded to
            the nearest of the 256 levels.
        labels: [N], any integer dtype.
        num_classes: number of classes; by default the largest label + 1.
        name: the name in messages.

    Returns:
        The data; uint8 images and int64 labels are not copied.

    Raises:
        TypeError: if images are neither uint8 nor floating point, or labels are not integers.
        ValueError: if shapes do not agree, images look like [N, H, W, C], a pixel is not finite or
            outside 0..1, a label is out of range, or there is nothing to infer num_classes from.
    """
    images, labels = _as_tensor("images", images), _as_tensor("labels", labels)
    if labels.dtype not in INTEGER_DTYPES:
        raise TypeError(
            f"labels must be integers, got {labels.dtype}{one_hot_hint('labels', labels)}"
        )
    if labels.dim() != 1:
        raise ValueError(
            f"labels must be class indices [N], got shape {tuple(labels.shape)}"
            + one_hot_hint("labels", labels)
        )
    labels = labels.to(torch.int64)
    if num_classes is None:
        if labels.numel() == 0:
            raise ValueError("num_classes must be given for empty labels, got None")
        num_classes = int(labels.max()) + 1
        _warn_of_labels_from_one(labels, name)
    data = ImageData(_to_uint8(images), labels, num_classes, name)
    _warn_of_dark_images(data.images, name)
    return data


def _warn_of_labels_from_one(labels: Tensor, name: str) -> None:
    first, last = (int(value) for value in torch.aminmax(labels))
    if first == 1 < last:
        warnings.warn(
            f"labels of {name} are in 1 .. {last}, counted from 1, so that class 0 of {last + 1} has no image; "
            f"subtract 1, or give num_classes",
            stacklevel=3,
        )


def _warn_of_dark_images(images: Tensor, name: str) -> None:
    if images.numel() > 0 and int(images.max()) == 1:
        warnings.warn(
            f"images of {name} hold nothing but 0 and 1 of 0 .. 255, which is black; uint8 images must be in "
            "0 .. 255, floating-point images in 0 .. 1, not divided by 255 twice",
            stacklevel=3,
        )


def _as_tensor(name: str, value: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        check_values(name, value)
    try:
        return torch.as_tensor(value, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a tensor or an array, got {shown(value)}") from error


def from_dataset(
    dataset: Dataset[Any], num_classes: int | None = None, name: str | None = None
) -> ImageData:
    """Read a whole map-style torch Dataset of (image, label) pairs into memory.

    Args:
        dataset: items (image, label); an image is a tensor [C, H, W] as `from_tensors` takes it,
            or a PIL image or array [H, W] or [H, W, C] of uint8. All have one size.
        num_classes: number of classes; by default the largest label + 1.
        name: the name in messages; by default the dataset's class.

    Returns:
        The images as uint8 [N, C, H, W], and their labels [N].

    Raises:
        ValueError: if the dataset is empty, its images differ in shape, or a label is no class index.
        TypeError: for items of another kind.
    """
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        hint = "; pass its dataset" if isinstance(dataset, DataLoader) else ""
        raise TypeError(f"dataset must be a map-style Dataset, got {type(dataset).__name__}{hint}")
    length = len(cast(Sized, dataset))
    if length == 0:
        raise ValueError("dataset must have at least one item, got none")
    items = [dataset[i] for i in range(length)]
    for i, item in enumerate(items):
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise TypeError(f"item {i} of dataset must be a pair (image, label), got {_kind(item)}")
    classes = [item_label(label, i) for i, (_, label) in enumerate(items)]
    if min(classes) < 0:
        raise ValueError(
            f"the label of item {classes.index(min(classes))} of dataset must be >= 0, got {min(classes)}"
        )
    images = [item_image(image) for image, _ in items]
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise ValueError(f"images of dataset must have one shape, got {sorted(shapes)[:3]}")
    labels = torch.tensor(classes, device="cpu")
    return from_tensors(torch.stack(images), labels, num_classes, name or type(dataset).__name__)


def _kind(item: object) -> str:
    """An item of a dataset, for messages."""
    return f"{len(item)} values" if isinstance(item, tuple | list) else shown(item)


def item_label(label: object, index: int) -> int:
    """Return the label of a Dataset's item as an integer.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it holds several numbers.
    """
    kind, found = f"the label of item {index} of dataset", label
    if isinstance(label, Tensor | np.ndarray):
        if math.prod(label.shape) != 1:
            raise ValueError(
                f"{kind} must be one class index, got shape {tuple(label.shape)}; of a one-hot label return "
                "label.argmax()"
            )
        found = label.item()
    if not isinstance(found, Integral) or isinstance(found, bool):
        raise TypeError(f"{kind} must be an integer, the index of a class, got {label!r}")
    return int(found)


def check_channels_first(name: str, shape: Sequence[int]) -> None:
    """Refuse images [H, W, C], whose rows would be taken for channels.

    Args:
        name: the images' name in messages.
        shape: of one image, [C, H, W] where it is right.

    Raises:
        ValueError: if the last axis alone is as long as pictures have channels.
    """
    if has_channels_at(2, shape):
        raise ValueError(
            f"{name} must have axes C, H, W, got {tuple(shape)}, which looks like H, W, C; bring the channels to "
            "the front, with permute(2, 0, 1) of one image or permute(0, 3, 1, 2) of a batch"
        )


def has_channels_at(axis: int, shape: Sequence[int]) -> bool:
    """Whether this axis of an image, and no other, is as long as pictures have channels."""
    others = [length for i, length in enumerate(shape) if i != axis]
    return len(shape) == 3 and shape[axis] in _CHANNELS and min(others) > max(_CHANNELS)


def item_image(image: object) -> Tensor:
    """Return one image of a Dataset as [C, H, W]; see `from_dataset`."""
    if isinstance(image, Tensor):
        return image
    plain = _PLAIN_MODES.get(getattr(image, "mode", ""))
    if plain is not None:
        image = cast(Any, image).convert(plain)
    array = np.array(image)  # a copy: arrays of PIL images are read-only
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise TypeError(
            "an image of dataset must be a tensor [C, H, W] or a uint8 picture [H, W] or "
            f"[H, W, C], got {type(image).__name__}"
        )
    pixels = torch.from_numpy(array)
    if has_channels_at(0, pixels.shape):
        raise ValueError(
            f"a picture of dataset must have axes H, W, C, got an array {tuple(pixels.shape)}, which looks like "
            "C, H, W; return it as a tensor"
        )
    return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)


def _to_uint8(images: Tensor) -> Tensor:
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise TypeError(f"images must be uint8 or floating point, got {images.dtype}")
    if images.numel() == 0:
        return images.to(torch.uint8)
    low, high = (float(value) for value in torch.aminmax(images))
    if not (low >= 0 and high <= 1):  # also catches NaN
        raise ValueError(f"floating-point images must be in 0..1, got {low} .. {high}")
    return (images.to(torch.float32) * 255).round().to(torch.uint8)


def _check_label_range(labels: Tensor, num_classes: int) -> None:
    if labels.numel() == 0:
        return
    low, high = (int(value) for value in torch.aminmax(labels))
    if low < 0 or high >= num_classes:
        raise ValueError(f"labels must be in 0 .. {num_classes - 1}, got {low} .. {high}")
