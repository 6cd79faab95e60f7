"""Samples of pgd_step and pgd_step_."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor

from fastadv.ops import pgd_step, pgd_step_
from op_cases.case import DTYPES, IMAGE_BENCH_SHAPES, Arguments, Bad, OpCase
from op_cases.draw import Draw, Spec

EPS, ALPHA, SPARSITY = 8 / 255, 2 / 255, 0.95


def _arguments(
    spec: Spec,
    *,
    norm: str,
    varying: bool = False,
    grad_dtype: torch.dtype | None = None,
    masked: bool = False,
    counts: bool | None = None,
) -> Arguments:
    """Points inside, on and outside the ball, so that every branch of the projection is taken."""
    draw = Draw(spec)
    x, adv, grad = draw.images(), draw.images(), draw.normal(grad_dtype)
    if norm == "linf":  # distances of up to 2 * EPS; for l2 whole images of noise are far outside
        adv = draw.arranged((x + (adv - 0.5) * (4 * EPS)).clamp(0, 1))
    if norm == "linf" or counts:  # the zeros are counted
        grad = draw.arranged(torch.where(grad.abs() < 0.2, 0.0, grad), grad_dtype)
    wide = torch.float64 if spec.dtype == torch.float64 else torch.float32
    eps, alpha = {"linf": (EPS, ALPHA), "l2": (0.5, 0.1), "l1": (5.0, 2.0)}[norm]
    arguments = {
        "adv": adv,
        "grad": grad,
        "x": x,
        "eps": 0.0 if varying else eps,
        "alpha": 0.0 if varying else alpha,
        "eps_per_sample": draw.per_sample(0, 2 * eps, wide) if varying else None,
        "alpha_per_sample": draw.per_sample(0, 2 * alpha, wide) if varying else None,
        "norm": norm,
        "low": 0.0,
        "high": 1.0,
        "sparsity": SPARSITY,
        "active": draw.per_sample(0, 1) < 0.6 if masked else None,
    }
    if counts is not None:
        start = torch.tensor([5, 7], device=spec.device)
        arguments["counts"] = start if counts else None
    return arguments


def _formula(
    adv: Tensor,
    grad: Tensor,
    x: Tensor,
    eps: float,
    alpha: float,
    eps_per_sample: Tensor | None,
    alpha_per_sample: Tensor | None,
    norm: str,
    low: float,
    high: float,
    sparsity: float,
    active: Tensor | None,
) -> tuple[Tensor, ...]:
    radius = _column(eps, eps_per_sample, adv)
    step = _column(alpha, alpha_per_sample, adv)
    if norm == "linf":
        moved = adv + step * grad.sign()
        moved = torch.minimum(torch.maximum(moved, x - radius), x + radius)
    elif norm == "l2":
        length = _length(grad)
        delta = adv + step * grad / torch.where(length > 0, length, 1.0) - x
        length = _length(delta)
        moved = x + delta * torch.where(length > radius, radius / length, 1.0)
    else:
        moved = _l1_formula(adv, grad, x, radius, step, sparsity)
    moved = moved.clamp(low, high)
    if active is not None:
        moved = torch.where(active.view(-1, *[1] * (adv.dim() - 1)), moved, adv)
    return (moved,)


def _l1_formula(
    adv: Tensor, grad: Tensor, x: Tensor, radius: Tensor, step: Tensor, sparsity: float
) -> Tensor:
    """By sorting, sample after sample."""
    moved = torch.empty(adv.shape, dtype=adv.dtype)
    for i in range(len(adv) if adv.numel() else 0):
        magnitude = grad[i].abs()
        k = max(1, math.ceil((1 - Fraction(str(sparsity))) * magnitude.numel()))
        threshold = magnitude.flatten().sort(descending=True).values[k - 1]
        chosen = (magnitude >= threshold) & (magnitude > 0)
        direction = torch.where(chosen, grad[i].sign(), 0.0) / max(1, int(chosen.sum()))
        delta = adv[i] + step[i] * direction - x[i]
        moved[i] = x[i] + _on_l1_ball(delta, radius[i].item())
    return moved


def _on_l1_ball(delta: Tensor, radius: float) -> Tensor:
    """Duchi et al. 2008, figure 1: the threshold from the sorted magnitudes."""
    if delta.abs().sum() <= radius:
        return delta
    ranked = delta.abs().flatten().sort(descending=True).values
    thresholds = (ranked.cumsum(0) - radius) / torch.arange(1, len(ranked) + 1)
    theta = thresholds[int((ranked > thresholds).nonzero().max())]
    return delta.sign() * (delta.abs() - theta).clamp(min=0)


def _usual(
    adv: Tensor,
    grad: Tensor,
    x: Tensor,
    eps: float,
    alpha: float,
    low: float,
    high: float,
    **_: object,
) -> Tensor:
    """The linf step as papers' code has it."""
    moved = adv + alpha * grad.sign()
    return torch.clamp(x + torch.clamp(moved - x, -eps, eps), low, high)


