"""Samples of pgd_step_per_channel and pgd_step_per_channel_, the ops behind pgd_step with numbers per channel."""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from torch import Tensor

from fastadv.ops import pgd_step, pgd_step_
from op_cases.case import DTYPES, IMAGE_BENCH_SHAPES, SMALL_SHAPES, Arguments, Bad, OpCase
from op_cases.draw import Draw, Spec
from op_cases.pgd_step import with_counts

EPS, ALPHA = 8 / 255, 2 / 255
# The last one has many channels with few places each, whose numbers change from element to element.
SHAPES = (*(shape for shape in SMALL_SHAPES if len(shape) > 1), (2, 600, 1, 3))


def _arguments(
    spec: Spec, *, per_image: bool = False, masked: bool = False, counts: bool | None = None
) -> Arguments:
    """Normalised images, each channel with a mean and a scale of its own, inside, on and outside the ball."""
    draw = Draw(spec)
    x, adv, grad = draw.images(), draw.images(), draw.normal()
    adv = draw.arranged((x + (adv - 0.5) * (4 * EPS)).clamp(0, 1))
    grad = draw.arranged(torch.where(grad.abs() < 0.2, 0.0, grad))
    limits = _limits(spec, per_image)
    x, adv = (draw.arranged(_normalised(t, limits)) for t in (x, adv))
    active = draw.per_sample(0, 1) < 0.6 if masked else None
    arguments = {"adv": adv, "grad": grad, "x": x, "limits": limits, "active": active}
    if counts is not None:
        arguments["counts"] = torch.tensor([5, 7], device=spec.device) if counts else None
    return arguments


def _limits(spec: Spec, per_image: bool) -> Tensor:
    """[B, C, 4] in the dtype of computation, as of images whose channels were scaled and moved."""
    batch, channels = spec.shape[:2]
    generator = torch.Generator().manual_seed(spec.seed)
    rows = batch if per_image else 1
    scale = 1 + 4 * torch.rand(rows, channels, generator=generator)
    low = -torch.rand(rows, channels, generator=generator)
    table = torch.stack((EPS * scale, ALPHA * scale, low, low + scale), -1)
    wide = torch.float64 if spec.dtype == torch.float64 else torch.float32
    return table.to(spec.device, wide).expand(batch, channels, 4)


def _normalised(t: Tensor, limits: Tensor) -> Tensor:
    low, high = (_column(limits, i, t).to(t.dtype) for i in (2, 3))
    return low + t * (high - low)


def _column(limits: Tensor, index: int, like: Tensor) -> Tensor:
    return limits[..., index].reshape(*like.shape[:2], *[1] * (like.dim() - 2))


def _formula(
    adv: Tensor, grad: Tensor, x: Tensor, limits: Tensor, active: Tensor | None
) -> tuple[Tensor, ...]:
    """As published code has it, on the perturbation."""
    eps, alpha, low, high = (_column(limits, i, adv) for i in range(4))
    delta = adv + alpha * grad.sign() - x
    delta = torch.minimum(torch.maximum(delta, -eps), eps)
    moved = x + torch.minimum(torch.maximum(delta, low - x), high - x)
    if active is not None:
        moved = torch.where(active.view(-1, *[1] * (adv.dim() - 1)), moved, adv)
    return (moved,)


def _counting_formula(counts: Tensor | None, **arguments: Tensor | None) -> tuple[Tensor, ...]:
    return with_counts(_formula(**arguments), counts, arguments)


def _scale(limits: Tensor, **_: object) -> tuple[float, ...]:
    """No channel is more than 5 wide."""
    return (5.0, 0.0)


def _keywords(arguments: Arguments) -> Arguments:
    keywords = {n: arguments[n] for n in ("adv", "grad", "x", "active")}
    columns = [_column(arguments["limits"], i, arguments["adv"]) for i in range(4)]
    if arguments.get("counts") is not None:
        keywords["counts"] = arguments["counts"]
    return {**keywords, "eps": columns[0], "alpha": columns[1], "bounds": (columns[2], columns[3])}


_BAD = (
    Bad("eps", ValueError, lambda k: {"eps": torch.zeros(2, 1, 1)}),
    Bad("eps", ValueError, lambda k: {"eps": torch.zeros(3, 7, 1)}),
    Bad("eps", ValueError, lambda k: {"eps": torch.zeros(1, 3, 3, 1, 1)}),
    Bad("eps", ValueError, lambda k: {"eps": -0.1}),
    Bad("eps", TypeError, lambda k: {"eps": "8/255"}),
    Bad("eps", TypeError, lambda k: {"eps": torch.zeros(3, 1, 1, dtype=torch.complex64)}),
    Bad("eps", ValueError, lambda k: {"eps": torch.zeros(3, 1, 1, device="meta")}),
    Bad("eps", ValueError, lambda k: {"norm": "l2"}),
    Bad("alpha", ValueError, lambda k: {"norm": "l2", "eps": 0.1, "bounds": (0.0, 1.0)}),
    Bad("bounds", ValueError, lambda k: {"norm": "l1", "eps": 0.1, "alpha": 0.1}),
    Bad("alpha", ValueError, lambda k: {"alpha": torch.zeros(4)}),
    Bad("bounds", ValueError, lambda k: {"bounds": (0.0, torch.zeros(4, 1, 1))}),
    Bad("bounds", ValueError, lambda k: {"bounds": (float("-inf"), torch.ones(3, 1, 1))}),
    Bad("bounds", ValueError, lambda k: {"bounds": (1.0, 0.0)}),
    Bad("bounds", TypeError, lambda k: {"bounds": (None, torch.ones(3, 1, 1))}),
    Bad("bounds", TypeError, lambda k: {"bounds": torch.ones(2, 3, 1, 1)}),
    Bad("bounds", TypeError, lambda k: {"bounds": (0.0, torch.ones(3, 1, 1).to_sparse())}),
)

_CASE = OpCase(
    op="pgd_step_per_channel",
    variant="normalised",
    arguments=_arguments,
    formula=_formula,
    scale=_scale,
    layout_of=("adv",),
    function=pgd_step,
    keywords=_keywords,
    bit_equal=DTYPES,
    shapes=SHAPES,
    operations=8,
    bench_shapes=IMAGE_BENCH_SHAPES[:1],
    bench_compiled=False,
    bad=_BAD,
)


def _variant(variant: str, **changes: bool) -> OpCase:
    return dataclasses.replace(
        _CASE, variant=variant, arguments=partial(_arguments, **changes), bench_shapes=(), bad=()
    )


def _in_place(variant: str, **changes: bool) -> OpCase:
    return dataclasses.replace(
        _variant(variant, **changes),
        op="pgd_step_per_channel_",
        formula=_counting_formula,
        layout_of=("adv", torch.contiguous_format),
        function=pgd_step_,
        shared=frozenset({"counts"}),
        per_sample=False,
    )


CASES = (
    _CASE,
    _variant("per-image", per_image=True),
    _variant("masked", masked=True),
    dataclasses.replace(_in_place("in-place", counts=False), bench_shapes=_CASE.bench_shapes),
    _in_place("masked-counts", per_image=True, masked=True, counts=True),
)
