"""FGSM-RS, MIM and the two attacks of Carlini and Wagner against plain loops and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from attack_helpers import (
    cross_entropy,
    digits_test,
    images,
    margin,
    plain_pgd,
    robust_accuracy,
    trained_small_cnn,
)
from linear_model import LinearModel
from torch import Tensor

import fastadv
from fastadv.attacks.mim import momentum_update_
from fastadv.ops import random_start

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 1.0)])
@pytest.mark.parametrize("alpha", [None, 0.05])
def test_fgsm_rs_is_one_step_from_a_random_start(
    alpha: float | None, norm: str, eps: float
) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(32)
    start = random_start(x, eps, norm, seed=4)
    step = 1.25 * eps if alpha is None else alpha
    expected = plain_pgd(
        model, x, y, start, eps=eps, alpha=step, steps=1, loss=cross_entropy, norm=norm
    )
    adv = fastadv.FGSMRS(model, eps, alpha, norm=norm, seed=4, precision="fp32")(x, y)
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-6)


def test_cw_is_pgd_on_the_margin() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(32)
    start = random_start(x, 0.08, seed=4)
    expected = plain_pgd(model, x, y, start, eps=0.08, alpha=0.02, steps=5, loss=margin)
    adv = fastadv.CW(model, 0.08, 0.02, 5, seed=4, precision="fp32")(x, y)
    furthest = (adv - expected).flatten(1).abs().amax(1)
    assert (furthest <= 1e-6).float().mean() >= 0.95


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_mim_equals_a_plain_loop(decay: float) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(48)
    expected, momentum = x.clone(), torch.zeros_like(x)
    for _ in range(6):
        expected.requires_grad_()
        (grad,) = torch.autograd.grad(cross_entropy(model(expected), y), expected)
        momentum = decay * momentum + grad / grad.abs().sum((1, 2, 3), keepdim=True)
        expected = expected.detach() + 0.02 * momentum.sign()
        expected = torch.min(torch.max(expected, x - 0.08), x + 0.08).clamp(0, 1)
    adv = fastadv.MIM(model, 0.08, 0.02, 6, decay, precision="fp32")(x, y)
    furthest = (adv - expected).flatten(1).abs().amax(1)
    assert (furthest <= 1e-6).float().mean() >= 0.95, furthest


def test_mim_without_momentum_is_pgd() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(16)
    options = dict(eps=0.08, alpha=0.02, steps=5, precision="fp32", random_start=True, seed=0)
    assert torch.equal(
        fastadv.MIM(model, decay=0, **options)(x, y), fastadv.PGD(model, **options)(x, y)
    )


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.08), ("l2", 0.6)])
def test_mim_is_stronger_than_fgsm(norm: str, eps: float) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(200)
    momentum = fastadv.MIM(model, eps, eps / 4, 10, norm=norm, precision="fp32")(x, y)
    single = fastadv.FGSM(model, eps, norm=norm, precision="fp32")(x, y)
    assert robust_accuracy(model, momentum, y) < robust_accuracy(model, single, y)


def test_the_momentum_of_extreme_gradients() -> None:
    grad = torch.tensor([[1e-40, -3e-40], [0, 0], [math.nan, 1], [math.inf, 1], [-6e37, 2e37]])
    momentum = torch.ones(5, 2)
    assert momentum_update_(momentum, grad, 0.5) is momentum
    expected = [[0.75, -0.25], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [-0.25, 0.75]]
    torch.testing.assert_close(momentum, torch.tensor(expected), rtol=1e-4, atol=0)
    narrow = momentum_update_(torch.zeros(1, 2), torch.tensor([[1.0, -3.0]]).bfloat16(), 1.0)
    assert narrow.tolist() == [[0.25, -0.75]]


@pytest.mark.parametrize("decay", [-0.1, math.nan, math.inf, "1"])
def test_a_bad_decay_is_refused(decay: object) -> None:
    with pytest.raises((TypeError, ValueError), match="decay must be"):
        fastadv.MIM(trained_small_cnn(), decay=decay)  # type: ignore[arg-type]


def two_classes() -> tuple[LinearModel, Tensor, Tensor, Tensor]:
    """A linear model of two classes, grey images, labels, and their l2 distances from the boundary."""
    generator = torch.Generator().manual_seed(0)
    model = LinearModel(torch.randn(2, 64, generator=generator)).eval()
    x = 0.4 + 0.2 * images(24, channels=1)
    logits = model(x).detach()
    normal = (model.linear.weight[0] - model.linear.weight[1]).detach()
    return model, x, logits.argmax(1), (logits[:, 0] - logits[:, 1]).abs() / normal.norm()


@pytest.mark.slow
@pytest.mark.parametrize(("targeted", "bounds"), [(False, (0.0, 1.0)), (True, (-2.0, 6.0))])
def test_cw_l2_finds_the_distance_from_a_plane(targeted: bool, bounds: tuple[float, float]) -> None:
    model, x, y, distance = two_classes()
    low, width = bounds[0], bounds[1] - bounds[0]
    labels = 1 - y if targeted else y
    attack = fastadv.CWL2(
        lambda images: model((images - low) / width),
        c=1.0,
        steps=100,
        lr=0.02,
        targeted=targeted,
        bounds=bounds,
    )
    adv = (attack(low + width * x, labels) - low) / width
    assert (model(adv).argmax(1) != y).all()
    found = (adv - x).flatten(1).norm(dim=1)
    assert (found >= distance * (1 - 1e-3)).all()
    assert (found <= distance * 1.01 + 3e-3).all(), found - distance  # Adam hovers by its rate


@pytest.mark.slow
def test_cw_l2_reaches_the_margin_asked_for() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(12)
    options = dict(c=1.0, steps=60, lr=0.1, search_steps=4)
    sizes = []
    for kappa in (0.0, 3.0):
        adv = fastadv.CWL2(model, kappa=kappa, **options)(x, y)
        logits = model(adv).detach()
        moved = (adv != x).flatten(1).any(1)
        own = F.one_hot(y, 10).bool()
        gap = logits.masked_fill(own, -math.inf).amax(1) - logits[own]
        assert moved.all() and (gap >= kappa - 1e-4).all()
        sizes.append((adv - x).flatten(1).norm(dim=1))
    assert (sizes[1] > sizes[0]).all()


def test_cw_l2_returns_the_image_where_it_finds_nothing() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(8)
    adv = fastadv.CWL2(model, c=1e-9, steps=3, search_steps=1)(x, y)
    assert torch.equal(adv, x)


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ({"c": 0}, ValueError, "c must be finite and > 0"),
        ({"lr": math.inf}, ValueError, "lr must be finite and > 0"),
        ({"kappa": -1}, ValueError, "kappa must be finite and >= 0"),
        ({"steps": 0}, ValueError, "steps must be >= 1"),
        ({"search_steps": 0}, ValueError, "search_steps must be >= 1"),
        ({"bounds": (0, 0)}, ValueError, "bounds must have low < high"),
        ({"precision": "fp16"}, ValueError, "precision must be 'auto', 'fp32' or 'bf16'"),
        ({"norm": "linf"}, TypeError, "'norm'"),
        ({"eps": 0.1}, TypeError, "'eps'"),
    ],
)
def test_bad_settings_of_cw_l2_are_refused(
    case: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fastadv.CWL2(trained_small_cnn(), **case)


def test_cw_l2_takes_no_radius() -> None:
    with pytest.raises(TypeError, match="eps must not be given to CWL2"):
        fastadv.CWL2(trained_small_cnn())(*digits_test(4), eps=0.1)


@pytest.mark.parametrize(
    "c", [1e25, 1e300]
)  # the square of a gradient, or c itself, is not finite in float32
def test_cw_l2_bears_a_huge_c(c: float) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(6)
    large, huge = (fastadv.CWL2(model, c=n, steps=40, lr=0.1, search_steps=2) for n in (1e9, c))
    adv = huge(x, y)
    assert (model(adv).argmax(1) != y).all()
    torch.testing.assert_close(adv, large(x, y), rtol=0, atol=1e-3)
