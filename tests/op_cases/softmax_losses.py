"""Samples of softmax_losses and its backward op."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadv import losses
from fastadv.ops.softmax_formulas import KINDS
from op_cases.case import Arguments, Bad, OpCase
from op_cases.draw import Draw, Spec

WEIGHT, TEMPERATURE = 0.3, 2.0
_SHAPES = ((3, 10), (0, 10), (1, 3), (2, 33), (5, 130), (4, 1000))
_LARGE = (300, 1003)
LOGIT_BENCH_SHAPES = ((128, 10), (128, 100), (512, 1000))


def _arguments(
    spec: Spec, *, kind: str, weight: float = WEIGHT, temperature: float = 1.0, mean: bool = False
) -> Arguments:
    """Logits of confident and of doubtful samples; both gradients are asked for."""
    draw = Draw(spec)
    scale = draw.per_sample(0.5, 6)[:, None]
    pair = [draw.arranged(scale * draw.normal(torch.float32)) for _ in range(2)]
    y = draw.integers(0, spec.shape[1])
    return {
        "logits": pair[0],
        "other": pair[1] if KINDS[kind].takes_other else None,
        "y": y if KINDS[kind].takes_labels else None,
        "kind": kind,
        "weight": weight,
        "temperature": temperature,
        "mean": mean,
        "wanted": True,
        "other_wanted": True,
    }


def _ce(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="none")


def _kl(p: Tensor, q: Tensor) -> Tensor:
    log_p, log_q = F.log_softmax(p, 1), F.log_softmax(q, 1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def _wrong(z: Tensor, y: Tensor) -> Tensor:
    """The first of the likeliest wrong classes, [B, 1]."""
    return z.scatter(1, y[:, None], -torch.inf).argmax(1, keepdim=True)


def _margin(z: Tensor, y: Tensor) -> Tensor:
    return (z.gather(1, _wrong(z, y)) - z.gather(1, y[:, None]))[:, 0]


def _boosted(z: Tensor, y: Tensor) -> Tensor:
    others = z.scatter(1, _wrong(z, y), -torch.inf)
    return _ce(z, y) - (others.logsumexp(1) - z.logsumexp(1))


def _dlr(z: Tensor, y: Tensor) -> Tensor:
    order = torch.argsort(z, dim=1, descending=True, stable=True)
    span = z.gather(1, order[:, :1]) - z.gather(1, order[:, 2:3])
    return _margin(z, y) / (span[:, 0] + 1e-12)


def _values(kind: str, a: Tensor, b: Tensor, y: Tensor, w: float, t: float) -> tuple[Tensor, ...]:
    """The losses [B], by their textbook formulas."""
    detached = a.detach() / t, b.detach() / t
    formulas: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "cross_entropy": lambda: (F.cross_entropy(a, y, reduction="none", label_smoothing=w),),
        "boosted_cross_entropy": lambda: (_boosted(a, y),),
        "cw": lambda: (_margin(a, y),),
        "dlr": lambda: (_dlr(a, y),),
        "kl": lambda: (t * t * _kl(a / t, b / t),),
        "trades": lambda: (_ce(a, y) + w * _kl(a, b),),
        "mart": lambda: (
            _boosted(b, y) + w * _kl(a, b) * (1 - F.softmax(a, 1).gather(1, y[:, None])[:, 0]),
        ),
        "alp": lambda: ((_ce(a, y) + _ce(b, y)) / 2 + w * (a - b).square().mean(1),),
        "act": lambda: (
            (1 - w) * _ce(a, y) + w * t * t * _kl(detached[1], a / t),
            (1 - w) * _ce(b, y) + w * t * t * _kl(detached[0], b / t),
        ),
    }
    return formulas[kind]()


def _formula(
    logits: Tensor,
    other: Tensor | None,
    y: Tensor | None,
    kind: str,
    weight: float,
    temperature: float,
    mean: bool,
    wanted: bool,
    other_wanted: bool,
) -> tuple[Tensor, ...]:
    """Gradients by autograd, where the reference has them in closed form."""
    leaves = [logits.detach().requires_grad_()]
    if other is not None:
        leaves.append(other.detach().requires_grad_())
    labels = torch.zeros(len(logits), dtype=torch.int64) if y is None else y
    with torch.enable_grad():
        values = _values(kind, leaves[0], leaves[-1], labels, weight, temperature)
        totals = [v.mean() if mean else v.sum() for v in values]
        gradients = list(torch.autograd.grad(sum(totals), leaves))
    if other is None:
        gradients.append(logits.new_empty(len(logits), 0))
    found = (
        torch.stack([v.detach() for v in values], -1) if len(values) == 2 else values[0].detach()
    )
    return found.mean(0) if mean else found, *gradients


def _rival(
    logits: Tensor,
    other: Tensor | None,
    y: Tensor | None,
    kind: str,
    weight: float,
    temperature: float,
    mean: bool,
    **_: object,
) -> Tensor:
    """The loss as it is usually written, from logarithms of probabilities."""
    second = logits if other is None else other
    (values,) = _values(kind, logits, second, y, weight, temperature)
    return values.mean() if mean else values


def _scale(
    logits: Tensor,
    other: Tensor | None,
    y: Tensor | None,
    kind: str,
    weight: float,
    temperature: float,
    **_: object,
) -> tuple[float, ...]:
    """Differences of logits are what is rounded first; the loss weighs them."""
    pair = [logits] if other is None else [logits, other]
    spread = max(float((z.amax(1) - z.amin(1)).max()) for z in pair)
    if kind == "alp" and other is not None:
        spread = max(spread, float((logits - other).abs().max()))
    size = (1 + spread) * (1 + weight) * temperature**2
    if kind == "alp":
        size *= 1 + spread
    if kind == "dlr":
        top = logits.topk(3, 1).values
        steep = 1 / (top[:, 0] - top[:, 2] + 1e-12)
        size *= float((steep * (1 + spread * steep)).max())
    return size, size, size


def _public(arguments: Arguments, names: dict[str, str]) -> Arguments:
    keywords = {public: arguments[raw] for raw, public in names.items()}
    return {**keywords, "reduction": "mean" if arguments["mean"] else "none"}


def _bad_logits(first: str, second: str | None = None) -> tuple[Bad, ...]:
    found = [
        Bad(first, TypeError, lambda k: {first: None}),
        Bad(first, TypeError, lambda k: {first: k[first].to(torch.int64)}),
        Bad(first, ValueError, lambda k: {first: k[first][0]}),
        Bad("reduction", ValueError, lambda k: {"reduction": "sum"}),
    ]
    if second is not None:
        found += [
            Bad(second, TypeError, lambda k: {second: None}),
            Bad(second, ValueError, lambda k: {second: k[second][:, :2]}),
            Bad(second, ValueError, lambda k: {second: k[second].to("meta")}),
        ]
    return tuple(found)


def _bad_number(name: str) -> tuple[Bad, ...]:
    return (
        Bad(name, TypeError, lambda k: {name: None}),
        Bad(name, ValueError, lambda k: {name: -1.0}),
        Bad(name, ValueError, lambda k: {name: math.nan}),
    )


_BAD_LABELS = (
    Bad("y", TypeError, lambda k: {"y": [0, 1, 2]}),
    Bad("y", TypeError, lambda k: {"y": k["y"].to_sparse()}),
    Bad("y", TypeError, lambda k: {"y": k["y"].float()}),
    Bad("y", ValueError, lambda k: {"y": k["y"][:2]}),
    Bad("y", IndexError, lambda k: {"y": torch.full_like(k["y"], 10)}),
    Bad("y", IndexError, lambda k: {"y": torch.full_like(k["y"], -1)}),
)


_common = partial(
    OpCase,
    op="softmax_losses",
    formula=_formula,
    scale=_scale,
    layout_of=(torch.contiguous_format,) * 3,
    large=_LARGE,
    gradient_shape=(3, 5),
    bench_layouts=("contiguous",),
    operations=30,
)


def _case(
    kind: str,
    function: Callable[..., Any] | None,
    names: dict[str, str],
    bad: tuple[Bad, ...],
    variant: str | None = None,
    **settings: Any,
) -> OpCase:
    return _common(
        variant=variant or kind,
        arguments=partial(_arguments, kind=kind, **settings),
        function=function,
        rival=None if function is None else _rival,
        keywords=partial(_public, names=names),
        differentiable=tuple(raw for raw in ("logits", "other") if raw in names),
        bench_shapes=LOGIT_BENCH_SHAPES if variant is None else (),
        shapes=tuple(shape for shape in _SHAPES if shape[0] or not settings.get("mean")),
        per_sample=not settings.get("mean"),
        bad=bad,
    )


_ONE = {"logits": "logits", "y": "y"}
_PAIR = {"logits": "clean_logits", "other": "adv_logits", "y": "y"}
_BAD_ONE = (*_bad_logits("logits"), *_BAD_LABELS)
_BAD_PAIR = (*_bad_logits("clean_logits", "adv_logits"), *_BAD_LABELS)
_BAD_BETA = (*_BAD_PAIR, *_bad_number("beta"))


def _backward_arguments(spec: Spec, *, mean: bool) -> Arguments:
    draw = Draw(spec)
    wide = torch.float64 if spec.dtype == torch.float64 else torch.float32
    grad = draw.per_sample(-1, 1, wide)
    grad = torch.tensor(0.7, dtype=wide, device=spec.device) if mean else grad
    return {"grad": grad, "gradient": draw.normal(wide), "dtype": spec.dtype}


def _backward_formula(grad: Tensor, gradient: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return ((grad if grad.dim() == 0 else grad[:, None]) * gradient,)


def _backward_scale(grad: Tensor, gradient: Tensor, dtype: torch.dtype) -> tuple[float, ...]:
    return (float(gradient.abs().max() * grad.abs().max()),)


_backward = partial(
    OpCase,
    op="softmax_losses_backward",
    formula=_backward_formula,
    scale=_backward_scale,
    layout_of=(torch.contiguous_format,),
    shapes=_SHAPES,
    large=_LARGE,
    bench_layouts=("contiguous",),
)

CASES = (
    _case(
        "cross_entropy",
        losses.cross_entropy,
        {**_ONE, "weight": "label_smoothing"},
        (*_BAD_ONE, *_bad_number("label_smoothing")),
    ),
    _case("cross_entropy", losses.cross_entropy, _ONE, (), variant="unsmoothed", weight=0.0),
    _case(
        "boosted_cross_entropy",
        losses.boosted_cross_entropy,
        _ONE,
        (*_BAD_ONE, Bad("logits", ValueError, lambda k: {"logits": k["logits"][:, :1]})),
    ),
    _case(
        "cw",
        losses.cw,
        _ONE,
        (*_BAD_ONE, Bad("logits", ValueError, lambda k: {"logits": k["logits"][:, :1]})),
    ),
    _case(
        "dlr",
        losses.dlr,
        _ONE,
        (*_BAD_ONE, Bad("logits", ValueError, lambda k: {"logits": k["logits"][:, :2]})),
    ),
    _case(
        "kl",
        losses.kl,
        {"logits": "p_logits", "other": "q_logits", "temperature": "temperature"},
        (
            *_bad_logits("p_logits", "q_logits"),
            *_bad_number("temperature"),
            Bad("temperature", ValueError, lambda k: {"temperature": 0.0}),
        ),
        temperature=TEMPERATURE,
    ),
    _case("trades", losses.trades, {**_PAIR, "weight": "beta"}, _BAD_BETA),
    _case("trades", losses.trades, {**_PAIR, "weight": "beta"}, (), variant="mean", mean=True),
    _case("mart", losses.mart, {**_PAIR, "weight": "beta"}, _BAD_BETA),
    _case("alp", losses.alp, {**_PAIR, "weight": "weight"}, (*_BAD_PAIR, *_bad_number("weight"))),
    _case("act", None, {}, (), temperature=TEMPERATURE),
    _case("act", None, {}, (), variant="act-mean", mean=True),
    _backward(
        variant="per-sample",
        arguments=partial(_backward_arguments, mean=False),
        bench_shapes=LOGIT_BENCH_SHAPES,
    ),
    _backward(
        variant="mean",
        arguments=partial(_backward_arguments, mean=True),
        shared=frozenset({"grad"}),
    ),
)
