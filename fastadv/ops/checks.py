"""Checks of op arguments. Each message names the argument, its value and the values that it may have.

The checks of tensors are here. The checks of plain values are in `fastadv.ops.values`, and can be imported from
here as well.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fastadv.ops.values import check_bool as check_bool
from fastadv.ops.values import check_bounds as check_bounds
from fastadv.ops.values import check_choice as check_choice
from fastadv.ops.values import check_finite_at_least_zero as check_finite_at_least_zero
from fastadv.ops.values import integer as integer
from fastadv.ops.values import limit as limit
from fastadv.ops.values import norm_name as norm_name
from fastadv.ops.values import number as number
from fastadv.ops.values import share as share
from fastadv.ops.values import shown as shown
from fastadv.ops.values import threshold as threshold

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGER_DTYPES = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)


def accumulate_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype in which these tensors are computed: float64 if one of them is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check_tensor(name: str, value: Tensor) -> None:
    """Require a dense tensor, so that lists, arrays and sparse tensors get a message that names them."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else str(value.layout)
        raise TypeError(f"{name} must be a dense tensor, got {kind}")


def check_values(name: str, value: Tensor) -> None:
    """Require a dense tensor that has values, which tensors on the device "meta" do not."""
    check_tensor(name, value)
    if value.is_meta:
        raise TypeError(f"{name} must be a tensor with values, got one on the device 'meta'")


def check_float(name: str, value: Tensor) -> None:
    """Require a floating-point tensor with a batch axis."""
    check_tensor(name, value)
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {value.dtype}")
    if value.dim() < 1:
        raise ValueError(f"{name} must have a batch axis, got a tensor without axes")


def check_same_shape(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Require two tensors of one shape on one device."""
    if value.shape != other.shape:
        raise ValueError(
            f"{name} must have the shape of {other_name}, {tuple(other.shape)}, got {tuple(value.shape)}"
        )
    check_same_device(name, value, other_name, other)


def check_same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Require two tensors on one device."""
    if value.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}, got {value.device}"
        )


def check_seed(seed: int) -> int:
    """Require an integer that fits the schema's int64, and return it as Python's."""
    seed = integer("seed", seed)
    if not torch.compiler.is_compiling() and not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be in -2**63 .. 2**63 - 1, got {seed}")
    return seed


def per_sample(name: str, value: float | Tensor, like: Tensor) -> tuple[float, Tensor | None]:
    """Split a number or a tensor with one number per sample into the two schema arguments.

    A Python number is checked; the values of a tensor are not, because reading them would make a GPU wait.

    Returns:
        ``(number, None)`` or ``(0.0, tensor [B] in the dtype of computation)``.

    Raises:
        TypeError: it is neither a number nor a dense tensor of real numbers.
        ValueError: a number is negative or not finite, or a tensor has neither one element nor one per sample.
    """
    if not isinstance(value, Tensor):
        check_no_list(name, value)
        return limit(name, value), None
    check_real(name, value)
    batch = like.shape[0]
    if not is_per_sample(value, like):
        raise ValueError(
            f"{name} must be a number or a tensor of shape ({batch},), got {tuple(value.shape)}"
        )
    if value.device != like.device:
        raise ValueError(f"{name} must be on the device {like.device}, got {value.device}")
    return 0.0, value.detach().to(accumulate_dtype(like)).reshape(-1).expand(batch).contiguous()


def check_real(name: str, value: Tensor) -> None:
    """Require a dense tensor of numbers that can be compared; flags are no numbers."""
    check_tensor(name, value)
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must hold real numbers, got {value.dtype}")


def check_no_list(name: str, value: object) -> None:
    """Refuse a list or an array where a number or a tensor is asked for, and say which of both to pass."""
    if isinstance(value, list | tuple | np.ndarray):
        raise TypeError(
            f"{name} must be a number or a tensor of numbers, got {shown(value)}; pass torch.tensor(...) of it"
        )


