"""Samples of random_start."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastadv.ops import random_start
from op_cases.case import DTYPES, IMAGE_BENCH_SHAPES, Arguments, Bad, OpCase
from op_cases.draw import Draw, Spec
from op_cases.random_words import ball_noise

SEED = 0x1234_5678_9ABC_DEF0  # both words of the key at work
HIGHEST_ID = 2**40  # both words of a sample id at work


def _arguments(spec: Spec, *, norm: str, varying: bool = False) -> Arguments:
    draw = Draw(spec)
    eps = {"linf": 8 / 255, "l2": 2.0, "l1": 12.0}[norm]
    wide = torch.float64 if spec.dtype == torch.float64 else torch.float32
    return {
        "x": draw.images(),
        "eps": 0.0 if varying else eps,
        "eps_per_sample": draw.per_sample(0, 2 * eps, wide) if varying else None,
        "norm": norm,
        "low": 0.0,
        "high": 1.0,
        "seed": SEED,
        "sample_ids": draw.integers(0, HIGHEST_ID) if varying else None,
    }


def _formula(
    x: Tensor,
    eps: float,
    eps_per_sample: Tensor | None,
    norm: str,
    low: float,
    high: float,
    seed: int,
    sample_ids: Tensor | None,
) -> tuple[Tensor, ...]:
    radius = torch.full((len(x),), eps, dtype=torch.float64)
    radius = radius.to(x.device) if eps_per_sample is None else eps_per_sample
    ids = list(range(len(x))) if sample_ids is None else sample_ids.tolist()
    return ((x + ball_noise(x, radius, norm, seed, ids)).clamp(low, high),)


def _scale(**_: object) -> tuple[float, ...]:
    return (1.0,)


def _keywords(arguments: Arguments) -> Arguments:
    varying = arguments["eps_per_sample"]
    keywords = {name: arguments[name] for name in ("x", "norm", "seed", "sample_ids")}
    eps = arguments["eps"] if varying is None else varying
    return {**keywords, "eps": eps, "bounds": (arguments["low"], arguments["high"])}


_BAD = (
    Bad("x", TypeError, lambda k: {"x": k["x"].to(torch.uint8)}),
    Bad("x", ValueError, lambda k: {"x": torch.zeros(())}),
    Bad("eps", ValueError, lambda k: {"eps": -1e-9}),
    Bad("eps", ValueError, lambda k: {"eps": torch.zeros(3, 3)}),
    Bad("norm", ValueError, lambda k: {"norm": "l3"}),
    Bad("bounds", ValueError, lambda k: {"bounds": (0.5, 0.25)}),
    Bad("seed", TypeError, lambda k: {"seed": 0.5}),
    Bad("seed", ValueError, lambda k: {"seed": 2**63}),
    Bad("sample_ids", TypeError, lambda k: {"sample_ids": [0, 1, 2]}),
    Bad("sample_ids", ValueError, lambda k: {"sample_ids": torch.zeros(3)}),
    Bad("sample_ids", ValueError, lambda k: {"sample_ids": torch.zeros(2, dtype=torch.int64)}),
    Bad(
        "sample_ids",
        ValueError,
        lambda k: {"sample_ids": torch.zeros(3, dtype=torch.int64, device="meta")},
    ),
)

_common = partial(
    OpCase,
    op="random_start",
    formula=_formula,
    scale=_scale,
    layout_of=("x",),
    function=random_start,
    keywords=_keywords,
    bit_equal=DTYPES,
    bench_compiled=False,
)

# In float64 torch's own square root, which MKL computes, can be off by a unit in the last place.
_HALF_TO_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
# Philox: 10 rounds of two wide products, four exclusive ors and two sums for four words.
_PER_WORD = 10 * (2 + 4 + 2) / 4

CASES = (
    _common(
        variant="linf",
        arguments=partial(_arguments, norm="linf"),
        operations=_PER_WORD + 6,
        bench_shapes=IMAGE_BENCH_SHAPES,
        bad=_BAD,
    ),
    _common(variant="linf-per-sample", arguments=partial(_arguments, norm="linf", varying=True)),
    _common(
        variant="l2",
        bit_equal=_HALF_TO_SINGLE,
        arguments=partial(_arguments, norm="l2"),
        operations=2 * _PER_WORD + 20,
        bench_shapes=IMAGE_BENCH_SHAPES[:1],
    ),
    _common(
        variant="l1",
        bit_equal=DTYPES,
        arguments=partial(_arguments, norm="l1"),
        operations=2 * _PER_WORD + 36,
        bench_shapes=IMAGE_BENCH_SHAPES,
    ),
    _common(variant="l1-per-sample", arguments=partial(_arguments, norm="l1", varying=True)),
    _common(
        variant="l2-per-sample",
        arguments=partial(_arguments, norm="l2", varying=True),
        bit_equal=_HALF_TO_SINGLE,
    ),
)
