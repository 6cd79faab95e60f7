"""The images and labels of an evaluation, batch by batch in float32."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from fastadv.data.lazy import as_lazy, of_loader, read_once
from fastadv.evaluation.sources import ImageSource, TensorSource, first_or_spread, open_source
from fastadv.ops.checks import INTEGER_DTYPES, check_values, one_hot_hint
from fastadv.ops.values import check_bounds, check_radius, integer, limit, norm_name

R = TypeVar("R")  # a radius, or several
DEFAULT_EPS = 8 / 255


@dataclass(frozen=True)
class Samples:
    """Labelled images that are read and converted only when they are used.

    Attributes:
        source: the images, uint8 (0 to 255 stands for the whole of ``bounds``) or floating point within
            ``bounds``.
        labels: [N] int64.
        bounds: smallest and largest value of an image given to the model.
        name: the name of the data in reports.
        num_classes: number of classes of the data set, where it says so.
    """

    source: ImageSource
    labels: Tensor
    bounds: tuple[float, float]
    name: str
    num_classes: int | None = None

    def __len__(self) -> int:
        """Number of images."""
        return self.labels.shape[0]

    @property
    def image_shape(self) -> torch.Size:
        """Shape of one image, usually [C, H, W]."""
        return self.source.shape

    def batches(self, batch_size: int, indices: Tensor | None = None) -> tuple[Tensor, ...]:
        """Split the indices of some images, by default of all, into batches. Indices are int64 on the CPU.

        Worker processes read the batches ahead in this order, so that they should be taken in this order.
        """
        indices = torch.arange(len(self), device="cpu") if indices is None else indices
        self.source.expect(indices)
        return indices.split(batch_size) if len(indices) else ()

    def part(self, indices: Tensor) -> Samples:
        """Return some of the images as samples; for all images, these samples themselves."""
        if len(indices) == len(self):
            return self
        labels = self.labels[indices.to(self.labels.device)]
        return replace(self, source=self.source.part(indices), labels=labels)

    def take(self, indices: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images [B, ...] float32 and labels [B] int64 of these indices, on a device."""
        images = self.source.read(indices).to(device)
        labels = self.labels[indices.to(self.labels.device)].to(device)
        if images.dtype == torch.uint8:
            low, high = self.bounds
            images = images.to(torch.float32).div_(255)
            if (low, high) != (0.0, 1.0):
                images = images.mul_(high - low).add_(low).clamp_(low, high)
        return images.to(torch.float32).contiguous(), labels

    def fingerprint(self) -> str:
        """SHA-256 that stands for the images and their labels, without reading all images of a Dataset."""
        return self.source.fingerprint(self.labels)


def as_samples(data: Any, bounds: tuple[float, float], max_examples: int | None = None) -> Samples:
    """Check a user's data and wrap them.

    Args:
        data: an object with ``images`` and ``labels`` (``fastadv.data.ImageData``), a pair of tensors (images,
            labels), a map-style torch ``Dataset`` of pairs (image, label), a ``DataLoader``, or samples.
        bounds: the range of image values.
        max_examples: the number of images to keep: the first ones, or evenly spread ones where the labels are
            known and in ascending order. None keeps all.

    Raises:
        TypeError: for another kind of data or another dtype.
        ValueError: for empty data, lengths that differ, float images that leave ``bounds``, or a Dataset whose
            items change.
    """
    bounds = check_bounds(bounds)
    if max_examples is not None:
        max_examples = integer("max_examples", max_examples, at_least=1)
    if isinstance(data, Samples):
        return _restricted(data, bounds, max_examples)
    lazy = None
    if isinstance(data, DataLoader):
        lazy = of_loader(data)
        if lazy is None:
            name = type(data.dataset).__name__
            images, labels = read_once(data, max_examples)
            return _in_memory(images, labels, name, None, bounds, max_examples)
    elif not _holds_tensors(data):
        lazy = as_lazy(data)
    if lazy is None:
        images, labels, name = _unpack(data)
        classes = getattr(data, "num_classes", None)
        return _in_memory(images, labels, name, classes, bounds, max_examples)
    if type(lazy.dataset) is TensorDataset and len(lazy.dataset.tensors) == 2:
        return _in_memory(*lazy.dataset.tensors, lazy.name, None, bounds, max_examples)
    source, labels = open_source(lazy, bounds, max_examples)
    return Samples(source, labels, bounds, lazy.name, lazy.num_classes)


def _in_memory(
    images: Tensor,
    labels: Tensor,
    name: str,
    num_classes: int | None,
    bounds: tuple[float, float],
    max_examples: int | None,
) -> Samples:
    if (
        max_examples is not None
        and 0 < max_examples < len(images)
        and labels.shape == images.shape[:1]
    ):
        chosen = first_or_spread(labels, max_examples).to(labels.device)
        images, labels = images[chosen.to(images.device)], labels[chosen]
    _check_images(images, bounds)
    labels = _checked_labels(labels, images)
    return Samples(TensorSource(images.detach()), labels, bounds, name, num_classes)