def is_per_sample(value: Tensor, like: Tensor) -> bool:
    """Whether a tensor has one number for all samples, or one per sample: [B] or [B, 1, ..., 1]."""
    if value.numel() == 1 or value.shape == like.shape[:1]:
        return True
    return value.dim() == like.dim() and value.shape[0] == like.shape[0] == value.numel()


def class_labels(name: str, value: Tensor, batch: int) -> Tensor:
    """Require one class index per sample, and return them in int64, whatever integers they were.

    Raises:
        TypeError: it is no tensor, or its dtype is no integer.
        ValueError: its shape is not ``(batch,)``.
    """
    if not isinstance(value, Tensor) or value.dtype not in INTEGER_DTYPES:
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(
            f"{name} must be an int64 tensor of class indices, or one of another integer dtype, got {found}"
            + one_hot_hint(name, value)
        )
    check_tensor(name, value)
    if value.shape != (batch,):
        shape = tuple(value.shape)
        raise ValueError(
            f"{name} must have shape ({batch},), got {shape}{one_hot_hint(name, value)}"
        )
    return value if value.dtype == torch.int64 else value.to(torch.int64)


def one_hot_hint(name: str, value: object) -> str:
    """How to pass labels of two axes, for the end of a message; "" where the value has not two axes."""
    if not isinstance(value, Tensor) or value.dim() != 2:
        return ""
    if 1 in value.shape:  # a column or a row of class indices, whose argmax would be class 0
        return f"; of labels with a further axis pass {name}.flatten()"
    return f"; of one-hot labels pass {name}.argmax(1)"


def check_sample_ids(sample_ids: Tensor | None, like: Tensor) -> None:
    """Require int64 identifiers, one per sample."""
    if sample_ids is None:
        return
    check_tensor("sample_ids", sample_ids)
    if sample_ids.dtype != torch.int64 or sample_ids.shape != like.shape[:1]:
        raise ValueError(
            f"sample_ids must be int64 of shape ({like.shape[0]},), "
            f"got {sample_ids.dtype} of shape {tuple(sample_ids.shape)}"
        )
    if sample_ids.device != like.device:
        raise ValueError(f"sample_ids must be on the device {like.device}, got {sample_ids.device}")


def is_readable(tensor: Tensor) -> bool:
    """Whether a check may read a tensor's values: no GPU has to wait, and the values belong to one call."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not torch._C._are_functorch_transforms_active()  # vmap holds the values of many calls


def check_written(name: str, value: Tensor) -> None:
    """Require that a tensor may be overwritten where gradients are recorded."""
    if value.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} must not require grad, because a result written to it has no gradient: pass "
            f"{name}.detach() or call within torch.no_grad()"
        )


def check_active(active: Tensor | None, like: Tensor) -> None:
    """Require a bool tensor with one element per sample."""
    if active is None:
        return
    check_tensor("active", active)
    if active.dtype != torch.bool:
        raise TypeError(f"active must be a bool tensor, got {active.dtype}")
    if active.shape != like.shape[:1]:
        raise ValueError(f"active must have shape ({like.shape[0]},), got {tuple(active.shape)}")
    if active.device != like.device:
        raise ValueError(f"active must be on the device {like.device}, got {active.device}")


def in_layout_of(t: Tensor, like: Tensor) -> Tensor:
    """Return a tensor in the memory layout of another tensor of its shape; itself if it has this layout."""
    if t.stride() == like.stride():
        return t
    return torch.empty_strided(like.shape, like.stride(), dtype=t.dtype, device=t.device).copy_(t)


def over_samples(values: Tensor, like: Tensor) -> Tensor:
    """Values [B] in a shape in which they broadcast over ``like`` [B, ...]."""
    return values.view(-1, *[1] * (like.dim() - 1))


def rows(samples: Tensor) -> Tensor:
    """The samples as rows [B, N], whatever axes they have; also without axes, and for a batch of 0."""
    return samples.reshape(samples.shape[0], math.prod(samples.shape[1:]))


def broadcast_per_sample(number: float, values: Tensor | None, like: Tensor) -> Tensor | float:
    """The two schema arguments of a per-sample number as one operand that broadcasts over ``like``."""
    return number if values is None else over_samples(values, like)
