"""A random point of the eps-ball around each image: where PGD starts."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.ops import checks
from fastadv.ops.pgd_step_per_channel import (
    Bounds,
    channel_limits,
    clipped,
    radii,
    varies_by_channel,
)
from fastadv.ops.philox import random_words, symmetric_uniform
from fastadv.ops.registry import Op, define
from fastadv.ops.traced import call
from fastadv.seeding import draw_seed

RADIUS_STREAM = 1  # the stream of the numbers whose maximum is the radius in l2 and l1
# log2(1 + f) = f + f (1 - f) (0.4412 - 0.2460 f + 0.0849 f**2), within 3.3e-4 for f in 0..1; in units of 2**-16.
LOGARITHM = (28916, 16125, 5566)


def uniform_ball_noise(
    x: Tensor,
    eps: float,
    eps_per_sample: Tensor | None,
    norm: str,
    seed: int,
    sample_ids: Tensor | None,
) -> Tensor:
    """Uniform noise in the ball, in the dtype of computation and the shape of ``x``."""
    dtype = checks.accumulate_dtype(x)
    if x.numel() == 0:
        return torch.empty_like(x, dtype=dtype)
    words = random_words(seed, sample_ids, x)
    radius = checks.broadcast_per_sample(eps, eps_per_sample, checks.rows(x))
    if norm == "linf":
        return (symmetric_uniform(words).to(dtype) * radius).view(x.shape)
    if norm == "l2":
        direction = _near_gaussian(words)
        length = direction.square().sum(1, keepdim=True).double().sqrt()
    else:
        direction = _near_laplace(words)
        length = direction.abs().sum(1, keepdim=True).double()
    share = _radius_share(random_words(seed, sample_ids, x, RADIUS_STREAM))
    scale = torch.where(length > 0, share * radius / length, 0.0).to(dtype)
    return (direction.to(dtype) * scale).view(x.shape)


def _near_gaussian(words: Tensor) -> Tensor:
    """The sum of a word's four bytes minus its mean: an integer, so that its norm is exact everywhere."""
    return (words & 0xFF) + (words >> 8 & 0xFF) + (words >> 16 & 0xFF) + (words >> 24 & 0xFF) - 510


def _near_laplace(words: Tensor) -> Tensor:
    """Integers of up to 21 bits, of random sign and nearly exponential magnitude in units of log(2) * 2**-16.

    The sign is a word's lowest bit. The magnitude is -log2(u), where the word's highest 24 bits form u in 0..1,
    the last of them set so that u is not 0. Exponent and fraction of u as a float give the logarithm.
    """
    bits = (words >> 8 | 1).to(torch.float32).view(torch.int32).to(torch.int64)
    exponent, fraction = (bits >> 23) - 127, bits >> 7 & 0xFFFF
    c0, c1, c2 = LOGARITHM
    slope = c0 - (fraction * (c1 - (fraction * c2 >> 16)) >> 16)
    bend = (fraction * (0x10000 - fraction) >> 15) * slope >> 17
    magnitude = (24 - exponent << 16) - fraction - bend
    return torch.where(words & 1 == 1, -magnitude, magnitude)


def _radius_share(words: Tensor) -> Tensor:
    """u**(1/n) for uniform u, drawn as the largest of n uniforms: no power function, hence exact."""
    return ((words >> 8).amax(1, keepdim=True) + 1).double() * 2.0**-24


def reference(
    x: Tensor,
    eps: float,
    eps_per_sample: Tensor | None,
    norm: str,
    low: float,
    high: float,
    seed: int,
    sample_ids: Tensor | None,
) -> Tensor:
    """Compute the op in plain torch. The reference of `noisy_replay` computes its start by this function, too."""
    noise = uniform_ball_noise(x, eps, eps_per_sample, norm, seed, sample_ids)
    moved = x.to(noise.dtype) + noise
    clipped = torch.where(moved < low, low, moved)
    return torch.empty_like(x).copy_(torch.where(clipped > high, high, clipped))


_op = define(
    Op(
        "random_start",
        "(Tensor x, float eps, Tensor? eps_per_sample, str norm, float low, float high, SymInt seed, "
        "Tensor? sample_ids) -> Tensor",
        reference=reference,
        triton="random_start:random_start",
        batched=("x", "eps_per_sample", "sample_ids"),
    )
)


def random_start(
    x: Tensor,
    eps: float | Tensor,
    norm: str = "linf",
    bounds: Bounds = (0.0, 1.0),
    seed: int | None = None,
    *,
    sample_ids: Tensor | None = None,
) -> Tensor:
    """``clip(x + noise, bounds)`` with noise uniform in the ball of radius eps around 0.

    The numbers are Philox 4x32-10 (see `fastadv.ops.philox`): for one seed and sample id the noise has the
    same bits on every backend, device and memory layout. In l2 the direction comes from integers that are
    the sum of four uniform bytes, which are close to a Gaussian and have a norm that every backend computes
    exactly. In l1 it comes from integers of random sign whose magnitudes are exponential to within 4e-4 of
    probability: n of them over the sum of their magnitudes are uniform on the surface of the ball.

    Args:
        x: images [B, ...], any dense layout.
        eps: radius, in the units of ``x``; a number or a tensor [B], in linf also one per channel as in
            `pgd_step`.
        norm: as in `pgd_step`.
        bounds: lowest and highest allowed value, as in `pgd_step`.
        seed: the key of the numbers; None draws one from torch's default generator.
        sample_ids: int64 [B], which numbers each sample gets; default 0 .. B-1.

    Returns:
        The starting points [B, ...] in ``x``'s dtype and layout, without gradient.

    Raises:
        TypeError: ``x`` is not floating point, eps no number, or ``seed`` no integer.
        ValueError: eps negative or not finite, unknown norm, bounds in the wrong order, ``seed`` of more
            than 64 bits, wrong sample_ids.
    """
    checks.check_float("x", x)
    norm = checks.norm_name(norm)
    checks.check_sample_ids(sample_ids, x)
    seed = checks.check_seed(draw_seed() if seed is None else seed)
    if varies_by_channel(eps, 0.0, bounds, x):
        limits = channel_limits(eps, 0.0, bounds, norm, x)
        return _start_per_channel(x.detach(), limits, seed, sample_ids)
    low, high = checks.check_bounds(bounds)
    eps_number, eps_tensor = checks.per_sample("eps", eps, x)
    return call(
        "random_start", x.detach(), eps_number, eps_tensor, norm, low, high, seed, sample_ids
    )


def _start_per_channel(x: Tensor, limits: Tensor, seed: int, sample_ids: Tensor | None) -> Tensor:
    """The linf start with numbers per channel: the op's noise in a ball of radius 1, scaled in plain torch."""
    origin = torch.zeros_like(x, dtype=limits.dtype)
    unit = call("random_start", origin, 1.0, None, "linf", -1.0, 1.0, seed, sample_ids)
    moved = x.to(limits.dtype) + unit * radii(limits, x)
    return torch.empty_like(x).copy_(clipped(moved, limits))
