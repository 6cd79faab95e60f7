"""The linf step with numbers per image and channel, which `fastadv.ops.pgd_step` calls for such numbers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastadv.ops import checks
from fastadv.ops.pgd_step_reference import Rows, add_counts, chosen, linf
from fastadv.ops.registry import Op, define

Number = float | Tensor
Bounds = tuple[Number, Number]

_TRITON_SUFFICES = "Triton suffices, see kernels/pgd_step_per_channel.py"


def clipped(values: Tensor, limits: Tensor) -> Tensor:
    """Values [B, C, ...] within the bounds of ``limits``, as `channel_limits` returns them."""
    low, high = _over_images(limits, values, 2), _over_images(limits, values, 3)
    raised = torch.where(values < low, low, values)
    return torch.where(raised > high, high, raised)


def radii(limits: Tensor, like: Tensor) -> Tensor:
    """The radii of ``limits`` in a shape in which they broadcast over ``like`` [B, C, ...]."""
    return _over_images(limits, like, 0)


def _over_images(limits: Tensor, like: Tensor, column: int) -> Tensor:
    return limits[..., column].reshape(*limits.shape[:2], *[1] * (like.dim() - 2))


def _reference(
    adv: Tensor, grad: Tensor, x: Tensor, limits: Tensor, active: Tensor | None
) -> Tensor:
    # Written into `adv`'s own strides: a pointwise result would follow the operands' mixed layouts.
    out = torch.empty_like(adv)
    limits = limits.to(checks.accumulate_dtype(adv))
    operands = Rows(
        adv.to(limits.dtype),
        grad.to(checks.accumulate_dtype(grad)),
        x.to(limits.dtype),
        radii(limits, adv),
        _over_images(limits, adv, 1),
        sparsity=0.0,
    )
    out.copy_(clipped(linf(operands), limits))
    return chosen(active, out, adv)


def _reference_(
    adv: Tensor,
    grad: Tensor,
    x: Tensor,
    limits: Tensor,
    active: Tensor | None,
    counts: Tensor | None,
) -> None:
    add_counts(counts, grad, active)
    adv.copy_(_reference(adv, grad, x, limits, active))


# `limits` has, for each image and channel, the radius, the step size, the lowest and the highest value.
_ARGUMENTS = "Tensor grad, Tensor x, Tensor limits, Tensor? active"
define(
    Op(
        "pgd_step_per_channel",
        f"(Tensor adv, {_ARGUMENTS}) -> Tensor",
        reference=_reference,
        triton="pgd_step_per_channel:pgd_step_per_channel",
        without={"CUDA C++": _TRITON_SUFFICES},
        batched=("adv", "grad", "x", "limits", "active"),
    )
)
define(
    Op(
        "pgd_step_per_channel_",
        f"(Tensor(a!) adv, {_ARGUMENTS}, Tensor(b!)? counts) -> ()",
        reference=_reference_,
        triton="pgd_step_per_channel:pgd_step_per_channel_",
        without={"CUDA C++": _TRITON_SUFFICES},
    )
)


def varies_by_channel(eps: object, alpha: object, bounds: object, like: Tensor) -> bool:
    """Whether one of these is a tensor that is neither one number nor one per sample, or a bound any tensor."""
    pair = bounds if isinstance(bounds, tuple | list) else ()
    return any(isinstance(bound, Tensor) for bound in pair) or any(
        isinstance(value, Tensor) and not checks.is_per_sample(value, like)
        for value in (eps, alpha)
    )


def channel_limits(eps: Number, alpha: Number, bounds: Any, norm: str, like: Tensor) -> Tensor:
    """The numbers of a step as one tensor, [B, C, 4] in the dtype of computation.

    Args:
        eps: a number, one per sample [B], or one per channel [C, 1, ...], [1, C, 1, ...] or [B, C, 1, ...].
        alpha: likewise.
        bounds: a pair of such.
        norm: the norm of the ball.
        like: the images [B, C, ...].

    Raises:
        TypeError: one is neither a number nor a dense tensor of real numbers.
        ValueError: a shape or a device does not fit, a number is out of range, or the norm is not ``"linf"``.
    """
    is_pair = isinstance(bounds, tuple | list) and len(bounds) == 2
    if not (is_pair and any(isinstance(bound, Tensor) for bound in bounds)):
        checks.check_bounds(bounds)
    named = {"eps": eps, "alpha": alpha, "bounds[0]": bounds[0], "bounds[1]": bounds[1]}
    columns = [_column(name, value, norm, like) for name, value in named.items()]
    table = torch.stack(torch.broadcast_tensors(*columns), -1)
    return table.expand(like.shape[0], _channels(like), 4)


def numbers(name: str, value: Number, norm: str, like: Tensor) -> Number:
    """A radius or step size, checked as in `pgd_step`: a number, [B], or [B, C, 1, ...] for one per channel."""
    if isinstance(value, Tensor) and not checks.is_per_sample(value, like):
        column = _column(name, value, norm, like).expand(like.shape[0], _channels(like))
        return column.reshape(*column.shape, *[1] * (like.dim() - 2))
    number, values = checks.per_sample(name, value, like)
    return number if values is None else values


def image_bounds(bounds: object, norm: str, like: Tensor) -> Bounds:
    """Bounds, checked as `pgd_step` does: numbers, or tensors that broadcast over the images."""
    if not (isinstance(bounds, tuple | list) and any(isinstance(b, Tensor) for b in bounds)):
        return checks.check_bounds(bounds)
    if len(bounds) != 2:
        checks.check_bounds(bounds)
    low, high = (_column(f"bounds[{i}]", b, norm, like) for i, b in enumerate(bounds))
    ones = [1] * (like.dim() - 2)
    return low.reshape(*low.shape, *ones), high.reshape(*high.shape, *ones)


def _column(name: str, value: Number, norm: str, like: Tensor) -> Tensor:
    """One of the numbers, [B or 1, C or 1]."""
    dtype, is_bound = checks.accumulate_dtype(like), name.startswith("bounds")
    if not isinstance(value, Tensor):
        number = checks.number(name, value) if is_bound else checks.limit(name, value)
        if is_bound and not -math.inf < number < math.inf:
            raise ValueError(f"{name} must be finite, got {number}")
        # Not torch.full, for which torch.compile makes a graph of each number.
        return torch.zeros((1, 1), dtype=dtype, device=like.device) + number
    checks.check_tensor(name, value)
    if value.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"{name} must be on the device {like.device}, got {value.device}")
    shape = _table_shape(value, like)
    refused = norm != "linf" and (is_bound or not checks.is_per_sample(value, like))
    if shape is None or refused:
        raise ValueError(
            f"{name} must be {_wanted(is_bound, norm, like)}, got {tuple(value.shape)}"
        )
    return value.detach().to(dtype).reshape(shape)


def _table_shape(value: Tensor, like: Tensor) -> tuple[int, int] | None:
    """The numbers of rows (images) and columns (channels) of a tensor; None where its shape fits neither."""
    batch, channels = like.shape[0], _channels(like)
    if value.numel() == 1:
        return 1, 1
    if value.dim() < 2:
        return (batch, 1) if value.shape == (batch,) else None
    padded = (*[1] * (like.dim() - value.dim()), *value.shape)
    fits = len(padded) == like.dim() and value.numel() == padded[0] * padded[1]
    if fits and padded[0] in (1, batch) and padded[1] in (1, channels):
        return padded[0], padded[1]
    return None


def _wanted(is_bound: bool, norm: str, like: Tensor) -> str:
    """The kinds of values that a number of a step may have, for messages."""
    batch, channels, ones = like.shape[0], _channels(like), [1] * (like.dim() - 2)
    if norm != "linf":
        alternative = "" if is_bound else f" or a tensor of shape ({batch},)"
        return f"a number{alternative} in {norm}, whose ball is over whole images"
    return (
        f"a number or a tensor of shape ({batch},), per channel {(channels, *ones)}, or of both "
        f"{(batch, channels, *ones)}"
    )


def _channels(like: Tensor) -> int:
    return like.shape[1] if like.dim() > 1 else 1
