"""A random start in l2 that is nearer to the image than a uniform point of the ball."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.ops import random_start
from fastadv.ops.checks import accumulate_dtype, check_float, check_sample_ids, over_samples, rows
from fastadv.ops.philox import philox
from fastadv.seeding import derive_seed


def uniform_radius_start(
    x: Tensor,
    eps: float | Tensor,
    bounds: tuple[float, float] = (0.0, 1.0),
    *,
    seed: int,
    sample_ids: Tensor | None = None,
) -> Tensor:
    """``clip(x + u eps v, bounds)`` with v uniform on the unit sphere and u uniform in 0..1.

    Nearly all of a ball of many dimensions lies near its surface, so that `fastadv.ops.random_start`, uniform in
    the ball, starts about eps away from the image. This start is on average eps / 2 away. Source: the l2 start of
    Rice et al. 2020, "Overfitting in adversarially robust deep learning". Pass it to an attack as ``start``.

    Args:
        x: images [B, ...].
        eps: radius, in the units of ``x``; a number or a tensor [B].
        bounds: lowest and highest allowed value.
        seed: seed of the random numbers.
        sample_ids: int64 [B], which numbers each sample gets; default 0 .. B-1.

    Returns:
        The starting points [B, ...] in ``x``'s dtype and layout, without gradient.

    Raises:
        TypeError: as in `fastadv.ops.random_start`.
        ValueError: as in `fastadv.ops.random_start`.
    """
    check_float("x", x)
    check_sample_ids(sample_ids, x)
    if sample_ids is None:
        sample_ids = torch.arange(x.shape[0], device=x.device)
    origin = torch.zeros_like(x, dtype=accumulate_dtype(x))
    ball = random_start(origin, 1.0, "l2", (-1.0, 1.0), seed, sample_ids=sample_ids)
    length = rows(ball).double().norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    word = philox(derive_seed(seed, "radius"), sample_ids, 1)[:, 0]
    radius = (word >> 8).double() * 2.0**-24 * eps
    moved = x.detach() + ball * over_samples(radius / length, ball).to(ball.dtype)
    low, high = bounds
    return torch.empty_like(x).copy_(moved.clamp(low, high))