def _column(number: float, values: Tensor | None, like: Tensor) -> Tensor:
    """The number of each sample, [B, 1, ..., 1]."""
    if values is None:
        values = torch.full(like.shape[:1], number, dtype=like.dtype, device=like.device)
    return values.view(-1, *[1] * (like.dim() - 1))


def _length(t: Tensor) -> Tensor:
    flat = t.reshape(t.shape[0], math.prod(t.shape[1:]))
    return torch.linalg.vector_norm(flat, dim=1).view(-1, *[1] * (t.dim() - 1))


def _counting_formula(counts: Tensor | None, **arguments: object) -> tuple[Tensor, ...]:
    return with_counts(_formula(**arguments), counts, arguments)


def with_counts(
    results: tuple[Tensor, ...], counts: Tensor | None, arguments: Arguments
) -> tuple[Tensor, ...]:
    """The results of a step, and then the counters of its gradient's elements, if it has them."""
    if counts is None:
        return results
    grad, active = arguments["grad"], arguments["active"]
    grad = grad if active is None else grad[active]
    return (*results, counts + torch.stack(((grad == 0).sum(), (~grad.isfinite()).sum())))


def _scale(adv: Tensor, **_: object) -> tuple[float, ...]:
    """Images lie in 0..1, and so does every intermediate number but for the radius and the step."""
    return (1.0, 0.0)


def _keywords(arguments: Arguments) -> Arguments:
    keywords = {
        name: arguments[name] for name in ("adv", "grad", "x", "norm", "sparsity", "active")
    }
    for name in ("eps", "alpha"):
        varying = arguments[f"{name}_per_sample"]
        keywords[name] = arguments[name] if varying is None else varying
    if arguments.get("counts") is not None:
        keywords["counts"] = arguments["counts"]
    return {**keywords, "bounds": (arguments["low"], arguments["high"])}


_BAD = (
    Bad("adv", TypeError, lambda k: {"adv": [0.0]}),
    Bad("adv", TypeError, lambda k: {"adv": k["adv"].to(torch.int64)}),
    Bad("adv", ValueError, lambda k: dict.fromkeys(("adv", "grad", "x"), torch.zeros(()))),
    Bad("grad", TypeError, lambda k: {"grad": k["grad"].bool()}),
    Bad("grad", ValueError, lambda k: {"grad": k["grad"][:, :1]}),
    Bad("grad", ValueError, lambda k: {"grad": k["grad"].to("meta")}),
    Bad("x", ValueError, lambda k: {"x": k["x"][:1]}),
    Bad("x", TypeError, lambda k: {"x": k["x"].double()}),
    Bad("adv", TypeError, lambda k: {"adv": k["adv"].to_sparse()}),
    Bad("eps", TypeError, lambda k: {"eps": torch.zeros(3, dtype=torch.complex64)}),
    Bad("eps", TypeError, lambda k: {"eps": torch.zeros(3).to_sparse()}),
    Bad("eps", TypeError, lambda k: {"eps": "8/255"}),
    Bad("eps", ValueError, lambda k: {"eps": -0.1}),
    Bad("eps", ValueError, lambda k: {"eps": math.inf}),
    Bad("eps", ValueError, lambda k: {"eps": math.nan}),
    Bad("eps", ValueError, lambda k: {"eps": torch.zeros(2)}),
    Bad("eps", ValueError, lambda k: {"eps": torch.zeros(3, device="meta")}),
    Bad("alpha", ValueError, lambda k: {"alpha": -1.0}),
    Bad("alpha", ValueError, lambda k: {"alpha": torch.zeros(3, 1)}),
    Bad("norm", ValueError, lambda k: {"norm": "l3"}),
    Bad("bounds", ValueError, lambda k: {"bounds": (1.0, 0.0)}),
    Bad("bounds", ValueError, lambda k: {"bounds": (0.0, math.nan)}),
    Bad("bounds", TypeError, lambda k: {"bounds": 1.0}),
    Bad("bounds", TypeError, lambda k: {"bounds": (None, 1.0)}),
    Bad("sparsity", TypeError, lambda k: {"sparsity": "most"}),
    Bad("sparsity", ValueError, lambda k: {"sparsity": 1.0}),
    Bad("sparsity", ValueError, lambda k: {"sparsity": -0.1}),
    Bad("sparsity", ValueError, lambda k: {"sparsity": math.nan}),
    Bad("active", TypeError, lambda k: {"active": [True, False, True]}),
    Bad("active", TypeError, lambda k: {"active": torch.ones(3)}),
    Bad("active", ValueError, lambda k: {"active": torch.ones(2, dtype=torch.bool)}),
    Bad("active", ValueError, lambda k: {"active": torch.ones(3, 1, dtype=torch.bool)}),
    Bad("active", ValueError, lambda k: {"active": torch.ones(3, dtype=torch.bool, device="meta")}),
)
_BAD_IN_PLACE = (
    *_BAD,
    Bad("adv", RuntimeError, lambda k: {"adv": k["adv"].clone().requires_grad_()}),
    Bad("counts", TypeError, lambda k: {"counts": [0, 0]}),
    Bad("counts", ValueError, lambda k: {"counts": torch.zeros(2)}),
    Bad("counts", ValueError, lambda k: {"counts": torch.zeros(3, dtype=torch.int64)}),
    Bad("counts", ValueError, lambda k: {"counts": torch.zeros(4, dtype=torch.int64)[::2]}),
    Bad(
        "counts", ValueError, lambda k: {"counts": torch.zeros(2, dtype=torch.int64, device="meta")}
    ),
)

