"""Distance of the attention maps of two batches of features."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastadv.ops import checks
from fastadv.ops.registry import Op, define, register_gradient


def _maps(features: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, P]: the sum over the channels of squares at each of P positions."""
    shape = features.shape
    positions = math.prod(shape[2:])
    return features.to(dtype).square().sum(1).reshape(shape[0], positions)


def _unit(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Maps [B, P] divided by their norms, and the norms [B]; a map of zeros stays zero.

    The squares of a map are fourth powers of features, which soon leave the range of float32. Therefore each map
    is divided by its largest element first. The 0 beside each map is for maps without positions.
    """
    peak = F.pad(maps, (0, 1)).amax(1, keepdim=True)
    scaled = maps / torch.where(peak == 0, 1, peak)
    length = scaled.square().sum(1, keepdim=True).sqrt()
    return scaled / torch.where(length == 0, 1, length), (peak * length).squeeze(1)


def _reference(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = checks.accumulate_dtype(u, v)
    u_map, v_map = _maps(u, dtype), _maps(v, dtype)
    (u_unit, u_norm), (v_unit, v_norm) = _unit(u_map), _unit(v_map)
    distance = (u_unit - v_unit).square().sum(1).sqrt()
    return distance, u_map, v_map, torch.stack((u_norm, v_norm), dim=1)


def _fake(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch._check(
        u.shape[0] == v.shape[0] and u.shape[2:] == v.shape[2:],
        lambda: "v must have the batch and spatial sizes of u",
    )
    distance = u.new_empty(u.shape[:1], dtype=checks.accumulate_dtype(u, v))
    positions = math.prod(u.shape[2:])
    u_map, v_map = (distance.new_empty((u.shape[0], positions)) for _ in range(2))
    return distance, u_map, v_map, distance.new_empty((u.shape[0], 2))


def _backward_reference(
    grad: Tensor, u: Tensor, u_map: Tensor, v_map: Tensor, norms: Tensor, distance: Tensor
) -> Tensor:
    """The gradient in u is ``slope * u`` with one slope per position.

    With unit vectors A and B, d = |A - B| and the map a = |a| A, the gradient of d in a is
    ``((A.B) A - B) / (d |a|)``, written as ``((A - B) / d - A d / 2) / |a|``, which does not cancel near A = B.
    """
    lengths = torch.where(norms == 0, 1, norms)
    a, b = u_map / lengths[:, :1], v_map / lengths[:, 1:]
    nothing = (distance == 0) | (norms == 0).any(1)
    weight = torch.where(nothing, 0, 2 * grad / lengths[:, 0])[:, None]
    d = torch.where(nothing, 1, distance)[:, None]
    slope = weight * ((a - b) / d - a * (d / 2))
    slope = slope.reshape(u.shape[0], 1, *u.shape[2:])
    return torch.empty_like(u).copy_(slope * u.to(slope.dtype))


def _backward_fake(
    grad: Tensor, u: Tensor, u_map: Tensor, v_map: Tensor, norms: Tensor, distance: Tensor
) -> Tensor:
    return torch.empty_like(u)


_op = define(
    Op(
        "attention_map_distance",
        "(Tensor u, Tensor v) -> (Tensor, Tensor, Tensor, Tensor)",
        reference=_reference,
        fake=_fake,
        triton="attention_map_distance:attention_map_distance",
        batched=("u", "v"),
        without={"CUDA C++": "Triton suffices, see kernels/attention_map_distance.py"},
    )
)
_backward_op = define(
    Op(
        "attention_map_distance_backward",
        "(Tensor grad, Tensor u, Tensor u_map, Tensor v_map, Tensor norms, Tensor distance)"
        " -> Tensor",
        reference=_backward_reference,
        fake=_backward_fake,
        triton="attention_map_distance:attention_map_distance_backward",
        batched=("grad", "u", "u_map", "v_map", "norms", "distance"),
        without={"CUDA C++": "Triton suffices, see kernels/attention_map_distance.py"},
        backward_of="attention_map_distance",
    )
)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, ...]) -> None:
    distance, u_map, v_map, norms = output
    ctx.save_for_backward(*inputs, u_map, v_map, norms, distance)
    ctx.mark_non_differentiable(u_map, v_map, norms)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, Tensor | None]:
    if grad is None:
        return None, None
    u, v, u_map, v_map, norms, distance = ctx.saved_tensors
    backward = torch.ops.fastadv.attention_map_distance_backward
    want_u, want_v = ctx.needs_input_grad
    grad_u = backward(grad, u, u_map, v_map, norms, distance) if want_u else None
    # The distance is symmetric: v's gradient is u's with the two exchanged. It reads v alone.
    grad_v = backward(grad, v, v_map, u_map, norms.flip(1), distance) if want_v else None
    return grad_u, grad_v


register_gradient(_op, _backward, _setup_context)


def attention_map_distance(u: Tensor, v: Tensor) -> Tensor:
    """``||a(u) / ||a(u)||_2 - a(v) / ||a(v)||_2||_2`` per sample, a the map of the channels' summed squares.

    Source: Zagoruyko and Komodakis 2017, section 3.1, equations 1 and 2 with ``F_sum^2``. ARREST's table 4
    compares it with the angular distance. A map of zeros counts as the zero vector, whose distance from every
    other map is 1. The gradient is 0 where a map is zero and where the maps are equal. NaN features give NaN for
    their sample. Gradients flow to both arguments; detach the features of a frozen teacher. There is no second
    derivative.

    Squares are summed in the dtype of the result. In float32, features between 1e-18 and 1e18 in magnitude
    give results exact to rounding. Squares of smaller features underflow to 0, as if the features were 0;
    infinite squares give NaN.

    Args:
        u: features [B, C, ...], float32, float64, bfloat16 or float16. Memory [B, C, ...] and channels-last
            memory [B, ..., C] are read in place, other layouts are copied.
        v: features of the same batch and spatial sizes; number of channels, dtype and layout may differ.

    Returns:
        Distances [B] in 0..sqrt(2), float32 (float64 if an argument is float64), accumulated in that dtype.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: there is no channel axis, or batch, spatial sizes or devices differ.
    """
    for name, features in (("u", u), ("v", v)):
        checks.check_float(name, features)
        if features.dim() < 2:
            raise ValueError(
                f"{name} must be [B, C, ...] with a channel axis, got {tuple(features.shape)}"
            )
    if v.shape[0] != u.shape[0] or v.shape[2:] != u.shape[2:]:
        raise ValueError(
            "v must have the batch and spatial sizes of u, "
            f"{tuple(u.shape)} but for the channels, got {tuple(v.shape)}"
        )
    checks.check_same_device("v", v, "u", u)
    return torch.ops.fastadv.attention_map_distance(u, v)[0]
