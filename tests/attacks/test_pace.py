"""Radius, step size and number of steps of a call, for all of its images or one for each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attack_helpers import digits_test, trained_small_cnn
from torch import Tensor, nn

import fastadv

pytestmark = pytest.mark.usefixtures("one_thread")


def slow(model: nn.Module, x: Tensor, y: Tensor, eps: float, alpha: float, steps: int) -> Tensor:
    """PGD of one image, as papers have it."""
    adv = x.clone()
    for _ in range(steps):
        leaf = adv.clone().requires_grad_()
        (grad,) = torch.autograd.grad(nn.functional.cross_entropy(model(leaf), y), leaf)
        adv = torch.min(torch.max(adv + alpha * grad.sign(), x - eps), x + eps).clamp(0, 1)
    return adv


@pytest.mark.parametrize("kind", [fastadv.PGD, fastadv.MIM])
def test_every_image_has_its_own_pace(kind: Any) -> None:
    model, (x, y) = trained_small_cnn().double(), digits_test(6)
    x, steps = x.double(), torch.tensor([0, 1, 2, 3, 4, 7])
    eps, alpha = 0.02 + 0.02 * torch.arange(6).double(), 0.01 + 0.005 * torch.arange(6).double()
    attack = kind(model, 0.3, 0.1, 5, random_start=False)
    if kind is fastadv.MIM:
        attack.decay = 0.0
    found = attack(x, y, eps=eps, alpha=alpha, steps=steps)
    wanted = [
        slow(model, x[i : i + 1], y[i : i + 1], float(eps[i]), float(alpha[i]), int(steps[i]))
        for i in range(6)
    ]
    torch.testing.assert_close(found, torch.cat(wanted), rtol=0, atol=1e-12)
    assert torch.equal(found[0], x[0])


def test_numbers_hold_for_all_images_of_the_call() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(6)
    attack = fastadv.PGD(model, 0.3, 0.1, 5, random_start=False, precision="fp32")
    other = fastadv.PGD(model, 0.3, 0.02, 3, random_start=False, precision="fp32")
    assert torch.equal(attack(x, y, alpha=0.02, steps=3), other(x, y))
    assert attack.alpha == 0.1 and attack.steps == 5
    torch.testing.assert_close(attack(x, y, eps=0.15), attack(x, y, eps=0.15, alpha=0.05))


def test_the_best_point_and_restarts_keep_their_pace() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(6)
    attack = fastadv.PGD(model, 0.3, 0.1, 5, restarts=2, keep="best", precision="fp32", seed=3)
    steps = torch.tensor([5, 5, 5, 0, 0, 0])
    found = attack(x, y, steps=steps)
    torch.testing.assert_close(found[:3], attack(x, y)[:3])
    assert len(attack.last.loss_per_step) == 10


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be >= 1"),
        ({"steps": 2.5}, TypeError, "steps must be an integer"),
        ({"steps": torch.tensor([1, 2])}, ValueError, "steps must be a number or int64 of shape"),
        ({"steps": torch.ones(6)}, ValueError, "steps must be a number or int64 of shape"),
        ({"steps": torch.tensor([1, 2, 3, 4, 5, -1])}, ValueError, "steps must be >= 0, got -1"),
        ({"alpha": -1.0}, ValueError, "alpha must be"),
        ({"alpha": torch.ones(3)}, ValueError, "alpha must be a number or a tensor of shape"),
        ({"alpha": "x"}, TypeError, "alpha must be a number"),
    ],
)
def test_a_wrong_pace_is_named(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(6)
    with pytest.raises(error, match=message):
        fastadv.PGD(model, precision="fp32")(x, y, **arguments)


def test_a_number_for_the_step_size_keeps_its_digits_in_float64() -> None:
    model, (x, y) = trained_small_cnn().double(), digits_test(6)
    attack = fastadv.PGD(model, 0.3, 0.1, 4, precision="fp32", seed=3)
    plain = attack(x.double(), y)
    assert torch.equal(attack(x.double(), y, steps=4), plain)
    assert torch.equal(attack(x.double(), y, steps=torch.full((6,), 4), alpha=0.1), plain)
