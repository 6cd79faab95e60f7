"""Samples of angular_distance, its backward op and replay_mask."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastadv.ops import angular_distance, replay_mask
from op_cases.case import FEATURE_BENCH_SHAPES, SMALL_SHAPES, Arguments, Bad, OpCase
from op_cases.draw import Draw, Spec

TAU = 0.4


def _pair(spec: Spec, v_dtype: torch.dtype | None = None) -> Arguments:
    """Features at angles of all kinds, of either sign; the third sample of u is zero."""
    draw = Draw(spec)
    u, other = draw.normal(), draw.normal()
    share = draw.per_sample(-1, 1).view(-1, *[1] * (u.dim() - 1)).to(u.dtype)
    v = share * u + (1 - share.abs()) * other
    if spec.shape[0] > 2:
        u = u.clone()
        u[2] = 0
    return {"u": draw.arranged(u), "v": draw.arranged(v, v_dtype)}


def _masked(spec: Spec) -> Arguments:
    return {**_pair(spec), "tau": TAU}


def _backward_arguments(
    spec: Spec, want_u: bool = True, want_v: bool = True, v_dtype: torch.dtype | None = None
) -> Arguments:
    pair = _pair(spec, v_dtype)
    dtype = torch.float64 if spec.dtype == torch.float64 else torch.float32
    _, moments = _formula(**{name: t.to(dtype) for name, t in pair.items()})
    return {
        "grad": Draw(spec).per_sample(-1, 1, dtype),
        **pair,
        "moments": moments,
        "want_u": want_u,
        "want_v": want_v,
    }


def _flat(t: Tensor) -> Tensor:
    return t.reshape(t.shape[0], math.prod(t.shape[1:]))


def _formula(u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    a, b = _flat(u), _flat(v)
    moments = torch.stack([(p * q).sum(1) for p, q in ((a, b), (a, a), (b, b))], 1)
    lengths = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    cosine = moments[:, 0] / torch.where(lengths > 0, lengths, 1.0)
    return 1 - cosine.abs(), moments


def _usual(u: Tensor, v: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(u.flatten(1), v.flatten(1)).abs()


def _scale(u: Tensor, v: Tensor) -> tuple[float, ...]:
    a, b = _flat(u).square().sum(1), _flat(v).square().sum(1)
    return 1.0, float(torch.maximum(a, b).max())


def _mask_formula(u: Tensor, v: Tensor, tau: float) -> tuple[Tensor, ...]:
    distance, _ = _formula(u, v)
    return distance, distance > tau


def _mask_scale(u: Tensor, v: Tensor, tau: float) -> tuple[float, ...]:
    return 1.0, 0.0


def _backward_formula(
    grad: Tensor, u: Tensor, v: Tensor, moments: Tensor, want_u: bool, want_v: bool
) -> tuple[Tensor, ...]:
    u, v = u.detach().requires_grad_(), v.detach().requires_grad_()
    gradients = torch.autograd.grad(_formula(u, v)[0], (u, v), grad)
    return tuple(
        gradient.masked_fill(_broken(u, v), 0.0) if wanted else gradient.new_empty(0)
        for gradient, wanted in zip(gradients, (want_u, want_v), strict=True)
    )


def _broken(u: Tensor, v: Tensor) -> Tensor:
    """Where a norm is zero the gradient is, by definition, zero: [B, 1, ..., 1]."""
    zero = (_flat(u).square().sum(1) == 0) | (_flat(v).square().sum(1) == 0)
    return zero.view(-1, *[1] * (u.dim() - 1))


def _backward_scale(
    grad: Tensor, u: Tensor, v: Tensor, moments: Tensor, want_u: bool, want_v: bool
) -> tuple[float, ...]:
    """Of the two terms whose difference a gradient is: |grad| / |u| times a unit vector's element."""
    lengths = [_flat(t).square().sum(1).sqrt() for t in (u, v)]
    return tuple(
        float((grad.abs() / torch.where(length > 0, length, torch.inf)).max()) for length in lengths
    )


_BAD = (
    Bad("u", TypeError, lambda k: {"u": None}),
    Bad("u", TypeError, lambda k: {"u": k["u"].to(torch.complex64)}),
    Bad("u", ValueError, lambda k: dict.fromkeys(("u", "v"), torch.zeros(()))),
    Bad("v", TypeError, lambda k: {"v": k["v"].to(torch.int64)}),
    Bad("v", ValueError, lambda k: {"v": k["v"][:2]}),
    Bad("v", ValueError, lambda k: {"v": k["v"].flatten(1)}),
    Bad("v", ValueError, lambda k: {"v": k["v"].to("meta")}),
)
_BAD_MASK = (
    *_BAD,
    Bad("tau", TypeError, lambda k: {"tau": None}),
    Bad("tau", ValueError, lambda k: {"tau": math.nan}),
)

_SHAPES = (*SMALL_SHAPES, (4, 16384 + 33))  # the last: one element range more than a partial sum

CASES = (
    OpCase(
        op="angular_distance",
        variant="same-dtype",
        arguments=_pair,
        formula=_formula,
        scale=_scale,
        layout_of=(torch.contiguous_format,) * 2,
        function=angular_distance,
        differentiable=("u", "v"),
        shapes=_SHAPES,
        rival=_usual,
        bench_shapes=FEATURE_BENCH_SHAPES,
        operations=6,
        bad=_BAD,
    ),
    OpCase(
        op="angular_distance",
        variant="bfloat16-v",
        arguments=partial(_pair, v_dtype=torch.bfloat16),
        formula=_formula,
        scale=_scale,
        layout_of=(torch.contiguous_format,) * 2,
        function=angular_distance,
        large=None,
    ),
    OpCase(
        op="angular_distance_backward",
        variant="both",
        arguments=_backward_arguments,
        formula=_backward_formula,
        scale=_backward_scale,
        layout_of=("u", "v"),
        shapes=_SHAPES,
        bench_shapes=FEATURE_BENCH_SHAPES,
        operations=6,
    ),
    OpCase(
        op="angular_distance_backward",
        variant="u",
        arguments=partial(_backward_arguments, want_v=False),
        formula=_backward_formula,
        scale=_backward_scale,
        layout_of=("u", torch.contiguous_format),
        per_sample=False,  # the empty result has no row per sample
        bench_shapes=FEATURE_BENCH_SHAPES,
        operations=3,
    ),
    OpCase(
        op="angular_distance_backward",
        variant="bfloat16-v",
        arguments=partial(_backward_arguments, want_u=False, v_dtype=torch.bfloat16),
        formula=_backward_formula,
        scale=_backward_scale,
        layout_of=(torch.contiguous_format, "v"),
        per_sample=False,
        large=None,
    ),
    OpCase(
        op="replay_mask",
        variant="same-dtype",
        arguments=_masked,
        formula=_mask_formula,
        scale=_mask_scale,
        layout_of=(torch.contiguous_format,) * 2,
        function=replay_mask,
        shapes=_SHAPES,
        bench_shapes=FEATURE_BENCH_SHAPES,
        operations=6,
        bad=_BAD_MASK,
    ),
)
