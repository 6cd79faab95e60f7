"""What an attack says of its last call: gradients, losses, engine, and whether its result is admissible."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attack_helpers import digits_test, trained_small_cnn
from attack_zoo import ATTACKS, WAYS, WITHOUT_GRADIENT
from torch import Tensor, nn

import fastadv
from fastadv.attacks.report import outside_share

pytestmark = pytest.mark.usefixtures("one_thread")


class HalfMasked(nn.Module):
    """Depends on the upper half of an image alone, so that half of every gradient is exactly zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x[:, :, :4].flatten(1))


# The gradient of DLR is zero where the label has the third largest logit, that of a reached margin always.
@pytest.mark.parametrize(
    "name",
    [name for name in ATTACKS if name not in ("apgd-dlr", "cw-l2", *WITHOUT_GRADIENT)],
)
def test_zero_gradients_are_counted(name: str) -> None:
    x, y = digits_test(16)
    attack = ATTACKS[name](HalfMasked(), seed=0, precision="fp32")
    attack(x, y)
    assert attack.last.zero_gradient_share == pytest.approx(0.5, abs=1e-6)
    assert attack.last.nan_gradients == 0


def test_gradients_of_reached_margins_count_as_zeros() -> None:
    x, y = digits_test(16)
    attack = ATTACKS["cw-l2"](HalfMasked(), precision="fp32")
    attack(x, y)
    assert 0.5 < attack.last.zero_gradient_share < 1


@pytest.mark.parametrize(
    "attack", [fastadv.PGD, fastadv.FGSM, fastadv.MIM, fastadv.CW, fastadv.FriendlyPGD]
)
@pytest.mark.parametrize("kind", ["rounded", "nan logits", "nan gradient"])
def test_gradients_that_lead_nowhere_are_told(attack: type[fastadv.PGD], kind: str) -> None:
    linear = HalfMasked()

    def model(x: Tensor) -> Tensor:
        if kind == "rounded":
            return linear((x * 255).round() / 255)
        logits = linear(x)
        if kind == "nan logits":
            return logits.index_fill(1, torch.tensor([3]), torch.nan)
        return logits + (0 * x[:, 0, 0, :1]).sqrt()

    x, y = digits_test(4)
    words = "zero everywhere" if kind == "rounded" else "NaN or infinite in .* elements"
    with pytest.warns(UserWarning, match=f"gradient in x is {words}") as told:
        attack(model)(x.clamp(0.01, 0.99), y)
    assert told[0].filename == __file__


@pytest.mark.parametrize(
    "attack", [fastadv.PGD, fastadv.MIM, fastadv.APGD, fastadv.CWL2, fastadv.FAB]
)
def test_probabilities_in_place_of_logits_are_told(attack: type[fastadv.PGD]) -> None:
    x = digits_test(4)[0]
    y = HalfMasked()(x).argmax(1)
    with pytest.warns(UserWarning, match="the model returns probabilities") as told:
        attack(nn.Sequential(HalfMasked(), nn.Softmax(1)), steps=20)(x, y)
    assert told[-1].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack(nn.Sequential(HalfMasked(), nn.LogSoftmax(1)), steps=20, engine="eager")(x, y)


