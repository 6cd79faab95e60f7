"""Exact projections that respect the bounds of images, by sorting: onto a hyperplane, and onto the l1 ball.

All of them are solved by one equation, a sum of capped terms, which `level` solves. Samples are rows [B, N] here,
and the work is done in float64. Nothing waits for the device.

Sources: the hyperplane, Croce and Hein, "Minimally distorted adversarial examples with a fast adaptive boundary
attack", ICML 2020, section 2; the l1 ball, Croce and Hein, "Mind the box: l1-APGD for sparse adversarial attacks
on image classifiers", ICML 2021, section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.ops import NATIVE
from fastadv.ops.checks import rows

# The equation of `level`, and `to_hyperplane` in linf and l2; on the CPU in csrc/cpu/projections.cpp.
torch.library.define(
    "fastadv::water_level", "(Tensor amounts, Tensor caps, Tensor target) -> Tensor"
)
torch.library.define(
    "fastadv::hyperplane_way",
    "(Tensor points, Tensor normal, Tensor gap, bool linf, float low, float high) -> Tensor",
)
_COMPILED = (torch.float32, torch.float64)


def _is_compiled(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and NATIVE.library is not None


def level(amounts: Tensor, caps: Tensor, target: Tensor) -> Tensor:
    """The smallest t >= 0 with ``sum_i amounts_i min(t, caps_i) = target``.

    Args:
        amounts: [B, N] float64. Their sum over the caps that exceed t must not be negative for any t, so that the
            left side never falls.
        caps: [B, N] float64, finite and >= 0.
        target: [B] float64, >= 0.

    Returns:
        [B, 1] float64, infinite where the left side never reaches the target.
    """
    if _is_compiled(amounts):
        return torch.ops.fastadv.water_level(amounts, caps, target)
    return level_by_sorting(amounts, caps, target)


def level_by_sorting(amounts: Tensor, caps: Tensor, target: Tensor) -> Tensor:
    """Compute `level` by torch's own operations, on any device."""
    caps, order = caps.sort(1)
    amounts = amounts.gather(1, order)
    below = (amounts * caps).cumsum(1)  # the sum of the terms whose caps are at most the k-th
    slopes = amounts.flip(1).cumsum(1).flip(1)  # of the terms from the k-th on
    after = torch.cat((slopes[:, 1:], torch.zeros_like(slopes[:, :1])), 1)
    reached = below + caps * after
    count = (reached < target[:, None]).sum(1, keepdim=True)  # the target lies in this segment
    segment = count.clamp(max=caps.shape[1] - 1)
    before = torch.cat((torch.zeros_like(below[:, :1]), below[:, :-1]), 1).gather(1, segment)
    slope = slopes.gather(1, segment)
    found = torch.where(slope > 0, (target[:, None] - before) / slope, torch.inf)
    # Rounding must not leave the segment.
    found = torch.minimum(found.clamp(min=0), caps.gather(1, segment))
    return torch.where(count == caps.shape[1], torch.inf, found)


def to_hyperplane(
    points: Tensor, normal: Tensor, gap: Tensor, norm: str, bounds: tuple[float, float]
) -> Tensor:
    """The shortest way onto a hyperplane that stays within the bounds.

    It minimises ``||delta||`` subject to ``normal . delta = gap`` and ``low <= points + delta <= high``. Where the
    hyperplane does not meet the bounds, the way leads to the corner that comes nearest to it. Elements whose
    normal is 0 or no finite number do not move.

    Args:
        points: [B, ...] within the bounds.
        normal: [B, ...], in any float dtype.
        gap: [B], how far ``normal . point`` has to change; nothing moves where it is no finite number.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``: the norm that is minimised.
        bounds: lowest and highest allowed value.

    Returns:
        delta [B, ...] in the dtype of ``points``.
    """
    if _is_compiled(points) and points.dtype in _COMPILED and norm != "l1":
        flat, towards = rows(points), rows(normal).to(points.dtype)
        way = torch.ops.fastadv.hyperplane_way(flat, towards, gap, norm == "linf", *bounds)
        return way.view(points.shape)
    return way_by_sorting(points, normal, gap, norm, bounds)


