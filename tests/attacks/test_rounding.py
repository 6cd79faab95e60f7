"""Rounding to 16-bit floats: every element lies between the clean and the adversarial value, as near as can be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastadv.attacks.rounding import round_towards

HALF_DTYPES = [torch.bfloat16, torch.float16]


def all_finite(dtype: torch.dtype) -> Tensor:
    """Every finite number of a 16-bit dtype once, in order."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(dtype)
    return numbers[numbers.isfinite()].float().unique()  # 0.0 and -0.0 are one


def directed(adv: Tensor, centre: Tensor, grid: Tensor) -> Tensor:
    """The number of the grid that is nearest to ``adv`` among those not beyond it, as seen from the centre."""
    below = grid[torch.searchsorted(grid, adv, right=True) - 1]
    above = grid[torch.searchsorted(grid, adv)]
    return torch.where(adv >= centre, below, above)


def points_between(grid: Tensor) -> Tensor:
    """[7, N]: every number of a grid but the last, and six float32 numbers up to the next."""
    low, high = grid[:-1], grid[1:]
    shares = torch.tensor([0.25, 0.5, 0.75])[:, None]
    inner = low + shares * (high - low)
    just = torch.stack((low.nextafter(high), inner[1].nextafter(low), high.nextafter(low)))
    return torch.cat((low[None], inner, just))


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("centre", ["lowest", "0", "1", "highest", "next below", "next above"])
def test_every_16_bit_float_against_an_oracle(dtype: torch.dtype, centre: str) -> None:
    grid = all_finite(dtype)
    adv = points_between(grid)  # [7, N]
    x = {
        "lowest": torch.full_like(adv, float(grid[0])),
        "0": torch.zeros_like(adv),
        "1": torch.ones_like(adv),
        "highest": torch.full_like(adv, float(grid[-1])),
        "next below": grid[:-1].expand_as(adv),
        "next above": grid[1:].expand_as(adv),
    }[centre]
    rounded = round_towards(adv, x.to(dtype))
    assert rounded.dtype == dtype
    assert torch.equal(rounded.float(), directed(adv, x, grid))


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_a_point_beyond_the_range_of_the_dtype_stays_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    beyond = torch.tensor([[largest * 1.0009, -largest * 1.0009]])
    x = torch.zeros(1, 2, dtype=dtype)
    assert torch.equal(round_towards(beyond, x).float(), torch.tensor([[largest, -largest]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_floats_are_returned_as_they_are(dtype: torch.dtype) -> None:
    x = torch.rand(2, 3, 4, 4, dtype=dtype).contiguous(memory_format=torch.channels_last)
    adv = torch.rand(2, 3, 4, 4, dtype=dtype)
    rounded = round_towards(adv, x)
    assert torch.equal(rounded, adv) and rounded.stride() == x.stride()