def test_a_loss_of_ones_own_may_take_probabilities() -> None:
    x, y = digits_test(4)
    model = nn.Sequential(HalfMasked(), nn.Softmax(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack = fastadv.PGD(model, loss=lambda p, y: F.nll_loss(p.log(), y), engine="eager")
        attack(x, y)


def test_steps_that_lead_nowhere_are_told() -> None:
    with pytest.warns(
        UserWarning, match=r"alpha \* steps is 1e-08, less than a tenth of eps"
    ) as told:
        fastadv.PGD(HalfMasked(), alpha=1e-9, steps=10)
    assert told[0].filename == __file__


def test_gradients_that_lead_somewhere_are_not_talked_of() -> None:
    x, y = digits_test(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastadv.PGD(HalfMasked(), steps=2, engine="eager")(x, y)
        fastadv.CWL2(HalfMasked(), steps=20, engine="eager")(x, y)


@pytest.mark.parametrize("name", ["pgd", "mim", "apgd-ce"])
def test_nan_gradients_are_counted(name: str) -> None:
    def model(x: Tensor) -> Tensor:
        flat = x.flatten(1)
        # The square root of 0 has an infinite gradient, and 0 times that is NaN.
        return flat[:, :10] + (0 * flat[:, :1]).sqrt()

    x, y = 0.5 + 0 * digits_test(4)[0], digits_test(4)[1]
    attack = ATTACKS[name](model, seed=0)  # type: ignore[arg-type]
    adv = attack(x, y)
    gradients = len(attack.last.loss_per_step)
    assert attack.last.nan_gradients == 4 * gradients > 0
    assert adv.isfinite().all() and attack.last.outside_share == 0


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize(("size", "infinite"), [(1e25, False), (torch.inf, True)])
def test_finite_gradients_whose_squares_overflow_are_not_infinite(
    norm: str, size: float, infinite: bool
) -> None:
    class Steep(HalfMasked):
        def forward(self, x: Tensor) -> Tensor:
            return _Steep.apply(super().forward(x), size)

    x, y = digits_test(4)
    attack = fastadv.PGD(Steep(), 0.1, 0.05, steps=2, norm=norm, engine="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if infinite else "error")
        attack(x, y)
    assert (attack.last.nan_gradients > 0) == infinite


class _Steep(torch.autograd.Function):
    """The identity, whose gradient is so many times too large."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, size: float) -> Tensor:  # type: ignore[override]
        ctx.size = size
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.size, None


@pytest.mark.parametrize("engine", ["eager", "compiled"])
@pytest.mark.parametrize("kind", [fastadv.Square, fastadv.APGD])
def test_points_at_which_logits_are_nan_are_counted_and_told(kind: Any, engine: str) -> None:
    """Also those of an attack that takes no gradient, which passes over them as if they broke no image."""

    class NaNWhereBright(HalfMasked):
        def forward(self, x: Tensor) -> Tensor:
            bright = x.mean((1, 2, 3)) > 0.5  # no image is, but points near the images are
            return super().forward(x) + torch.where(bright, torch.nan, 0.0)[:, None]

    model, x = NaNWhereBright(), torch.full((4, 1, 8, 8), 0.499)
    attack = kind(model, 0.1, 20, engine=engine)
    with pytest.warns(UserWarning, match="NaN"):
        attack(x, model(x).argmax(1), seed=0)
    assert attack.last.nan_points > 0
    assert f"NaN logits at {attack.last.nan_points} points" in str(attack.last)


@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_point_whose_logits_are_nan_is_counted_once(keep: Any) -> None:
    class NaNForAll(HalfMasked):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.nan

    model, x, y = NaNForAll(), torch.full((4, 1, 8, 8), 0.5), torch.zeros(4, dtype=torch.int64)
    attack = fastadv.FriendlyPGD(model, 0.1, 0.05, 3, keep=keep)
    with pytest.warns(UserWarning, match="NaN"):
        attack(x, y, seed=0)
    points = 3 if keep == "last" else 4  # "best" looks at the last point as well
    assert attack.last.nan_points == 4 * points


@pytest.mark.parametrize("way", WAYS)
def test_the_losses_are_those_of_the_points_on_the_way(way: str) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(32)
    losses = []
    for steps in range(1, 5):
        attack = fastadv.PGD(model, 0.08, 0.02, steps, seed=3, **WAYS[way])
        adv = attack(x, y)
        losses.append(F.cross_entropy(model(adv), y).item())
    seen = attack.last.loss_per_step
    assert len(seen) == 4 and seen[0] < losses[0]
    tolerance = 1e-5 if "fp32" in way else 0.05
    assert seen[1:] == pytest.approx(losses[:3], rel=tolerance)


def test_restarts_follow_one_another_and_targeted_losses_are_negative() -> None:
    x, y = digits_test(8)
    attack = fastadv.PGD(trained_small_cnn(), 0.08, steps=3, restarts=2, targeted=True, seed=0)
    attack(x, (y + 1) % 10)
    losses = attack.last.loss_per_step
    assert len(losses) == 6 and all(loss < 0 for loss in losses)
    assert losses[2] > losses[0] and losses[5] > losses[3] and losses[3] < losses[2]


def test_it_says_which_engine_ran_and_why() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(4)
    attack = fastadv.PGD(model, steps=1, precision="fp32")
    with pytest.raises(RuntimeError, match="last must be read after a call"):
        _ = attack.last
    attack(x, y)
    report = attack.last
    assert (report.engine, report.precision) == ("eager", "fp32")
    assert "the model's own operations" in report.reason
    assert "eager engine" in str(report) and "outside 0.00 %" in str(report)
    narrow = fastadv.PGD(model, steps=1, precision="bf16", engine="compiled")
    narrow(x, y)
    assert (narrow.last.engine, narrow.last.precision) == ("compiled", "bf16")
    assert narrow.last.reason == "asked for"
    assert (report.engine, report.elements) == (
        "eager",
        4 * 64,
    )  # a report does not change any more


def outside_image(norm: str) -> Tensor:
    """The four images of `test_what_is_outside_is_found`, moved."""
    x = torch.full((4, 1, 8, 8), 0.5)
    adv = x + (0.1 if norm == "linf" else 0.1 / 8)
    adv[1, 0, 0, 0] = 0.65
    adv[2, 0, 0, :2] = torch.tensor([torch.nan, 1.1])
    return adv


def test_what_is_outside_is_found() -> None:
    x = torch.full((4, 1, 8, 8), 0.5)
    inside = x + 0.1
    assert float(outside_share(inside, x, 0.1, "linf", (0, 1))) == 0
    assert float(outside_share(inside.nextafter(x + 1), x, 0.1, "linf", (0, 1))) == 1
    assert float(outside_share(inside, x, 0.1, "linf", (0, 0.55))) == 1
    assert float(outside_share(outside_image("linf"), x, 0.1, "linf", (0, 1))) == 3 / 256
    per_image = torch.tensor([0.1, 0.2, 0.05, 0.1])
    assert float(outside_share(outside_image("linf"), x, per_image, "linf", (0, 1))) == 64 / 256
    assert float(outside_share(x + 0.1 / 8, x, 0.1, "l2", (0, 1))) == 0
    assert float(outside_share(x + 0.1 / 8, x, 0.09999, "l2", (0, 1))) == 1
    assert float(outside_share(outside_image("l2"), x, 0.1, "l2", (0, 1))) == 128 / 256


def test_rounding_to_float32_is_not_outside() -> None:
    """A perturbation of a small radius is longer by what its image's elements are rounded."""
    x = 0.1 + 0.8 * torch.rand(64, 3, 16, 16).double()
    delta = torch.randn_like(x)
    delta *= 1e-3 / delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    adv, x = (x + delta).float(), x.float()
    assert float(outside_share(adv, x, 1e-3, "l2", (0, 1))) == 0
    assert float(outside_share((x + delta * 1.01).float(), x, 1e-3, "l2", (0, 1))) > 0.9


@pytest.mark.parametrize("name", ["pgd", "apgd-ce", "square"])
@pytest.mark.parametrize(("norm", "eps"), [("l2", 1e-3), ("l1", 1e-3)])
def test_rounding_in_a_small_ball_is_not_outside(norm: str, eps: float, name: str) -> None:
    x, y = digits_test(16)
    attack = ATTACKS[name](trained_small_cnn(), norm, eps=eps, seed=0, precision="fp32")
    assert not torch.equal(attack(x, y), x) and attack.last.outside_share == 0


def test_counting_reads_nothing_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor becomes a number between the check of the inputs and the reading of the report."""
    attacks = [
        ATTACKS[name](trained_small_cnn(), seed=0, precision="fp32", check_inputs=False)
        for name in ("pgd best restarts", "mim", "apgd-ce", "apgd-dlr", "cw-l2")
    ]
    x, y = digits_test(8)
    for attack in attacks:
        attack.engine_for(x)  # making an engine may read

    def refuse(self: Tensor, *args: object) -> None:
        raise AssertionError("a tensor was read")

    for method in ("item", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(Tensor, method, refuse)
    for attack in attacks:
        attack(x, y)
