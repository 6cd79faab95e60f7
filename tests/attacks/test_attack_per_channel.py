"""Attacks on normalised images: radius, step size and bounds per channel, given with the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attack_helpers import trained_small_cnn
from torch import Tensor, nn

import fastadv
from fastadv.attacks.curriculum import CurriculumPGD
from fastadv.attacks.friendly import FriendlyPGD

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = (5, 3, 8, 8)
MEAN, STD = (
    torch.tensor(v, dtype=torch.float64).view(3, 1, 1)
    for v in ((0.49, 0.48, 0.45), (0.2, 0.25, 0.3))
)
LOW, HIGH = (0 - MEAN) / STD, (1 - MEAN) / STD
EPS, ALPHA = 16 / 255 / STD, 5 / 255 / STD


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A network on three channels, as one that takes normalised images."""
    gray = trained_small_cnn()
    mix = nn.Conv2d(3, 1, 1)
    with torch.no_grad():
        mix.weight.copy_(torch.tensor([0.1, 0.2, -0.15]).view(1, 3, 1, 1))
        mix.bias.fill_(0.5)
    return nn.Sequential(mix, gray).double().eval()


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(SHAPE, generator=generator, dtype=torch.float64)
    x[0].clamp_(0.2, 0.8).round_()  # some at the bounds
    return (x - MEAN) / STD, torch.arange(5)


def published(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    steps: int,
    direction: Callable[[Tensor], Tensor] = lambda grad: grad,
    eps: Tensor = EPS,
    alpha: Tensor = ALPHA,
) -> Tensor:
    """The loop on a perturbation, as code on normalised images has it."""
    delta = torch.zeros_like(x)
    for _ in range(steps):
        delta.requires_grad_()
        (grad,) = torch.autograd.grad(nn.functional.cross_entropy(model(x + delta), y), delta)
        stepped = delta.detach() + alpha * direction(grad).sign()
        delta = torch.max(torch.min(stepped, eps), -eps)
        delta = torch.max(torch.min(delta, HIGH - x), LOW - x)
    return x + delta


def momentum() -> Callable[[Tensor], Tensor]:
    total: list[Tensor] = [torch.zeros(SHAPE, dtype=torch.float64)]

    def direction(grad: Tensor) -> Tensor:
        total[0] = total[0] + grad / grad.abs().sum((1, 2, 3), keepdim=True)
        return total[0]

    return direction


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_pgd_is_the_published_loop(
    model: nn.Module, batch: tuple[Tensor, Tensor], engine: Any, last: bool
) -> None:
    x, y = batch
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    attack = fastadv.PGD(model, steps=4, random_start=False, engine=engine, precision="fp32")
    adv = attack(x, y, eps=EPS, alpha=ALPHA, bounds=(LOW, HIGH))
    torch.testing.assert_close(adv, published(model, x, y, 4), rtol=0, atol=1e-12)
    assert attack.last.outside_share == 0 and adv.stride() == x.stride()
    assert attack.eps == 8 / 255 and attack.bounds == (0.0, 1.0)


def test_fgsm_steps_as_far_as_each_channels_ball(
    model: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    x, y = batch
    adv = fastadv.FGSM(model)(x, y, eps=EPS, bounds=(LOW, HIGH))
    wanted = published(model, x, y, 1, alpha=EPS)
    torch.testing.assert_close(adv, wanted, rtol=0, atol=1e-12)


def test_mim_is_the_published_loop(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    adv = fastadv.MIM(model, steps=3)(x, y, eps=EPS, alpha=ALPHA, bounds=(LOW, HIGH))
    wanted = published(model, x, y, 3, momentum())
    torch.testing.assert_close(adv, wanted, rtol=0, atol=1e-12)


def test_numbers_of_images_and_channels_go_together(
    model: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    x, y = batch
    steps, share = torch.arange(5), torch.linspace(0.5, 1.5, 5).double().view(5, 1, 1, 1)
    attack = fastadv.PGD(model, random_start=False)
    adv = attack(x, y, eps=share * EPS, alpha=share * ALPHA, steps=steps, bounds=(LOW, HIGH))
    for i in range(5):
        one = slice(i, i + 1)
        numbers = {"eps": share[one] * EPS, "alpha": share[one] * ALPHA}
        wanted = published(model, x[one], y[one], i, **numbers)
        torch.testing.assert_close(adv[one], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [FriendlyPGD, CurriculumPGD, fastadv.FGSMRS, fastadv.PGD])
def test_every_attack_by_steps_stays_in_ball_and_bounds(
    model: nn.Module, batch: tuple[Tensor, Tensor], kind: Any
) -> None:
    x, y = (batch[0].float(), batch[1])
    adv = kind(model.float())(x, y, seed=1, eps=EPS, bounds=(LOW, HIGH))
    model.double()
    assert not torch.equal(adv, x)
    assert bool(((adv - x).abs() <= EPS + 1e-6).all())
    assert bool(((adv >= LOW.float()) & (adv <= HIGH.float())).all())


def test_bounds_of_a_call_may_be_numbers(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    wide = fastadv.PGD(model, 0.3, 0.1, 3, bounds=(-3.0, 3.0))
    narrow = fastadv.PGD(model, 0.3, 0.1, 3)
    assert torch.equal(narrow(x, y, seed=1, bounds=(-3.0, 3.0)), wide(x, y, seed=1))
    l2 = fastadv.PGD(model, 0.3, 0.1, 3, norm="l2")
    assert l2(x, y, seed=1, bounds=(-3.0, 3.0)).abs().max() > 1
    assert narrow(x, y, seed=1, eps=2.0, bounds=(LOW, HIGH)).shape == x.shape


def test_what_does_not_fit_is_refused_by_name(
    model: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    x, y = batch
    attack = fastadv.PGD(model)
    with pytest.raises(ValueError, match=r"x must be finite and within bounds, which differ by ch"):
        attack(x, y, bounds=(LOW / 2, HIGH))
    with pytest.raises(
        ValueError, match=r"alpha must be a number or a tensor of shape \(5,\), per"
    ):
        attack(x, y, alpha=torch.ones(4, 1, 1), bounds=(LOW, HIGH))
    with pytest.raises(ValueError, match=r"bounds\[0\] must be a number or a tensor"):
        attack(x, y, bounds=(LOW[:2], HIGH))
    for name, value in (("eps", EPS), ("alpha", ALPHA), ("bounds", (LOW, HIGH))):
        given = {"bounds": (-3.0, 3.0), name: value}
        with pytest.raises(ValueError, match=rf"{name}.* must be a number.* in l2, whose ball"):
            fastadv.PGD(model, norm="l2")(x, y, **given)
        with pytest.raises(
            TypeError, match=rf"{name} must be .*number.*, got a tensor.*with the call"
        ):
            fastadv.PGD(model, **{name: value})
    with pytest.raises(ValueError, match="eps must be a number or a tensor of shape"):
        fastadv.APGD(model, bounds=(-3.0, 3.0))(x, y, eps=EPS)
    with pytest.raises(ValueError, match="eps must be a number or a tensor of shape"):
        fastadv.Square(model, bounds=(-3.0, 3.0))(x, y, eps=EPS)
    with pytest.raises(TypeError, match="bounds"):
        fastadv.APGD(model)(x, y, bounds=(LOW, HIGH))
