"""Rounding images to half precision so that they cannot leave the ball."""

from __future__ import annotations

import torch
from torch import Tensor


def round_towards(adv: Tensor, x: Tensor) -> Tensor:
    """Convert ``adv`` to the dtype and layout of ``x``, rounding every element towards ``x``'s.

    Rounding to nearest could leave the eps-ball by half a unit in the last place, which in bfloat16 is 0.002
    at 1.0; rounding towards the centre cannot.

    Args:
        adv: adversarial images [B, ...] in float32 or float64.
        x: the clean images [B, ...].

    Returns:
        [B, ...] in ``x``'s dtype and layout, each element between ``x``'s and ``adv``'s.
    """
    rounded = torch.empty_like(x).copy_(adv)
    if x.dtype == adv.dtype:
        return rounded
    centre, value = x.to(adv.dtype), rounded.to(adv.dtype)
    outside = torch.where(adv >= centre, value > adv, value < adv)
    return rounded.copy_(torch.where(outside, _neighbour_towards(rounded, x), rounded))


def _neighbour_towards(value: Tensor, target: Tensor) -> Tensor:
    """The next 16-bit float from ``value`` in the direction of ``target``."""
    bits = value.view(torch.int16)
    grows_in_magnitude = (target > value) == (value > 0)
    stepped = torch.where(grows_in_magnitude, bits + 1, bits - 1)
    smallest = torch.where(target > 0, torch.ones_like(bits), torch.full_like(bits, -32767))
    return torch.where(value == 0, smallest, stepped).view(value.dtype)
