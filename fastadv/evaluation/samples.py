"""The images and labels of an evaluation, batch by batch in float32."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastadv.ops.checks import INTEGER_DTYPES
from fastadv.ops.values import check_bounds, check_radius, integer, limit


@dataclass(frozen=True)
class Samples:
    """Labelled images that are converted only when they are used.

    Attributes:
        images: [N, ...], uint8 (0 to 255 stands for the whole of ``bounds``) or floating point within ``bounds``.
        labels: [N] int64.
        bounds: smallest and largest value of an image given to the model.
        name: what the data is called in reports.
        num_classes: of the data set, where it says so.
    """

    images: Tensor
    labels: Tensor
    bounds: tuple[float, float]
    name: str
    num_classes: int | None = None

    def __len__(self) -> int:
        """Number of images."""
        return self.labels.shape[0]

    def batches(self, batch_size: int, indices: Tensor | None = None) -> tuple[Tensor, ...]:
        """Split the indices of some images, by default of all, into batches. Indices are int64 on the CPU."""
        indices = torch.arange(len(self)) if indices is None else indices
        return indices.split(batch_size) if len(indices) else ()

    def part(self, indices: Tensor) -> Samples:
        """Some of the images; all of them are these samples themselves."""
        if len(indices) == len(self):
            return self
        images = self.images[indices.to(self.images.device)]
        return replace(self, images=images, labels=self.labels[indices.to(self.labels.device)])

    def take(self, indices: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images [B, ...] float32 and labels [B] int64 of these indices, on a device."""
        images = self.images[indices.to(self.images.device)].to(device)
        labels = self.labels[indices.to(self.labels.device)].to(device)
        if images.dtype == torch.uint8:
            low, high = self.bounds
            images = images.to(torch.float32).div_(255)
            if (low, high) != (0.0, 1.0):
                images = images.mul_(high - low).add_(low).clamp_(low, high)
        return images.to(torch.float32).contiguous(), labels


def as_samples(data: Any, bounds: tuple[float, float], max_examples: int | None = None) -> Samples:
    """Check what a user calls data and wrap it.

    Args:
        data: an object with ``images`` and ``labels`` (``fastadv.data.ImageData``), or a pair of tensors
            (images, labels).
        bounds: the range of image values.
        max_examples: keep only the first so many.

    Raises:
        TypeError: for another kind of data or another dtype.
        ValueError: for empty data, lengths that differ, or float images that leave ``bounds``.
    """
    bounds = check_bounds(bounds)
    images, labels, name = _unpack(data)
    if max_examples is not None:
        max_examples = integer("max_examples", max_examples, at_least=1)
        images, labels = images[:max_examples], labels[:max_examples]
    _check_images(images, bounds)
    labels = _checked_labels(labels, images)
    classes = getattr(data, "num_classes", None)
    return Samples(images.detach(), labels, bounds, name, classes)


def check_eps(eps: float, norm: str, samples: Samples) -> float:
    """Require a radius in the units of the images, and return it as a float.

    Raises:
        TypeError: it is no number.
        ValueError: it is negative, not finite, or larger than any distance between two images.
    """
    eps = limit("eps", eps)
    check_radius("eps", eps, norm, samples.bounds, samples.images[0].numel())
    return eps


def check_batch_size(batch_size: int) -> int:
    """Require at least one image per batch."""
    return integer("batch_size", batch_size, at_least=1)


def _unpack(data: Any) -> tuple[Tensor, Tensor, str]:
    if isinstance(data, Samples) or (hasattr(data, "images") and hasattr(data, "labels")):
        pair, name = (data.images, data.labels), str(getattr(data, "name", "data"))
    elif isinstance(data, (tuple, list)) and len(data) == 2:
        pair, name = (data[0], data[1]), "tensors"
    else:
        raise TypeError(
            "data must be an ImageData or a pair of tensors (images, labels), "
            f"got {type(data).__name__}"
        )
    for role, value in zip(("images", "labels"), pair, strict=True):
        if not isinstance(value, Tensor):
            raise TypeError(f"{role} of data must be a tensor, got {type(value).__name__}")
    return pair[0], pair[1], name


def _check_images(images: Tensor, bounds: tuple[float, float]) -> None:
    if images.dim() < 2 or images.shape[0] == 0:
        raise ValueError(
            f"images must be [N, ...] with at least one image, got shape {tuple(images.shape)}"
        )
    if images.dtype == torch.uint8:
        return
    if not images.is_floating_point():
        raise TypeError(f"images must be uint8 or floating point, got {images.dtype}")
    low, high = float(images.min()), float(images.max())
    if not (low >= bounds[0] and high <= bounds[1]):  # written so that NaN fails too
        raise ValueError(f"images must lie within bounds {bounds}, got values from {low} to {high}")


def _checked_labels(labels: Tensor, images: Tensor) -> Tensor:
    """The labels in int64."""
    if labels.dtype not in INTEGER_DTYPES:
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels must be [N] with N = {images.shape[0]} images, got shape {tuple(labels.shape)}"
        )
    labels = labels.detach().to(torch.int64)
    if int(labels.min()) < 0:
        raise ValueError(f"labels must be >= 0, got {int(labels.min())}")
    return labels
