"""Samples of noisy_replay."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastadv.ops import noisy_replay
from op_cases.case import DTYPES, IMAGE_BENCH_SHAPES, Arguments, Bad, OpCase
from op_cases.draw import Draw, Spec
from op_cases.random_start import HIGHEST_ID, SEED
from op_cases.random_words import ball_noise

TAU = 0.25


def _arguments(spec: Spec, *, varying: bool = False) -> Arguments:
    """Every second sample is replayed; one distance is exactly tau, which is not replayed."""
    draw = Draw(spec)
    x, adv = draw.images(), draw.images()
    wide = torch.float64 if spec.dtype == torch.float64 else torch.float32
    distance = torch.where(torch.arange(spec.shape[0]) % 2 == 0, 0.7, 0.1)
    distance[3:4] = TAU
    return {
        "x": x,
        "adv": adv,
        "distance": distance.to(spec.device, wide),
        "tau": TAU,
        "eps": 0.0 if varying else 8 / 255,
        "eps_per_sample": draw.per_sample(0, 0.1, wide) if varying else None,
        "low": 0.0,
        "high": 1.0,
        "seed": SEED,
        "sample_ids": draw.integers(0, HIGHEST_ID) if varying else None,
    }


def _formula(
    x: Tensor,
    adv: Tensor,
    distance: Tensor,
    tau: float,
    eps: float,
    eps_per_sample: Tensor | None,
    low: float,
    high: float,
    seed: int,
    sample_ids: Tensor | None,
) -> tuple[Tensor, ...]:
    radius = torch.full((len(x),), eps, dtype=torch.float64)
    radius = radius.to(x.device) if eps_per_sample is None else eps_per_sample
    ids = list(range(len(x))) if sample_ids is None else sample_ids.tolist()
    out = adv.clone()
    noisy = (x + ball_noise(x, radius, "linf", seed, ids)).clamp(low, high)
    for i in range(len(x)):
        if distance[i] > tau:
            out[i] = noisy[i]
    return (out,)


def _scale(**_: object) -> tuple[float, ...]:
    return (1.0,)


def _keywords(arguments: Arguments) -> Arguments:
    varying = arguments["eps_per_sample"]
    names = ("x", "adv", "distance", "tau", "seed", "sample_ids")
    keywords = {name: arguments[name] for name in names}
    eps = arguments["eps"] if varying is None else varying
    return {**keywords, "eps": eps, "bounds": (arguments["low"], arguments["high"])}


def _traffic(arguments: Arguments, results: tuple[Tensor, ...]) -> int:
    """A sample is read from x or from adv, never from both."""
    return 2 * results[0].numel() * results[0].element_size()


_BAD = (
    Bad("x", TypeError, lambda k: {"x": k["x"].to(torch.int32)}),
    Bad("adv", ValueError, lambda k: {"adv": k["adv"][..., :1]}),
    Bad("adv", TypeError, lambda k: {"adv": k["adv"].double()}),
    Bad("distance", TypeError, lambda k: {"distance": k["distance"] > 0}),
    Bad("distance", ValueError, lambda k: {"distance": k["distance"][:, None]}),
    Bad("distance", ValueError, lambda k: {"distance": k["distance"].to("meta")}),
    Bad("tau", TypeError, lambda k: {"tau": "30 degrees"}),
    Bad("tau", ValueError, lambda k: {"tau": float("nan")}),
    Bad("eps", ValueError, lambda k: {"eps": -0.1}),
    Bad("bounds", ValueError, lambda k: {"bounds": (1, 0)}),
    Bad("seed", ValueError, lambda k: {"seed": -(2**63) - 1}),
    Bad("sample_ids", ValueError, lambda k: {"sample_ids": torch.zeros(3)}),
)

_common = partial(
    OpCase,
    op="noisy_replay",
    formula=_formula,
    scale=_scale,
    layout_of=("x",),
    function=noisy_replay,
    keywords=_keywords,
    bit_equal=DTYPES,
    bench_compiled=False,
)

CASES = (
    _common(
        variant="fixed-eps",
        arguments=_arguments,
        operations=13,  # half of random_start's
        traffic=_traffic,
        bench_shapes=IMAGE_BENCH_SHAPES[:1],
        bad=_BAD,
    ),
    _common(variant="per-sample", arguments=partial(_arguments, varying=True)),
)
