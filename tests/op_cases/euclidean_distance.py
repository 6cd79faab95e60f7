"""Samples of euclidean_distance and its backward op."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from fastadv.ops import euclidean_distance
from op_cases.case import FEATURE_BENCH_SHAPES, SMALL_SHAPES, Arguments, Bad, OpCase
from op_cases.draw import Draw, Spec


def _pair(spec: Spec, squared: bool = False, v_dtype: torch.dtype | None = None) -> Arguments:
    """Features of which the third samples are equal."""
    draw = Draw(spec)
    u, v = draw.normal(), draw.normal()
    if spec.shape[0] > 2:
        v = v.clone()
        v[2] = u[2].to(v_dtype or u.dtype)
        u = u.clone()
        u[2] = v[2]
    return {"u": draw.arranged(u), "v": draw.arranged(v, v_dtype), "squared": squared}


def _backward_arguments(
    spec: Spec,
    squared: bool = False,
    want_u: bool = True,
    want_v: bool = True,
    v_dtype: torch.dtype | None = None,
) -> Arguments:
    pair = _pair(spec, v_dtype=v_dtype)
    dtype = torch.float64 if spec.dtype == torch.float64 else torch.float32
    (distance,) = _formula(pair["u"].to(dtype), pair["v"].to(dtype), squared)
    return {
        "grad": Draw(spec).per_sample(-1, 1, dtype),
        "u": pair["u"],
        "v": pair["v"],
        "distance": distance,
        "squared": squared,
        "want_u": want_u,
        "want_v": want_v,
    }


def _flat(t: Tensor) -> Tensor:
    return t.reshape(t.shape[0], math.prod(t.shape[1:]))


def _formula(u: Tensor, v: Tensor, squared: bool) -> tuple[Tensor, ...]:
    norm = torch.linalg.vector_norm(_flat(u) - _flat(v), dim=1)
    return (norm.square() if squared else norm,)


def _scale(u: Tensor, v: Tensor, squared: bool) -> tuple[float, ...]:
    return (float(_formula(u, v, squared)[0].max()),)


def _backward_formula(
    grad: Tensor,
    u: Tensor,
    v: Tensor,
    distance: Tensor,
    squared: bool,
    want_u: bool,
    want_v: bool,
) -> tuple[Tensor, ...]:
    u, v = u.detach().requires_grad_(), v.detach().requires_grad_()
    gradients = torch.autograd.grad(_formula(u, v, squared)[0], (u, v), grad)
    return tuple(
        gradient if wanted else gradient.new_empty(0)
        for gradient, wanted in zip(gradients, (want_u, want_v), strict=True)
    )


def _backward_scale(
    grad: Tensor, u: Tensor, v: Tensor, distance: Tensor, squared: bool, want_u: bool, want_v: bool
) -> tuple[float, ...]:
    """The largest element: the gradient is a product, so each rounding is in proportion to it."""
    everything = _backward_formula(grad, u, v, distance, squared, True, True)
    return tuple(float(gradient.abs().max()) for gradient in everything)


_BAD = (
    Bad("u", TypeError, lambda k: {"u": None}),
    Bad("u", TypeError, lambda k: {"u": k["u"].to(torch.int32)}),
    Bad("u", ValueError, lambda k: dict.fromkeys(("u", "v"), torch.zeros(()))),
    Bad("v", TypeError, lambda k: {"v": k["v"].to(torch.complex64)}),
    Bad("v", ValueError, lambda k: {"v": k["v"][:2]}),
    Bad("v", ValueError, lambda k: {"v": k["v"][..., :1]}),  # would broadcast
    Bad("v", ValueError, lambda k: {"v": k["v"].to("meta")}),
    Bad("squared", TypeError, lambda k: {"squared": 2}),
)

_SHAPES = (*SMALL_SHAPES, (4, 16384 + 33))  # the last: one element range more than a partial sum

CASES = (
    OpCase(
        op="euclidean_distance",
        variant="norm",
        arguments=_pair,
        formula=_formula,
        scale=_scale,
        layout_of=(torch.contiguous_format,),
        function=euclidean_distance,
        differentiable=("u", "v"),
        shapes=_SHAPES,
        bench_shapes=FEATURE_BENCH_SHAPES,
        operations=3,
        bad=_BAD,
    ),
    OpCase(
        op="euclidean_distance",
        variant="squared",
        arguments=partial(_pair, squared=True),
        formula=_formula,
        scale=_scale,
        layout_of=(torch.contiguous_format,),
        function=euclidean_distance,
        differentiable=("u", "v"),
    ),
    OpCase(
        op="euclidean_distance",
        variant="bfloat16-v",
        arguments=partial(_pair, v_dtype=torch.bfloat16),
        formula=_formula,
        scale=_scale,
        layout_of=(torch.contiguous_format,),
        function=euclidean_distance,
        large=None,
    ),
    OpCase(
        op="euclidean_distance_backward",
        variant="both",
        arguments=_backward_arguments,
        formula=_backward_formula,
        scale=_backward_scale,
        layout_of=("u", "v"),
        shapes=_SHAPES,
        bench_shapes=FEATURE_BENCH_SHAPES,
        operations=3,
    ),
    OpCase(
        op="euclidean_distance_backward",
        variant="u",
        arguments=partial(_backward_arguments, want_v=False),
        formula=_backward_formula,
        scale=_backward_scale,
        layout_of=("u", torch.contiguous_format),
        per_sample=False,  # the empty result has no row per sample
        bench_shapes=FEATURE_BENCH_SHAPES,
        operations=2,
    ),
    OpCase(
        op="euclidean_distance_backward",
        variant="squared-bfloat16-v",
        arguments=partial(_backward_arguments, squared=True, want_u=False, v_dtype=torch.bfloat16),
        formula=_backward_formula,
        scale=_backward_scale,
        layout_of=(torch.contiguous_format, "v"),
        per_sample=False,
    ),
)
