"""Gather, random crop, random flip and scaling of uint8 images in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.ops import checks
from fastadv.ops.philox import philox
from fastadv.ops.registry import Op, define
from fastadv.seeding import draw_seed

MODES = ("constant", "reflect")


def _reference(
    images: Tensor,
    indices: Tensor,
    pad: int,
    mode: str,
    flip: bool,
    seed: int,
    sample_ids: Tensor,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    _, channels, height, width = images.shape
    words = philox(seed, sample_ids, 1)
    shifts = words[:, :2] % (2 * pad + 1) - pad  # [B, 2]: down, right
    flipped = (words[:, 2:3] & 1).bool() if flip else torch.zeros_like(words[:, 2:3]).bool()
    rows = torch.arange(height, device=images.device) + shifts[:, :1]  # [B, H]
    columns = torch.arange(width, device=images.device).expand(len(indices), width)
    columns = torch.where(flipped, width - 1 - columns, columns) + shifts[:, 1:]  # [B, W]
    row_inside, column_inside = _is_inside(rows, height), _is_inside(columns, width)
    inside = row_inside[:, :, None] & column_inside[:, None, :]  # [B, H, W]
    rows, columns = _fold(rows, height, mode), _fold(columns, width, mode)
    sample = indices[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    pixels = images[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]
    # A tensor divisor: CUDA turns division by a Python number into a product with its reciprocal.
    scaled = pixels.to(torch.float32) / torch.full((), 255.0, device=images.device)
    if mode == "constant":
        scaled = torch.where(inside[:, None], scaled, 0.0)
    out = _empty(images, indices, dtype, channels_last)
    return out.copy_(scaled)


def _is_inside(position: Tensor, size: int) -> Tensor:
    return (position >= 0) & (position < size)


def _fold(position: Tensor, size: int, mode: str) -> Tensor:
    """The position from which each one is read: its own inside the image, and one by ``mode`` outside."""
    if mode == "constant":
        return position.clamp(0, size - 1)
    position = position.abs()
    return torch.where(position >= size, 2 * (size - 1) - position, position)


def _empty(images: Tensor, indices: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(
        (indices.shape[0], *images.shape[1:]),
        dtype=dtype,
        device=images.device,
        memory_format=memory_format,
    )


def _fake(
    images: Tensor,
    indices: Tensor,
    pad: int,
    mode: str,
    flip: bool,
    seed: int,
    sample_ids: Tensor,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    torch._check(images.dtype == torch.uint8, lambda: "images must be uint8")
    torch._check(images.dim() == 4, lambda: "images must have four axes")
    return _empty(images, indices, dtype, channels_last)


_op = define(
    Op(
        "crop_flip",
        "(Tensor images, Tensor indices, int pad, str mode, bool flip, SymInt seed, Tensor sample_ids, "
        "ScalarType dtype, bool channels_last) -> Tensor",
        reference=_reference,
        fake=_fake,
        triton="crop_flip:crop_flip",
        without={"CUDA C++": "Triton suffices, see kernels/crop_flip.py"},
        batched=("indices", "sample_ids"),
    )
)


def crop_flip(
    images: Tensor,
    indices: Tensor,
    pad: int = 4,
    mode: str = "constant",
    flip: bool = True,
    seed: int | None = None,
    *,
    sample_ids: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Tensor:
    """Augmented batch from a uint8 data set in the device's memory: gather, random crop, flip, scale to 0..1.

    Each image is padded by ``pad`` on every side, a window of its own size is cut at a random place, and
    with probability 1/2 the window is mirrored. The draws are word 0 (down), 1 (right) and 2 (mirror) of
    the sample's first Philox block (see `fastadv.ops.philox`), so they depend on seed and sample id alone.
    Pixels are ``value / 255`` in float32, rounded to ``dtype``; every backend gives the same bits.

    Args:
        images: the data set, uint8 [N, C, H, W].
        indices: which images, int64 [B], each in 0 .. N-1.
        pad: width of the border, in pixels; 0 means no crop.
        mode: the content of the border: zeros for ``"constant"``, the mirrored image for ``"reflect"``.
        flip: mirror half of the images.
        seed: the key of the numbers; None draws one from torch's default generator.
        sample_ids: int64 [B], which numbers each image gets; default ``indices``.
        dtype: float dtype of the result.
        channels_last: memory layout of the result.

    Returns:
        [B, C, H, W] in 0..1.

    Raises:
        TypeError: ``images`` is not uint8, ``indices`` not int64, ``dtype`` no float dtype, ``pad`` or ``seed`` no
            integer, or ``flip`` or ``channels_last`` no bool.
        ValueError: wrong number of axes, devices differ, pad negative or, for reflect, not smaller than the
            image, ``seed`` of more than 64 bits.
        IndexError: an index out of range (on the CPU; a GPU is not made to wait for the check).
    """
    pad = _checked_pad(images, indices, pad, mode, dtype)
    flip = checks.check_bool("flip", flip)
    channels_last = checks.check_bool("channels_last", channels_last)
    sample_ids = indices if sample_ids is None else sample_ids
    checks.check_sample_ids(sample_ids, indices)
    if seed is None:
        seed = draw_seed() if pad or flip else 0
    seed = checks.check_seed(seed)
    return torch.ops.fastadv.crop_flip(
        images, indices, pad, mode, flip, seed, sample_ids, dtype, channels_last
    )


def _checked_pad(images: Tensor, indices: Tensor, pad: int, mode: str, dtype: torch.dtype) -> int:
    """Check these arguments, whose ranges depend on each other, and return pad as Python's integer."""
    checks.check_tensor("images", images)
    checks.check_tensor("indices", indices)
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    if images.dim() != 4:
        raise ValueError(f"images must have axes [N, C, H, W], got shape {tuple(images.shape)}")
    if indices.dtype != torch.int64:
        raise TypeError(f"indices must be int64, got {indices.dtype}")
    if indices.dim() != 1:
        raise ValueError(f"indices must have one axis, got shape {tuple(indices.shape)}")
    checks.check_same_device("indices", indices, "images", images)
    if not isinstance(dtype, torch.dtype) or dtype not in checks.FLOAT_DTYPES:
        raise TypeError(f"dtype must be a float dtype, got {dtype}")
    checks.check_choice("mode", mode, MODES)
    pad = checks.integer("pad", pad)
    limit = min(images.shape[2:]) if mode == "reflect" else 1 << 30
    if not 0 <= pad < limit:
        raise ValueError(f"pad must be >= 0 and, for reflect, < {limit}, got {pad}")
    if checks.is_readable(indices) and indices.numel() and not _in_range(indices, images.shape[0]):
        raise IndexError(
            f"indices must be in 0 .. {images.shape[0] - 1}, got {int(indices.min())} .. {int(indices.max())}"
        )
    return pad


def _in_range(indices: Tensor, size: int) -> bool:
    low, high = torch.aminmax(indices)
    return int(low) >= 0 and int(high) < size
