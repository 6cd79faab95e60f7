"""Samples of attention_map_distance and its backward op."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from fastadv.ops import attention_map_distance
from op_cases.case import FEATURE_BENCH_SHAPES, SMALL_SHAPES, Arguments, Bad, OpCase
from op_cases.draw import Draw, Spec


def _pair(spec: Spec, v_dtype: torch.dtype | None = None, twice: bool = True) -> Arguments:
    """Features of which v has twice the channels; the third sample of u is zero, the fourth of both."""
    draw = Draw(spec)
    u, v, more = (draw.normal().clone() for _ in range(3))
    u[2:4] = 0
    v = torch.cat((v, more), 1) if twice else v
    v[3:4] = 0
    return {"u": draw.arranged(u), "v": draw.arranged(v, v_dtype)}


def _backward_arguments(spec: Spec) -> Arguments:
    dtype = torch.float64 if spec.dtype == torch.float64 else torch.float32
    pair = _pair(spec)
    distance, u_map, v_map, norms = _formula(pair["u"].to(dtype), pair["v"].to(dtype))
    return {
        "grad": Draw(spec).per_sample(-1, 1, dtype),
        "u": pair["u"],
        "u_map": u_map,
        "v_map": v_map,
        "norms": norms,
        "distance": distance,
    }


def _map(t: Tensor) -> Tensor:
    return torch.einsum("bcp,bcp->bp", *2 * (t.reshape(*t.shape[:2], math.prod(t.shape[2:])),))


def _distance(u_map: Tensor, v_map: Tensor) -> Tensor:
    units = (torch.nn.functional.normalize(m, dim=1) for m in (u_map, v_map))
    return torch.linalg.vector_norm(torch.sub(*units), dim=1)


def _formula(u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    maps = _map(u), _map(v)
    norms = torch.stack([torch.linalg.vector_norm(m, dim=1) for m in maps], 1)
    return _distance(*maps), *maps, norms


def _scale(u: Tensor, v: Tensor) -> tuple[float, ...]:
    _, u_map, v_map, norms = _formula(u, v)
    largest = (float(m.max()) if m.numel() else 0.0 for m in (u_map, v_map))
    return 1.0, *largest, float(norms.max())


def _broken(norms: Tensor, distance: Tensor) -> Tensor:
    """Where the gradient is, by definition, zero: [B]."""
    return (norms == 0).any(1) | (distance == 0)


def _backward_formula(
    grad: Tensor, u: Tensor, u_map: Tensor, v_map: Tensor, norms: Tensor, distance: Tensor
) -> tuple[Tensor, ...]:
    a = u_map.detach().requires_grad_()
    (slope,) = torch.autograd.grad(_distance(a, v_map), a, grad)
    slope = slope.masked_fill(_broken(norms, distance)[:, None], 0.0)
    return (2 * slope.reshape(u.shape[0], 1, *u.shape[2:]) * u,)


def _backward_scale(
    grad: Tensor, u: Tensor, u_map: Tensor, v_map: Tensor, norms: Tensor, distance: Tensor
) -> tuple[float, ...]:
    """Of the two unit vectors' difference, whose elements are below 1, with all factors."""
    nothing = _broken(norms, distance)
    factor = 2 * grad.abs() / torch.where(nothing, torch.inf, distance * norms[:, 0])
    return (float((factor * u.flatten(1).abs().amax(1)).max()) if u.numel() else 0.0,)


_BAD = (
    Bad("u", TypeError, lambda k: {"u": None}),
    Bad("u", TypeError, lambda k: {"u": k["u"].to(torch.int32)}),
    Bad("u", ValueError, lambda k: {"u": k["u"][:, 0, 0, 0]}),
    Bad("v", TypeError, lambda k: {"v": k["v"].to(torch.complex64)}),
    Bad("v", ValueError, lambda k: {"v": k["v"][:, 0, 0, 0]}),
    Bad("v", ValueError, lambda k: {"v": k["v"][:2]}),
    Bad("v", ValueError, lambda k: {"v": k["v"][..., :1]}),
    Bad("v", ValueError, lambda k: {"v": k["v"].flatten(2)}),
    Bad("v", ValueError, lambda k: {"v": k["v"].to("meta")}),
)

# With a channel axis; the last has more positions than a tile, the one before more channels than a run.
_SHAPES = (*(shape for shape in SMALL_SHAPES if len(shape) > 1), (2, 300, 3, 3), (2, 9, 700))

CASES = (
    OpCase(
        op="attention_map_distance",
        variant="more-channels",
        arguments=_pair,
        formula=_formula,
        scale=_scale,
        layout_of=(torch.contiguous_format,) * 4,
        function=attention_map_distance,
        differentiable=("u", "v"),
        shapes=_SHAPES,
        operations=2,
        bad=_BAD,
    ),
    OpCase(
        op="attention_map_distance",
        variant="same-channels",
        arguments=partial(_pair, twice=False),
        formula=_formula,
        scale=_scale,
        layout_of=(torch.contiguous_format,) * 4,
        function=attention_map_distance,
        shapes=_SHAPES,
        differentiable=("u", "v"),
        bench_shapes=FEATURE_BENCH_SHAPES,
        operations=4,
    ),
    OpCase(
        op="attention_map_distance",
        variant="bfloat16-v",
        arguments=partial(_pair, v_dtype=torch.bfloat16),
        formula=_formula,
        scale=_scale,
        layout_of=(torch.contiguous_format,) * 4,
        function=attention_map_distance,
        shapes=_SHAPES,
        large=None,
    ),
    OpCase(
        op="attention_map_distance_backward",
        variant="u",
        arguments=_backward_arguments,
        formula=_backward_formula,
        scale=_backward_scale,
        layout_of=("u",),
        shapes=_SHAPES,
        bench_shapes=FEATURE_BENCH_SHAPES,
    ),
)
