"""Euclidean distance of two batches of features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastadv.ops import checks
from fastadv.ops.registry import Op, define, register_gradient


def _reference(u: Tensor, v: Tensor, squared: bool) -> Tensor:
    dtype = checks.accumulate_dtype(u, v)
    square = (checks.rows(u).to(dtype) - checks.rows(v).to(dtype)).square().sum(1)
    return square if squared else square.sqrt()


def _fake(u: Tensor, v: Tensor, squared: bool) -> Tensor:
    torch._check(u.shape == v.shape, lambda: "v must have the shape of u")
    return u.new_empty(u.shape[:1], dtype=checks.accumulate_dtype(u, v))


def _backward_reference(
    grad: Tensor,
    u: Tensor,
    v: Tensor,
    distance: Tensor,
    squared: bool,
    want_u: bool,
    want_v: bool,
) -> tuple[Tensor, Tensor]:
    dtype = checks.accumulate_dtype(u, v)
    slope = 2 * grad if squared else torch.where(distance == 0, 0, grad / distance)
    gradient = checks.over_samples(slope, u) * (u.to(dtype) - v.to(dtype))
    return (
        torch.empty_like(u).copy_(gradient) if want_u else u.new_empty(0),
        torch.empty_like(v).copy_(-gradient) if want_v else v.new_empty(0),
    )


def _backward_fake(
    grad: Tensor,
    u: Tensor,
    v: Tensor,
    distance: Tensor,
    squared: bool,
    want_u: bool,
    want_v: bool,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(u) if want_u else u.new_empty(0),
        torch.empty_like(v) if want_v else v.new_empty(0),
    )


_op = define(
    Op(
        "euclidean_distance",
        "(Tensor u, Tensor v, bool squared) -> Tensor",
        reference=_reference,
        fake=_fake,
        triton="difference_norms:euclidean_distance",
        batched=("u", "v"),
    )
)
# Both gradients come from one pass over u and v, because each is the negative of the other. A gradient that is not
# wanted is empty.
_backward_op = define(
    Op(
        "euclidean_distance_backward",
        "(Tensor grad, Tensor u, Tensor v, Tensor distance, bool squared, bool want_u, bool want_v)"
        " -> (Tensor, Tensor)",
        reference=_backward_reference,
        fake=_backward_fake,
        triton="difference_norms:euclidean_distance_backward",
        batched=("grad", "u", "v", "distance"),
        backward_of="euclidean_distance",
    )
)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    u, v, ctx.squared = inputs
    ctx.save_for_backward(u, v, output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
    if grad is None:
        return None, None, None
    want_u, want_v, _ = ctx.needs_input_grad
    backward = torch.ops.fastadv.euclidean_distance_backward
    grad_u, grad_v = backward(grad, *ctx.saved_tensors, ctx.squared, want_u, want_v)
    return grad_u if want_u else None, grad_v if want_v else None, None


register_gradient(_op, _backward, _setup_context)


def euclidean_distance(u: Tensor, v: Tensor, squared: bool = False) -> Tensor:
    """``||u - v||_2`` per sample, over all axes but the first; its square with ``squared=True``.

    Source: vanilla feature distillation (VFD-Adv, equation 5). ARREST's table 4 has a variant with the mean
    squared error, which is the squared distance over the number of features. The gradient of the norm is taken
    as 0 where u equals v; NaN features give NaN for their sample. Gradients flow to both arguments. Detach the
    features of a frozen teacher: their gradient is then not computed. There is no second derivative.

    Squares are summed in the dtype of the result. In float32, differences below about 1e-22 count as 0, and a
    distance of 1.8e19 or more is infinite with gradient 0; from 1e-18 to 1e18 results are exact to rounding.

    Args:
        u: features [B, ...], any dense layout, float32, float64, bfloat16 or float16.
        v: features of the same shape; dtype and layout may differ.
        squared: return the squared distance.

    Returns:
        Distances [B] >= 0, float32 (float64 if an argument is float64), accumulated in that dtype.

    Raises:
        TypeError: u or v is not a floating-point tensor, or ``squared`` no bool.
        ValueError: shapes or devices differ.
    """
    checks.check_float("u", u)
    checks.check_float("v", v)
    checks.check_same_shape("v", v, "u", u)
    checks.check_bool("squared", squared)
    return torch.ops.fastadv.euclidean_distance(u, v, squared)