_common = partial(
    OpCase,
    op="pgd_step",
    formula=_formula,
    scale=_scale,
    layout_of=("adv",),
    function=pgd_step,
    keywords=_keywords,
)

# In float64 the order of the sums shows in the last bit.
_HALF_TO_SINGLE = (torch.float32, torch.bfloat16, torch.float16)

_LINF = _common(
    variant="linf",
    arguments=partial(_arguments, norm="linf"),
    bit_equal=DTYPES,
    operations=8,
    rival=_usual,
    bench_shapes=IMAGE_BENCH_SHAPES,
    bad=_BAD,
)
_L2 = _common(
    variant="l2",
    arguments=partial(_arguments, norm="l2"),
    bit_equal=_HALF_TO_SINGLE,
    operations=16,
    bench_shapes=IMAGE_BENCH_SHAPES,
)
_L1 = _common(
    variant="l1",
    arguments=partial(_arguments, norm="l1"),
    bit_equal=_HALF_TO_SINGLE,
    operations=60,
    bench_shapes=IMAGE_BENCH_SHAPES,
)


def _variant(case: OpCase, suffix: str, **changes: object) -> OpCase:
    """The case with other arguments, not measured."""
    norm = case.variant
    return dataclasses.replace(
        case,
        variant=f"{norm}-{suffix}",
        arguments=partial(_arguments, norm=norm, **changes),
        bench_shapes=(),
        bad=(),
    )


def _in_place(case: OpCase, **keywords: object) -> OpCase:
    return dataclasses.replace(
        case,
        op="pgd_step_",
        formula=_counting_formula,
        layout_of=("adv", torch.contiguous_format),
        function=pgd_step_,
        shared=frozenset({"counts"}),
        **{"bad": (), "bench_shapes": (), **keywords},
    )


def _counting(norm: OpCase, suffix: str, **changes: object) -> OpCase:
    case = _variant(norm, suffix, counts=True, **changes)
    return _in_place(case, per_sample=False)


CASES = (
    _LINF,
    _variant(_LINF, "per-sample", varying=True),
    _variant(_LINF, "bfloat16-grad", grad_dtype=torch.bfloat16),
    _variant(_LINF, "masked", masked=True),
    _L2,
    _variant(_L2, "per-sample", varying=True),
    dataclasses.replace(_variant(_L2, "float64-grad", grad_dtype=torch.float64), large=None),
    _variant(_L2, "masked", masked=True),
    _L1,
    _variant(_L1, "per-sample", varying=True),
    _variant(_L1, "bfloat16-grad", grad_dtype=torch.bfloat16),
    dataclasses.replace(_variant(_L1, "float64-grad", grad_dtype=torch.float64), large=None),
    _variant(_L1, "masked", masked=True),
    _in_place(
        _LINF,
        arguments=partial(_arguments, norm="linf", counts=False),
        bad=_BAD_IN_PLACE,
        bench_shapes=(*IMAGE_BENCH_SHAPES, (128, 3, 224, 224)),
    ),
    _counting(_LINF, "counts"),
    _counting(_LINF, "masked-counts", masked=True),
    _in_place(_L2, arguments=partial(_arguments, norm="l2", counts=False)),
    _counting(_L2, "masked-counts", masked=True),
    _in_place(_L1, arguments=partial(_arguments, norm="l1", counts=False)),
    _counting(_L1, "masked-counts", masked=True),
)
