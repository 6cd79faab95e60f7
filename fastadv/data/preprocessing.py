"""Pictures of any size as tensors of one size: resize of the shorter side, then a crop from the middle."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastadv.ops.values import check_choice, integer

Interpolation = Literal["bilinear", "bicubic"]
_INTERPOLATIONS = ("bilinear", "bicubic")


@dataclass(frozen=True)
class Preprocessing:
    """Resize and centre crop of a picture, as in torchvision.

    Attributes:
        resize: pixels of the shorter side; None leaves the size as it is.
        crop: pixels of each side of the square that is cut out of the middle; None keeps all.
        interpolation: interpolation of the resizing, which is antialiased.

    Raises:
        TypeError: if a number is not an integer.
        ValueError: if a number is out of range, or the interpolation is unknown.
    """

    resize: int | None = None
    crop: int | None = None
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        for name in ("resize", "crop"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, integer(name, value, at_least=1))
        check_choice("interpolation", self.interpolation, _INTERPOLATIONS)
        if self.resize is not None and self.crop is not None and self.crop > self.resize:
            raise ValueError(
                f"crop must be at most resize, which is {self.resize}, got {self.crop}"
            )

    def __call__(self, picture: Any) -> Any:
        """Return a PIL image, resized and cropped.

        Raises:
            ValueError: if it is smaller than the crop.
        """
        if self.resize is not None:
            width, height = picture.size
            short, long = min(width, height), max(width, height)
            longer = int(self.resize * long / short)
            size = (self.resize, longer) if width <= height else (longer, self.resize)
            if size != picture.size:
                picture = picture.resize(size, resampling(self.interpolation))
        if self.crop is not None:
            width, height = picture.size
            if min(width, height) < self.crop:
                raise ValueError(
                    f"crop must be at most the size of each image, {width} x {height} here, got {self.crop}; "
                    "resize makes them larger"
                )
            left, top = round((width - self.crop) / 2), round((height - self.crop) / 2)
            picture = picture.crop((left, top, left + self.crop, top + self.crop))
        return picture

    def describe(self) -> str:
        """Describe the steps in words, for a name or a fingerprint; empty if there is no step."""
        parts = []
        if self.resize is not None:
            parts.append(f"resize {self.resize} {self.interpolation}")
        if self.crop is not None:
            parts.append(f"crop {self.crop}")
        return ", ".join(parts)


def import_pil() -> Any:
    """PIL's module Image.

    Raises:
        ImportError: if it is not installed, with the way to install it.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "decoding pictures needs Pillow: pip install 'fastadv[images]', or pip install pillow"
        ) from error
    return Image


def picture_tensor(picture: Any) -> Tensor:
    """A PIL image in mode L or RGB as uint8 [C, H, W]."""
    pixels = torch.from_numpy(np.array(picture))  # a copy: arrays of PIL images are read-only
    return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1).contiguous()


def default_workers(beside: int = 1) -> int:
    """The default number of processes that decode: one per core that this process may use, at most 8.

    Args:
        beside: number of processes that share the cores, each with decoding processes of its own.
    """
    usable = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return min(8, max(1, usable // beside))


def check_workers(workers: int | None) -> int:
    """A number of worker processes; None stands for the default.

    Raises:
        TypeError: if it is no integer.
        ValueError: if it is negative.
    """
    return default_workers() if workers is None else integer("workers", workers, at_least=0)


def same_size_hint(preprocessing: Preprocessing) -> str:
    """Advice for a message about pictures of different sizes; empty where a crop makes them equal."""
    if preprocessing.crop is None:
        return "; give resize and crop, such as 256 and 224, to bring them to one size"
    return ""


def resampling(interpolation: Interpolation) -> Any:
    """PIL's name of an interpolation."""
    return getattr(import_pil().Resampling, interpolation.upper())