def _holds_tensors(data: Any) -> bool:
    """Whether all images are in memory. A Dataset with tensor attributes does not count: it may transform them."""
    return not isinstance(data, Dataset) and all(
        isinstance(getattr(data, name, None), Tensor) for name in ("images", "labels")
    )


def _restricted(samples: Samples, bounds: tuple[float, float], max_examples: int | None) -> Samples:
    """The samples within other bounds (uint8 images only), or fewer of them."""
    if bounds != samples.bounds and samples.source.dtype != torch.uint8:
        raise ValueError(
            f"bounds must be the bounds of the samples, {samples.bounds}, got {bounds}"
        )
    samples = replace(samples, bounds=bounds)
    if max_examples is None or max_examples >= len(samples):
        return samples
    return samples.part(first_or_spread(samples.labels, max_examples))


def check_eps(eps: float, norm: str, samples: Samples) -> float:
    """Require a radius in the units of the images, and return it as a float.

    Raises:
        TypeError: it is no number.
        ValueError: it is negative, not finite, or larger than any distance between two images.
    """
    eps = limit("eps", eps)
    check_radius("eps", eps, norm, samples.bounds, math.prod(samples.image_shape))
    return eps


def radius_or_default(eps: R | None, norm: str, bounds: tuple[float, float]) -> R | float:
    """Return the given radius or radii; by default 8/255, for linf and images in 0..1 only.

    Raises:
        ValueError: it is missing for another norm or other bounds.
    """
    if eps is not None:
        return eps
    norm, (low, high) = norm_name(norm), check_bounds(bounds)
    if norm != "linf" or (low, high) != (0.0, 1.0):
        where = f"norm {norm}" if norm != "linf" else f"bounds {low:g} {high:g}"
        raise ValueError(
            f"eps must be given with {where}; it is 8/255 by default in linf within bounds 0 1 alone"
        )
    return DEFAULT_EPS


def check_batch_size(batch_size: int) -> int:
    """Require at least one image per batch."""
    return integer("batch_size", batch_size, at_least=1)


def _unpack(data: Any) -> tuple[Tensor, Tensor, str]:
    if hasattr(data, "images") and hasattr(data, "labels"):
        pair, name = (data.images, data.labels), str(getattr(data, "name", "data"))
    elif isinstance(data, (tuple, list)) and len(data) == 2:
        pair, name = (data[0], data[1]), "tensors"
    else:
        raise refusal(data)
    for role, value in zip(("images", "labels"), pair, strict=True):
        if not isinstance(value, Tensor):
            array = "; pass torch.as_tensor of it" if isinstance(value, list | np.ndarray) else ""
            raise TypeError(f"{role} of data must be a tensor, got {type(value).__name__}{array}")
    return pair[0], pair[1], name


def refusal(data: object) -> TypeError:
    """The error of data of a kind that is not accepted, which says how to give them."""
    hint = ""
    if isinstance(data, IterableDataset):
        hint = "; put it into a DataLoader"
    elif isinstance(data, Tensor):
        hint = "; pass images and labels as one pair, (images, labels)"
    elif isinstance(data, str):
        hint = "; pass fastadv.data.load_dataset(name).test"
    return TypeError(
        "data must be an ImageData, a pair of tensors (images, labels), a map-style Dataset or a DataLoader, got "
        f"{type(data).__name__}{hint}"
    )


def _check_images(images: Tensor, bounds: tuple[float, float]) -> None:
    check_values("images", images)
    if images.dim() < 2 or images.numel() == 0:
        raise ValueError(
            f"images must be [N, ...] with at least one image and no axis of length 0, got shape "
            f"{tuple(images.shape)}"
        )
    if images.dtype == torch.uint8:
        return
    if not images.is_floating_point():
        raise TypeError(f"images must be uint8 or floating point, got {images.dtype}")
    low, high = (float(value) for value in torch.aminmax(images.detach()))
    if not (low >= bounds[0] and high <= bounds[1]):  # written so that NaN fails too
        raise ValueError(f"images must lie within bounds {bounds}, got values from {low} to {high}")


def _checked_labels(labels: Tensor, images: Tensor) -> Tensor:
    """The labels in int64."""
    check_values("labels", labels)
    if labels.dtype not in INTEGER_DTYPES:
        raise TypeError(
            f"labels must be integers, got {labels.dtype}{one_hot_hint('labels', labels)}"
        )
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels must be [N] with N = {images.shape[0]} images, got shape {tuple(labels.shape)}"
            + one_hot_hint("labels", labels)
        )
    labels = labels.detach().to(torch.int64)
    if int(labels.min()) < 0:
        raise ValueError(f"labels must be >= 0, got {int(labels.min())}")
    return labels
