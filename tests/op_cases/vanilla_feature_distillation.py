"""Samples of vanilla_feature_distillation and its backward op."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from fastadv.ops import vanilla_feature_distillation
from op_cases.case import FEATURE_BENCH_SHAPES, SMALL_SHAPES, Arguments, Bad, OpCase
from op_cases.draw import Draw, Spec


def _features(spec: Spec, vanilla_dtype: torch.dtype | None = None) -> Arguments:
    """Features of which the third samples of two, and the fourth of two others, are equal."""
    draw = Draw(spec)
    adv, clean, vanilla = (draw.normal().clone() for _ in range(3))
    vanilla = vanilla.to(vanilla_dtype or spec.dtype)
    adv[2:3], clean[3:4] = vanilla[2:3].to(adv.dtype), vanilla[3:4].to(adv.dtype)
    return {
        "f_adv": draw.arranged(adv),
        "f_clean": draw.arranged(clean),
        "f_vanilla": draw.arranged(vanilla, vanilla_dtype),
    }


def _per_sample(arguments: Arguments) -> Arguments:
    return {**arguments, "reduction": "none"}


def _backward_arguments(spec: Spec, want_adv: bool = True, want_clean: bool = True) -> Arguments:
    features = _features(spec)
    dtype = torch.float64 if spec.dtype == torch.float64 else torch.float32
    _, norms = _formula(**{name: f.to(dtype) for name, f in features.items()})
    return {
        "grad": Draw(spec).per_sample(-1, 1, dtype),
        **features,
        "norms": norms,
        "want_adv": want_adv,
        "want_clean": want_clean,
    }


def _formula(f_adv: Tensor, f_clean: Tensor, f_vanilla: Tensor) -> tuple[Tensor, ...]:
    size = math.prod(f_adv.shape[1:])
    adv, clean = (
        torch.linalg.vector_norm((f - f_vanilla).reshape(len(f), size), dim=1)
        for f in (f_adv, f_clean)
    )
    return adv + clean, torch.stack((adv, clean), 1)


def _scale(**features: Tensor) -> tuple[float, ...]:
    loss, norms = _formula(**features)
    return float(loss.max()), float(norms.max())


def _backward_formula(
    grad: Tensor,
    f_adv: Tensor,
    f_clean: Tensor,
    f_vanilla: Tensor,
    norms: Tensor,
    want_adv: bool,
    want_clean: bool,
) -> tuple[Tensor, ...]:
    f_adv, f_clean = f_adv.detach().requires_grad_(), f_clean.detach().requires_grad_()
    loss, _ = _formula(f_adv, f_clean, f_vanilla)
    gradients = torch.autograd.grad(loss, (f_adv, f_clean), grad)
    return tuple(
        gradient if wanted else gradient.new_empty(0)
        for gradient, wanted in zip(gradients, (want_adv, want_clean), strict=True)
    )


def _backward_scale(want_adv: bool, want_clean: bool, **given: Tensor) -> tuple[float, ...]:
    """The largest element: the gradient is a product, so each rounding is in proportion to it."""
    both = _backward_formula(want_adv=True, want_clean=True, **given)
    return tuple(float(gradient.abs().max()) for gradient in both)


_BAD = (
    Bad("f_adv", TypeError, lambda k: {"f_adv": [1.0]}),
    Bad("f_adv", TypeError, lambda k: {"f_adv": k["f_adv"].to(torch.int64)}),
    Bad("f_adv", ValueError, lambda k: {name: torch.zeros(()) for name in k if name[:2] == "f_"}),
    Bad("f_clean", TypeError, lambda k: {"f_clean": k["f_clean"].to(torch.bool)}),
    Bad("f_clean", ValueError, lambda k: {"f_clean": k["f_clean"][..., :1]}),
    Bad("f_clean", ValueError, lambda k: {"f_clean": k["f_clean"].to("meta")}),
    Bad("f_vanilla", TypeError, lambda k: {"f_vanilla": None}),
    Bad("f_vanilla", ValueError, lambda k: {"f_vanilla": k["f_vanilla"][:1]}),
    Bad("f_vanilla", ValueError, lambda k: {"f_vanilla": k["f_vanilla"].to("meta")}),
    Bad("reduction", ValueError, lambda k: {"reduction": "sum"}),
)

_SHAPES = (*SMALL_SHAPES, (4, 16384 + 33))  # the last: one element range more than a partial sum

CASES = (
    OpCase(
        op="vanilla_feature_distillation",
        variant="same-dtype",
        arguments=_features,
        formula=_formula,
        scale=_scale,
        layout_of=(torch.contiguous_format,) * 2,
        function=vanilla_feature_distillation,
        keywords=_per_sample,
        differentiable=("f_adv", "f_clean"),
        shapes=_SHAPES,
        bench_shapes=FEATURE_BENCH_SHAPES,
        operations=6,
        bad=_BAD,
    ),
    OpCase(
        op="vanilla_feature_distillation",
        variant="bfloat16-vanilla",
        arguments=partial(_features, vanilla_dtype=torch.bfloat16),
        formula=_formula,
        scale=_scale,
        layout_of=(torch.contiguous_format,) * 2,
        function=vanilla_feature_distillation,
        keywords=_per_sample,
        large=None,
    ),
    OpCase(
        op="vanilla_feature_distillation_backward",
        variant="both",
        arguments=_backward_arguments,
        formula=_backward_formula,
        scale=_backward_scale,
        layout_of=("f_adv", "f_clean"),
        shapes=_SHAPES,
        bench_shapes=FEATURE_BENCH_SHAPES,
        operations=4,
    ),
    OpCase(
        op="vanilla_feature_distillation_backward",
        variant="adv",
        arguments=partial(_backward_arguments, want_clean=False),
        formula=_backward_formula,
        scale=_backward_scale,
        layout_of=("f_adv", torch.contiguous_format),
        per_sample=False,  # the empty result has no row per sample
    ),
    OpCase(
        op="vanilla_feature_distillation_backward",
        variant="clean",
        arguments=partial(_backward_arguments, want_adv=False),
        formula=_backward_formula,
        scale=_backward_scale,
        layout_of=(torch.contiguous_format, "f_clean"),
        per_sample=False,
    ),
)
