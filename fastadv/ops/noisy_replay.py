"""ARREST's noisy replay: samples whose representation has drifted are replayed with noise, not attacked."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.ops import checks
from fastadv.ops.random_start import reference as random_start_reference
from fastadv.ops.registry import Op, define
from fastadv.ops.traced import call
from fastadv.seeding import draw_seed


def _reference(
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
) -> Tensor:
    noisy = random_start_reference(x, eps, eps_per_sample, "linf", low, high, seed, sample_ids)
    replayed = checks.over_samples(distance > tau, x)
    return torch.empty_like(x).copy_(torch.where(replayed, noisy, adv))


_op = define(
    Op(
        "noisy_replay",
        "(Tensor x, Tensor adv, Tensor distance, float tau, float eps, Tensor? eps_per_sample, float low, "
        "float high, SymInt seed, Tensor? sample_ids) -> Tensor",
        reference=_reference,
        triton="noisy_replay:noisy_replay",
        batched=("x", "adv", "distance", "eps_per_sample", "sample_ids"),
    )
)


def noisy_replay(
    x: Tensor,
    adv: Tensor,
    distance: Tensor,
    tau: float,
    eps: float | Tensor,
    bounds: tuple[float, float] = (0.0, 1.0),
    seed: int | None = None,
    *,
    sample_ids: Tensor | None = None,
) -> Tensor:
    """Per sample ``adv`` where distance <= tau, and ``clip(x + U(-eps, eps), bounds)`` where it is larger.

    Source: ARREST, equation 5. `random_start` draws the same noise for the same seed and sample ids. A NaN
    distance keeps ``adv``.

    Args:
        x: clean images [B, ...], any dense layout.
        adv: adversarial images [B, ...] in ``x``'s dtype.
        distance: representation drift of each sample [B], e.g. from `angular_distance`.
        tau: the largest drift at which a sample is still attacked; ``1 - cos(phi)`` for an angle phi.
        eps: half-width of the noise, in the units of ``x``; a number or a tensor [B].
        bounds: lowest and highest allowed value.
        seed: the key of the numbers; None draws one from torch's default generator.
        sample_ids: int64 [B], which numbers each sample gets; default 0 .. B-1.

    Returns:
        The training images [B, ...] in ``x``'s dtype and layout, without gradient.

    Raises:
        TypeError: a tensor is not floating point, ``adv`` has another dtype than ``x``, tau or eps is no
            number, or ``seed`` no integer.
        ValueError: shapes or devices differ, tau is NaN, eps negative, bounds in the wrong order, ``seed``
            of more than 64 bits, wrong sample_ids.
    """
    for name, value in (("x", x), ("adv", adv), ("distance", distance)):
        checks.check_float(name, value)
    checks.check_same_shape("adv", adv, "x", x)
    if adv.dtype != x.dtype:
        raise TypeError(f"adv must have the dtype of x, {x.dtype}, got {adv.dtype}")
    if distance.shape != x.shape[:1]:
        raise ValueError(f"distance must have shape ({x.shape[0]},), got {tuple(distance.shape)}")
    checks.check_same_device("distance", distance, "x", x)
    tau = checks.threshold("tau", tau)
    low, high = checks.check_bounds(bounds)
    eps_number, eps_tensor = checks.per_sample("eps", eps, x)
    checks.check_sample_ids(sample_ids, x)
    seed = checks.check_seed(draw_seed() if seed is None else seed)
    return call(
        "noisy_replay",
        x.detach(),
        adv.detach(),
        distance.detach(),
        tau,
        eps_number,
        eps_tensor,
        low,
        high,
        seed,
        sample_ids,
    )
