"""A PGD step in l1: which elements move and by how much, exact sums, the projection."""

from __future__ import annotations

import pytest
import torch
from test_pgd_step import everywhere, images, lengths

from fastadv.ops import backend, pgd_step

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_an_l1_step_moves_the_largest_elements_by_equal_parts(
    device: str, name: str, dtype: torch.dtype
) -> None:
    x = torch.full((1, 10), 0.5, device=device)
    grad = torch.tensor([[1.0, -4.0, 2.0, 0.5, 3.0, -0.0, 2.5, -1.5, 0.25, -2.0]], dtype=dtype)
    moves = {
        0.9: [1],  # the largest
        0.8: [1, 4],
        0.6: [1, 2, 4, 6, 9],  # two tie for the fourth place: both move
        0.0: [0, 1, 2, 3, 4, 6, 7, 8, 9],  # but for the one without a gradient
    }
    for sparsity, places_ in moves.items():
        with backend(name):
            moved = pgd_step(x, grad.to(device), x, 1.0, 0.25, "l1", sparsity=sparsity)
        expected = torch.full((1, 10), 0.5)
        expected[0, places_] += 0.25 / len(places_) * grad[0, places_].sign().float()
        torch.testing.assert_close(moved.cpu(), expected, rtol=0, atol=1e-7)


@everywhere
def test_an_l1_step_moves_only_what_has_a_gradient(device: str, name: str) -> None:
    x, grad = images(device), torch.zeros(4, 3, 9, 11, device=device)
    grad[:, 1, 2, 3], grad[:, 2, 8, 10] = 5e-39, -5.0  # 2 of 297, where 15 could move
    with backend(name):
        moved = pgd_step(x, grad, x, 1.0, 0.5, "l1", bounds=(-9, 9))
    change = (moved - x)[grad != 0].view(4, 2)
    torch.testing.assert_close(change.cpu(), torch.tensor([[0.25, -0.25]] * 4), rtol=1e-6, atol=0)
    assert torch.equal(moved[grad == 0], x[grad == 0])


@everywhere
def test_the_order_of_elements_does_not_matter_in_l1(device: str, name: str) -> None:
    """Sums are exact, so that not even a rounding depends on it."""
    generator = torch.Generator().manual_seed(5)
    x, noise, grad = (torch.randn(2, 3000, generator=generator) for _ in range(3))
    adv = x + noise.pow(3)  # over ten orders of magnitude
    order = torch.randperm(3000, generator=generator)
    with backend(name):
        moved, shuffled = (
            pgd_step(*(t.to(device) for t in operands), 5.0, 2.0, "l1", bounds=(-99, 99)).cpu()
            for operands in ((adv, grad, x), (adv[:, order], grad[:, order], x[:, order]))
        )
    assert torch.equal(moved[:, order], shuffled)
    assert not torch.equal(moved, adv)


@everywhere
def test_what_is_too_small_for_an_exact_sum_does_not_count_in_l1(device: str, name: str) -> None:
    """Multiples of 2**-40 of the largest element are what 3000 of them add up to exactly."""
    delta = torch.full((1, 3000), 2.0**-45, device=device)
    delta[0, 7] = 1.0
    zeros = torch.zeros_like(delta)
    with backend(name):
        assert torch.equal(pgd_step(delta, zeros, zeros, 1.0, 0.0, "l1"), delta)


@everywhere
@pytest.mark.parametrize("sizes", ["equal", "alike", "halving"])
def test_the_l1_projection_reaches_the_sphere_closely(device: str, name: str, sizes: str) -> None:
    """Also where the threshold takes nearly everything off every element."""
    places_ = torch.arange(4096)
    delta = {
        "equal": torch.ones(4096),
        "alike": 1 + 1e-6 * places_,
        "halving": 2.0 ** -(places_ % 60),
    }[sizes]
    delta = (delta * (1 - 2 * (places_ % 2)))[None].to(device)
    zeros = torch.zeros_like(delta)
    for eps in (1e-3, 0.5, 20.0):
        with backend(name):
            projected = pgd_step(delta, zeros, zeros, eps, 0.0, "l1", bounds=(-9, 9))
        assert abs(float(lengths(projected, "l1")) - eps) <= 1e-5 * eps
        assert (projected * delta >= 0).all()
