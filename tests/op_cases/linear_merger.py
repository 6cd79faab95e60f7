"""Samples of linear_merger and its two backward ops. A shape is (B, C, d_1, ..., d_n)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastadv.ops import linear_merger
from op_cases.case import Arguments, Bad, OpCase, Shape
from op_cases.draw import Draw, Spec

_SHAPES: tuple[Shape, ...] = (
    (3, 3, 7, 9),
    (0, 3, 7, 9),
    (1, 1, 1, 1),
    (2, 33, 5, 4),
    (5, 10, 130),
    (6, 5, 3, 0, 2),  # one of the extractors has no features
    (70, 9, *[3] * 16),
)
_LARGE: Shape = (130, 300, 640, 512)  # several tiles in every direction
_BENCH_SHAPES: tuple[Shape, ...] = tuple((128, classes, *[640] * 6) for classes in (10, 100, 1000))


def _elements(shape: Shape) -> int:
    """Of the features and of the weight."""
    batch, classes, *widths = shape
    return (batch + classes) * sum(widths)


def _arguments(spec: Spec, *, bias: bool = True) -> Arguments:
    draw = Draw(spec)
    batch, classes, *widths = spec.shape
    return {
        "features": [draw.normal(shape=(batch, width)) for width in widths],
        "weight": draw.normal(shape=(classes, sum(widths))),
        "bias": draw.normal(shape=(classes,)) if bias else None,
    }


def _features_arguments(spec: Spec, *, every: int = 1) -> Arguments:
    draw = Draw(spec)
    batch, classes, *widths = spec.shape
    return {
        "grad": draw.normal(shape=(batch, classes)),
        "weight": draw.normal(shape=(classes, sum(widths))),
        "widths": widths,
        "wanted": [i % every == every - 1 for i in range(len(widths))],
    }


def _weight_arguments(spec: Spec) -> Arguments:
    draw = Draw(spec)
    batch, classes, *widths = spec.shape
    return {
        "grad": draw.normal(shape=(batch, classes)),
        "features": [draw.normal(shape=(batch, width)) for width in widths],
    }


def _formula(features: list[Tensor], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    return (torch.nn.functional.linear(torch.cat(features, 1), weight, bias),)


def _scale(features: list[Tensor], weight: Tensor, bias: Tensor | None) -> tuple[float, ...]:
    sums = _formula([part.abs() for part in features], weight.abs(), bias)
    return (float(sums[0].abs().max()),)


def _features_formula(
    grad: Tensor, weight: Tensor, widths: list[int], wanted: list[bool]
) -> tuple[Tensor, ...]:
    parts = (grad @ weight).split(widths, 1)
    return tuple(part for part, asked in zip(parts, wanted, strict=True) if asked)


def _features_scale(
    grad: Tensor, weight: Tensor, widths: list[int], wanted: list[bool]
) -> tuple[float, ...]:
    return (float((grad.abs() @ weight.abs()).max()),) * sum(wanted)


def _weight_formula(grad: Tensor, features: list[Tensor]) -> tuple[Tensor, ...]:
    return (grad.t() @ torch.cat(features, 1),)


def _weight_scale(grad: Tensor, features: list[Tensor]) -> tuple[float, ...]:
    return (float((grad.abs().t() @ torch.cat(features, 1).abs()).max()),)


def _products(arguments: Arguments) -> float:
    """Products and sums of the forward pass or of one of the backward ops, in which all parts count."""
    features = arguments.get("features")
    width = sum(arguments["widths"] if features is None else (part.shape[1] for part in features))
    if "grad" in arguments:
        return 2.0 * arguments["grad"].numel() * width
    return 2.0 * len(features[0]) * arguments["weight"].numel()


def _second(arguments: Arguments, change: object) -> Arguments:
    first, second = arguments["features"]
    return {"features": [first, change(second)]}


_BAD = (
    Bad("features", TypeError, lambda k: {"features": k["features"][0]}),
    Bad("features", TypeError, lambda k: {"features": iter(k["features"])}),
    Bad("features", TypeError, lambda k: {"features": [None, None]}),
    Bad("features", ValueError, lambda k: {"features": []}),
    Bad("features", TypeError, lambda k: _second(k, torch.Tensor.int)),
    Bad("features", TypeError, lambda k: _second(k, torch.Tensor.double)),
    Bad("features", ValueError, lambda k: _second(k, lambda t: t[:2])),
    Bad("features", ValueError, lambda k: _second(k, lambda t: t[0])),
    Bad("features", ValueError, lambda k: _second(k, lambda t: t[..., None])),
    Bad("features", ValueError, lambda k: _second(k, lambda t: t.to("meta"))),
    Bad("weight", TypeError, lambda k: {"weight": None}),
    Bad("weight", TypeError, lambda k: {"weight": k["weight"].half()}),
    Bad("weight", ValueError, lambda k: {"weight": k["weight"].t()}),
    Bad("weight", ValueError, lambda k: {"weight": k["weight"][:, :-1]}),
    Bad("weight", ValueError, lambda k: {"weight": k["weight"][0]}),
    Bad("weight", ValueError, lambda k: {"weight": k["weight"].to("meta")}),
    Bad("bias", TypeError, lambda k: {"bias": 0.0}),
    Bad("bias", TypeError, lambda k: {"bias": k["bias"].bfloat16()}),
    Bad("bias", ValueError, lambda k: {"bias": k["bias"][:2]}),
    Bad("bias", ValueError, lambda k: {"bias": k["bias"][None]}),
    Bad("bias", ValueError, lambda k: {"bias": k["bias"].to("meta")}),
)

_common = partial(
    OpCase,
    layout_of=(torch.contiguous_format,),
    per_sample=False,  # to the last bit, that is: BLAS's kernels differ with the number of rows
    shapes=_SHAPES,
    large=_LARGE,
    bench_layouts=("contiguous",),
    operations=_products,
)
_forward = partial(
    _common,
    op="linear_merger",
    formula=_formula,
    scale=_scale,
    function=linear_merger,
    shared=frozenset({"weight", "bias"}),
)
_features = partial(
    _common,
    op="linear_merger_backward_features",
    formula=_features_formula,
    scale=_features_scale,
    layout_of=(torch.contiguous_format,) * 16,
    shared=frozenset({"weight"}),
)

CASES = (
    _forward(
        variant="bias",
        arguments=_arguments,
        differentiable=("features", "weight", "bias"),
        bench_shapes=_BENCH_SHAPES,
        bench_elements=_elements,
        bad=_BAD,
    ),
    _forward(
        variant="no-bias",
        arguments=partial(_arguments, bias=False),
        differentiable=("features", "weight"),
    ),
    _features(
        variant="all",
        arguments=_features_arguments,
        bench_shapes=_BENCH_SHAPES,
        bench_elements=_elements,
    ),
    _features(variant="every-second", arguments=partial(_features_arguments, every=2)),
    _common(
        op="linear_merger_backward_weight",
        variant="plain",
        arguments=_weight_arguments,
        formula=_weight_formula,
        scale=_weight_scale,
        bench_shapes=_BENCH_SHAPES,
        bench_elements=_elements,
    ),
)
