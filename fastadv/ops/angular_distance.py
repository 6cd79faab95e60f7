"""Angular distance of two batches of features, and ARREST's replay mask, which compares it with a threshold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastadv.ops import checks
from fastadv.ops.registry import Op, define, register_gradient
from fastadv.ops.traced import call


def _moments(u: Tensor, v: Tensor) -> Tensor:
    dtype = checks.accumulate_dtype(u, v)
    a, b = checks.rows(u).to(dtype), checks.rows(v).to(dtype)
    return torch.stack(((a * b).sum(1), a.square().sum(1), b.square().sum(1)), dim=1)


def _length(uu: Tensor, vv: Tensor) -> Tensor:
    """The product of the two norms; NaN where squares have overflowed, as nothing can be said then."""
    length = uu.sqrt() * vv.sqrt()
    return torch.where(length.isinf(), torch.nan, length)


def _distance(moments: Tensor) -> Tensor:
    dot, uu, vv = moments.unbind(1)
    length = _length(uu, vv)
    distance = torch.where(length == 0, torch.ones_like(dot), 1 - dot.abs() / length)
    return distance.clamp(min=0)  # rounding can make it negative


def _reference(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    moments = _moments(u, v)
    return _distance(moments), moments


def _fake(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    torch._check(u.shape == v.shape, lambda: "v must have the shape of u")
    dtype = checks.accumulate_dtype(u, v)
    return u.new_empty(u.shape[:1], dtype=dtype), u.new_empty((u.shape[0], 3), dtype=dtype)


def _backward_reference(
    grad: Tensor, u: Tensor, v: Tensor, moments: Tensor, want_u: bool, want_v: bool
) -> tuple[Tensor, Tensor]:
    dtype = checks.accumulate_dtype(u, v)
    dot, uu, vv = (checks.over_samples(moment, u) for moment in moments.unbind(1))
    length = _length(uu, vv)
    zero, nothing = length == 0, torch.zeros_like(dot)
    # The gradient in u is across * v + along_u * u; the distance is symmetric.
    across = torch.where(zero, nothing, -checks.over_samples(grad, u) * torch.sign(dot) / length)

    def gradient(of: Tensor, square: Tensor, other: Tensor) -> Tensor:
        along = torch.where(zero, nothing, -across * dot / square)
        return torch.empty_like(of).copy_(along * of.to(dtype) + across * other.to(dtype))

    return (
        gradient(u, uu, v) if want_u else u.new_empty(0),
        gradient(v, vv, u) if want_v else v.new_empty(0),
    )


def _backward_fake(
    grad: Tensor, u: Tensor, v: Tensor, moments: Tensor, want_u: bool, want_v: bool
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(u) if want_u else u.new_empty(0),
        torch.empty_like(v) if want_v else v.new_empty(0),
    )


def _mask_reference(u: Tensor, v: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    distance = _distance(_moments(u, v))
    return distance, distance > tau


def _mask_fake(u: Tensor, v: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    distance, _ = _fake(u, v)
    return distance, u.new_empty(u.shape[:1], dtype=torch.bool)


_op = define(
    Op(
        "angular_distance",
        "(Tensor u, Tensor v) -> (Tensor, Tensor)",
        reference=_reference,
        fake=_fake,
        triton="angular_distance:angular_distance",
        batched=("u", "v"),
    )
)
# Both gradients come from one pass over u and v. A gradient that is not wanted is empty.
_backward_op = define(
    Op(
        "angular_distance_backward",
        "(Tensor grad, Tensor u, Tensor v, Tensor moments, bool want_u, bool want_v) -> (Tensor, Tensor)",
        reference=_backward_reference,
        fake=_backward_fake,
        triton="angular_distance:angular_distance_backward",
        backward_of="angular_distance",
        batched=("grad", "u", "v", "moments"),
    )
)
_mask_op = define(
    Op(
        "replay_mask",
        "(Tensor u, Tensor v, float tau) -> (Tensor, Tensor)",
        reference=_mask_reference,
        fake=_mask_fake,
        triton="angular_distance:replay_mask",
        batched=("u", "v"),
    )
)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    if grad is None:
        return None, None
    want_u, want_v = ctx.needs_input_grad
    backward = torch.ops.fastadv.angular_distance_backward
    grad_u, grad_v = backward(grad, *ctx.saved_tensors, want_u, want_v)
    return grad_u if want_u else None, grad_v if want_v else None


register_gradient(_op, _backward, _setup_context)


def _check(u: Tensor, v: Tensor) -> None:
    checks.check_float("u", u)
    checks.check_float("v", v)
    checks.check_same_shape("v", v, "u", u)


def angular_distance(u: Tensor, v: Tensor) -> Tensor:
    """``1 - |u.v| / (||u|| ||v||)`` per sample, over all axes but the first.

    Source: ARREST, equation 3 and section 5.2. Parallel features have the distance 0, orthogonal features 1.
    Where a norm is zero the distance is 1 and the gradient 0. NaN features give NaN, and so do features whose
    squares overflow. Gradients flow to both arguments; detach the features of a frozen teacher. There is no
    second derivative.

    Args:
        u: features [B, ...], any dense layout, float32, float64, bfloat16 or float16.
        v: features of the same shape; the dtype may differ.

    Returns:
        Distances [B] in 0..1, float32 (float64 if an argument is float64), accumulated in that dtype.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes or devices differ.
    """
    _check(u, v)
    return torch.ops.fastadv.angular_distance(u, v)[0]


def replay_mask(u: Tensor, v: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Angular distance and ARREST's replay mask, ``distance > tau``, in one pass without gradient.

    Source: ARREST, equation 5.

    Args:
        u: features of the trained model [B, ...].
        v: features of the frozen standard model [B, ...].
        tau: the largest drift at which a sample is still attacked; ``1 - cos(phi)`` for an angle phi.

    Returns:
        Distances [B] and the mask [B] bool, True where the sample is to be replayed.

    Raises:
        TypeError: ``u`` or ``v`` is not a floating-point tensor, or tau is not a number.
        ValueError: shapes or devices differ, or tau is NaN.
    """
    _check(u, v)
    tau = checks.threshold("tau", tau)
    distance, mask = call("replay_mask", u.detach(), v.detach(), tau)
    return distance, mask
