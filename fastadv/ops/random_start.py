"""A random point of the eps-ball around each image: where PGD starts."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.ops import checks
from fastadv.ops.philox import random_words, symmetric_uniform
from fastadv.ops.registry import Op, define
from fastadv.seeding import draw_seed

NORMS = ("linf", "l2")
RADIUS_STREAM = 1  # the stream of the numbers whose maximum is the l2 radius


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
    direction = _near_gaussian(words)
    length = direction.square().sum(1, keepdim=True).double().sqrt()
    share = _radius_share(random_words(seed, sample_ids, x, RADIUS_STREAM))
    scale = torch.where(length > 0, share * radius / length, 0.0).to(dtype)
    return (direction.to(dtype) * scale).view(x.shape)


def _near_gaussian(words: Tensor) -> Tensor:
    """The sum of a word's four bytes minus its mean: an integer, so that its norm is exact everywhere."""
    return (words & 0xFF) + (words >> 8 & 0xFF) + (words >> 16 & 0xFF) + (words >> 24 & 0xFF) - 510


def _radius_share(words: Tensor) -> Tensor:
    """u**(1/n) for uniform u, drawn as the largest of n uniforms: no power function, hence exact."""
    return ((words >> 8).amax(1, keepdim=True) + 1).double() * 2.0**-24


def _reference(
    x: Tensor,
    eps: float,
    eps_per_sample: Tensor | None,
    norm: str,
    low: float,
    high: float,
    seed: int,
    sample_ids: Tensor | None,
) -> Tensor:
    noise = uniform_ball_noise(x, eps, eps_per_sample, norm, seed, sample_ids)
    moved = x.to(noise.dtype) + noise
    clipped = torch.where(moved < low, low, moved)
    return torch.empty_like(x).copy_(torch.where(clipped > high, high, clipped))


def _fake(
    x: Tensor,
    eps: float,
    eps_per_sample: Tensor | None,
    norm: str,
    low: float,
    high: float,
    seed: int,
    sample_ids: Tensor | None,
) -> Tensor:
    return torch.empty_like(x)


_op = define(
    Op(
        "random_start",
        "(Tensor x, float eps, Tensor? eps_per_sample, str norm, float low, float high, SymInt seed, "
        "Tensor? sample_ids) -> Tensor",
        reference=_reference,
        fake=_fake,
        triton="random_start:random_start",
        batched=("x", "eps_per_sample", "sample_ids"),
    )
)


def random_start(
    x: Tensor,
    eps: float | Tensor,
    norm: str = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    seed: int | None = None,
    *,
    sample_ids: Tensor | None = None,
) -> Tensor:
    """``clip(x + noise, bounds)`` with noise uniform in the ball of radius eps around 0.

    The numbers are Philox 4x32-10 (see `fastadv.ops.philox`): for one seed and sample id the noise has the
    same bits on every backend, device and memory layout. In l2 the direction comes from integers that are
    the sum of four uniform bytes, a close stand-in for a Gaussian whose norm every backend computes exactly.

    Args:
        x: images [B, ...], any dense layout.
        eps: radius, in the units of ``x``; a number or a tensor [B].
        norm: ``"linf"`` or ``"l2"``.
        bounds: lowest and highest allowed value.
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
    checks.check_choice("norm", norm, NORMS)
    low, high = checks.check_bounds(bounds)
    eps_number, eps_tensor = checks.per_sample("eps", eps, x)
    checks.check_sample_ids(sample_ids, x)
    seed = draw_seed() if seed is None else seed
    checks.check_seed(seed)
    return torch.ops.fastadv.random_start(
        x.detach(), eps_number, eps_tensor, norm, low, high, seed, sample_ids
    )