def way_by_sorting(
    points: Tensor, normal: Tensor, gap: Tensor, norm: str, bounds: tuple[float, float]
) -> Tensor:
    """Compute `to_hyperplane` by torch's own operations, on any device."""
    normal = rows(normal).double().nan_to_num(0.0, 0.0, 0.0)
    gap = gap.double().nan_to_num(0.0, 0.0, 0.0)
    largest = normal.abs().amax(1)
    scale = torch.where(largest > 0, largest, 1.0)
    normal, gap = normal / scale[:, None], gap / scale
    sign, size = normal.sign() * gap.sign()[:, None], normal.abs()
    room = _room(rows(points).double(), sign, bounds)
    way = sign * _WAYS[norm](size, room, gap.abs())
    return way.to(points.dtype).view(points.shape)


def _room(points: Tensor, sign: Tensor, bounds: tuple[float, float]) -> Tensor:
    """The distance from each element to its bound in the direction of a sign, [B, N]."""
    low, high = bounds
    return torch.where(sign > 0, high - points, points - low).clamp(min=0)


def _evenly(size: Tensor, room: Tensor, gap: Tensor) -> Tensor:
    """linf: all elements go equally far, or as far as they can."""
    return torch.minimum(room, level(size, room, gap))


def _in_proportion(size: Tensor, room: Tensor, gap: Tensor) -> Tensor:
    """l2: each goes in proportion to its size, or as far as it can."""
    # Finite, as the square of a size may be 0.
    caps = torch.where(size > 0, room / size, 0.0).clamp(max=torch.finfo(torch.float64).max)
    share = level(size.square(), caps, gap)
    return torch.where(share < caps, share * size, room)


def _one_by_one(size: Tensor, room: Tensor, gap: Tensor) -> Tensor:
    """l1: the largest goes as far as it can, then the next, until the gap is closed."""
    size, order = size.sort(1, descending=True)
    full = size * room.gather(1, order)
    before = full.cumsum(1) - full
    part = torch.minimum((gap[:, None] - before).clamp(min=0), full)
    way = torch.where(size > 0, part / size, 0.0)
    return torch.empty_like(way).scatter_(1, order, way)


_WAYS = {"linf": _evenly, "l2": _in_proportion, "l1": _one_by_one}


def to_l1_ball(
    points: Tensor, x: Tensor, eps: float | Tensor, bounds: tuple[float, float]
) -> Tensor:
    """The nearest point, in l2, of the l1 ball around ``x`` within the bounds.

    Clipping the nearest point of the ball alone would give up part of the radius. Each element of the change
    shrinks by the same amount, but not beyond 0 and, before it, not beyond its bound.

    Args:
        points: [B, ...].
        x: the centres [B, ...], within the bounds.
        eps: radius, a number or [B].
        bounds: lowest and highest allowed value.

    Returns:
        [B, ...] in the dtype of ``points``.
    """
    centre = rows(x).double()
    delta = rows(points).double() - centre
    sign, size = delta.sign(), delta.abs()
    room = _room(centre, sign, bounds)
    radius = eps.double() if isinstance(eps, Tensor) else torch.full_like(size[:, 0], eps)
    excess = torch.minimum(size, room).sum(1) - radius
    # Shrunk by t, the sizes add up to sum_i min(size_i, room_i) - min(t, size_i) + min(t, size_i - room_i).
    knots = torch.cat((size, (size - room).clamp(min=0)), 1)
    amounts = torch.cat((torch.ones_like(size), -torch.ones_like(size)), 1)
    shrink = level(amounts, knots, excess.clamp(min=0))
    shrink = torch.where(excess[:, None] > 0, shrink, 0.0)
    kept = torch.minimum((size - shrink).clamp(min=0), room)
    low, high = bounds
    return (centre + sign * kept).to(points.dtype).clamp(low, high).view(points.shape)
