"""Samples of momentum_update_."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from fastadv.ops import momentum_update_
from op_cases.case import IMAGE_BENCH_SHAPES, Arguments, Bad, OpCase
from op_cases.draw import Draw, Spec


def _arguments(
    spec: Spec, *, grad_dtype: torch.dtype | None = None, masked: bool = False
) -> Arguments:
    draw = Draw(spec)
    return {
        "momentum": draw.normal(),
        "grad": draw.normal(grad_dtype),
        "decay": 0.9,
        "active": draw.per_sample(0, 1) < 0.6 if masked else None,
    }


def _formula(
    momentum: Tensor, grad: Tensor, decay: float, active: Tensor | None
) -> tuple[Tensor, ...]:
    updated = momentum.clone()
    for i in range(len(momentum)):
        length = grad[i].abs().sum()
        if (active is None or active[i]) and length > 0:
            updated[i] = decay * momentum[i] + grad[i] / length
    return (updated,)


def _scale(momentum: Tensor, **_: object) -> tuple[float, ...]:
    return (1 + float(momentum.abs().max()),)


_BAD = (
    Bad("momentum", TypeError, lambda k: {"momentum": [0.0]}),
    Bad("momentum", TypeError, lambda k: {"momentum": k["momentum"].bfloat16()}),
    Bad("momentum", RuntimeError, lambda k: {"momentum": k["momentum"].clone().requires_grad_()}),
    Bad("grad", TypeError, lambda k: {"grad": k["grad"].int()}),
    Bad("grad", ValueError, lambda k: {"grad": k["grad"][:1]}),
    Bad("grad", ValueError, lambda k: {"grad": k["grad"].to("meta")}),
    Bad("decay", TypeError, lambda k: {"decay": "all"}),
    Bad("decay", ValueError, lambda k: {"decay": -0.5}),
    Bad("decay", ValueError, lambda k: {"decay": math.nan}),
    Bad("active", TypeError, lambda k: {"active": torch.ones(3)}),
    Bad("active", ValueError, lambda k: {"active": torch.ones(4, dtype=torch.bool)}),
)

_common = partial(
    OpCase,
    op="momentum_update_",
    formula=_formula,
    scale=_scale,
    layout_of=("momentum",),
    function=momentum_update_,
    dtypes=(torch.float32, torch.float64),
    bit_equal=(torch.float32,),
    operations=6,
)

CASES = (
    _common(variant="same-dtype", arguments=_arguments, bench_shapes=IMAGE_BENCH_SHAPES, bad=_BAD),
    _common(
        variant="bfloat16-grad",
        arguments=partial(_arguments, grad_dtype=torch.bfloat16),
    ),
    _common(variant="float64-grad", arguments=partial(_arguments, grad_dtype=torch.float64)),
    _common(variant="masked", arguments=partial(_arguments, masked=True)),
)
