"""PGD computes what a plain loop computes, stays inside its limits, and is as strong in a narrow precision."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from attack_helpers import (
    Loss,
    cross_entropy,
    digits_test,
    divergence_from,
    images,
    largest_change,
    logits_ratio,
    margin,
    per_sample_norm,
    plain_pgd,
    randomise,
    robust_accuracy,
    trained_small_cnn,
)
from torch import Tensor, nn

import fastadv
from fastadv.models.preact_resnet import preact_resnet18
from fastadv.models.resnet import resnet18
from fastadv.models.vgg import vgg16_bn
from fastadv.models.wide_resnet import WideResNet
from fastadv.ops import random_start

pytestmark = pytest.mark.usefixtures("one_thread")

LIMITS = {"linf": (0.1, 0.03), "l2": (1.0, 0.3)}  # eps and alpha for digits
NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (resnet18, 16),
    "preact_resnet18": (preact_resnet18, 16),
    "vgg16_bn": (vgg16_bn, 32),
    "wide_resnet": (lambda: WideResNet(10, 2, 10, 3), 16),
}


def mean_loss(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, label_smoothing=0.1)


def per_sample_loss(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none", label_smoothing=0.1)


def assert_equal_to_plain(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    norm: str,
    limits: tuple[float, float],
    steps: int,
    loss: str | Loss,
    plain_loss: Loss,
    targeted: bool = False,
) -> None:
    eps, alpha = limits
    start = random_start(x, eps, norm, seed=5)
    expected = plain_pgd(
        model,
        x,
        y,
        start,
        eps=eps,
        alpha=alpha,
        steps=steps,
        loss=plain_loss,
        norm=norm,
        targeted=targeted,
    )
    adv = fastadv.pgd_fused(
        model,
        x,
        y,
        eps=eps,
        alpha=alpha,
        steps=steps,
        norm=norm,
        loss=loss,
        targeted=targeted,
        precision="fp32",
        seed=5,
    )
    assert largest_change(expected, start, norm) > alpha / 2  # the loop has moved something
    # A pixel whose gradient is rounding noise, or a ReLU at 0, may go either way in a sample or two.
    furthest = (adv - expected).flatten(1).abs().amax(1)
    assert (furthest <= 1e-6).float().mean() >= 0.95, furthest


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    ("loss", "plain_loss"),
    [
        ("ce", cross_entropy),
        ("cw", margin),
        ("dlr", logits_ratio),
        (mean_loss, mean_loss),
        (per_sample_loss, lambda logits, y: per_sample_loss(logits, y).sum()),
    ],
    ids=["ce", "cw", "dlr", "scalar callable", "per-sample callable"],
)
@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
def test_fp32_equals_a_plain_loop(
    norm: str, loss: str | Loss, plain_loss: Loss, targeted: bool
) -> None:
    x, y = digits_test(48)
    labels = (y + 3) % 10 if targeted else y
    assert_equal_to_plain(
        trained_small_cnn(), x, labels, norm, LIMITS[norm], 5, loss, plain_loss, targeted
    )


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_kl_equals_a_plain_loop_against_the_clean_logits(norm: str) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(48)
    plain_loss = divergence_from(model(x))
    assert_equal_to_plain(model, x, y, norm, LIMITS[norm], 5, "kl", plain_loss)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("net", NETS)
def test_fp32_equals_a_plain_loop_on_every_architecture(net: str, norm: str) -> None:
    make, size = NETS[net]
    torch.manual_seed(0)
    model = randomise(make())
    x, y = images(2, size=size), torch.arange(2)
    limits = (8 / 255, 3 / 255) if norm == "linf" else (0.5, 0.2)
    assert_equal_to_plain(model, x, y, norm, limits, 2, "ce", cross_entropy)


def test_the_callers_mode_is_not_the_attacks_mode() -> None:
    x, y = digits_test(16)
    model = trained_small_cnn()
    expected = fastadv.pgd_fused(model, x, y, steps=3, seed=0, precision="fp32")
    model.train()
    adv = fastadv.pgd_fused(model, x, y, steps=3, seed=0, precision="fp32")
    assert torch.equal(adv, expected)


def test_train_mode_attacks_the_statistics_of_the_batch() -> None:
    x, y = digits_test(32)
    model = trained_small_cnn().train()
    start = random_start(x, 0.1, seed=1)
    # Batch statistics do not depend on the running ones, which the loop's passes change.
    expected = plain_pgd(model, x, y, start, eps=0.1, alpha=0.03, steps=4, loss=cross_entropy)
    adv = fastadv.pgd_fused(
        trained_small_cnn(),
        x,
        y,
        eps=0.1,
        alpha=0.03,
        steps=4,
        precision="fp32",
        engine="eager",
        train_mode=True,
        seed=1,
    )
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-6)


def test_without_random_start_the_loop_begins_at_the_images() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(32)
    options = dict(eps=0.1, alpha=0.03, steps=5)
    expected = plain_pgd(model, x, y, x, loss=cross_entropy, **options)
    adv = fastadv.pgd_fused(model, x, y, random_start=False, precision="fp32", **options)
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fgsm_is_one_explicit_step(norm: str) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(64)
    eps = LIMITS[norm][0]
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(cross_entropy(model(leaf), y), leaf)
    step = grad.sign() if norm == "linf" else grad / per_sample_norm(grad)
    expected = (x + eps * step).clamp(0, 1)
    adv = fastadv.FGSM(model, eps, norm=norm, precision="fp32")(x, y)
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("engine", ["eager", "compiled"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_result_is_inside_ball_and_bounds(
    norm: str, dtype: torch.dtype, precision: str, engine: str
) -> None:
    eps, alpha = LIMITS[norm]
    (x, y), model = digits_test(64), trained_small_cnn()
    if dtype == torch.float64:
        model.double()
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    adv = fastadv.pgd_fused(
        model,
        x,
        y,
        eps=eps,
        alpha=2 * alpha,
        norm=norm,
        steps=4,
        precision=precision,
        engine=engine,
        seed=0,
    )
    assert adv.dtype == dtype and adv.stride() == x.stride()
    assert largest_change(adv, x, norm) <= eps * (1 + 1e-6)
    assert adv.min() >= 0 and adv.max() <= 1
    assert largest_change(adv, x, norm) > 0.9 * eps  # and it is used


def test_other_bounds_hold() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(32)
    low, high = -0.3, 0.5
    x = low + (high - low) * x
    adv = fastadv.pgd_fused(model, x, y, eps=0.2, alpha=0.1, steps=3, bounds=(low, high), seed=0)
    assert torch.tensor(low) <= adv.min() and adv.max() <= torch.tensor(high)
    assert largest_change(adv, x, "linf") <= 0.2 + 1e-6
    assert (adv == torch.tensor(high)).any()


def test_float64_images_are_attacked_in_float64() -> None:
    model, (x, y) = trained_small_cnn().double(), digits_test(16)
    x = x.double()
    start = random_start(x, 0.1, seed=3)
    expected = plain_pgd(model, x, y, start, eps=0.1, alpha=0.03, steps=3, loss=cross_entropy)
    adv = fastadv.pgd_fused(model, x, y, eps=0.1, alpha=0.03, steps=3, seed=3)
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded", "transposed"])
def test_the_layout_of_the_images_does_not_matter(layout: str) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(16)
    if layout == "expanded":
        x = x[:1].expand(16, 1, 8, 8)
    odd = {
        "channels_last": lambda: x.contiguous(memory_format=torch.channels_last),
        "sliced": lambda: F.pad(x, (0, 3))[..., :8],
        "expanded": lambda: x,
        "transposed": lambda: x.transpose(2, 3).contiguous().transpose(2, 3),
    }[layout]()
    expected = fastadv.pgd_fused(model, x.contiguous(), y, steps=4, seed=0, precision="fp32")
    untouched = odd.clone()
    adv = fastadv.pgd_fused(model, odd, y, steps=4, seed=0, precision="fp32")
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-6)
    assert torch.equal(odd, untouched)


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_vectors_are_attacked_as_images_are(engine: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 5)).eval()
    x, y = torch.rand(8, 20), torch.arange(8) % 5
    start = random_start(x, 0.1, seed=2)
    expected = plain_pgd(model, x, y, start, eps=0.1, alpha=0.03, steps=4, loss=cross_entropy)
    adv = fastadv.pgd_fused(
        model, x, y, eps=0.1, alpha=0.03, steps=4, precision="fp32", engine=engine, seed=2
    )
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_restarts_never_lower_the_final_loss(norm: str, precision: str) -> None:
    """In fp32 sample by sample, in bf16, where the choice is made on rounded losses, on average."""
    model, (x, y) = trained_small_cnn(), digits_test(64)
    eps, alpha = LIMITS[norm]
    losses = []
    for restarts in (1, 2, 4):
        adv = fastadv.pgd_fused(
            model,
            x,
            y,
            eps=eps,
            alpha=alpha,
            steps=3,
            norm=norm,
            restarts=restarts,
            precision=precision,
            seed=0,
        )
        losses.append(F.cross_entropy(model(adv), y, reduction="none").detach())
    for fewer, more in itertools.pairwise(losses):
        if precision == "fp32":
            assert (more >= fewer).all()
        assert more.mean() > fewer.mean()


def test_targeted_restarts_keep_the_lowest_loss() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(64)
    options = dict(eps=0.1, alpha=0.05, steps=3, targeted=True, precision="fp32", seed=0)
    one = fastadv.pgd_fused(model, x, (y + 1) % 10, restarts=1, **options)
    four = fastadv.pgd_fused(model, x, (y + 1) % 10, restarts=4, **options)
    loss = [F.cross_entropy(model(adv), (y + 1) % 10, reduction="none") for adv in (one, four)]
    assert (loss[1] <= loss[0]).all() and (loss[1] < loss[0]).any()


@cache
def accuracy_under_a_plain_loop(norm: str, eps: float) -> float:
    model, (x, y) = trained_small_cnn(), digits_test()
    start = random_start(x, eps, norm, seed=9)
    options = dict(eps=eps, alpha=eps / 8, steps=20, loss=cross_entropy, norm=norm)
    return robust_accuracy(model, plain_pgd(model, x, y, start, **options), y)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "eps", "engine"),
    [("linf", 0.08, "compiled"), ("l2", 0.5, "compiled"), ("linf", 0.08, "eager")],
)
def test_bf16_is_as_strong_as_a_plain_fp32_loop(norm: str, eps: float, engine: str) -> None:
    """PGD-20, robust accuracy judged by the float32 model: within one point."""
    model, (x, y) = trained_small_cnn(), digits_test()
    options = dict(eps=eps, alpha=eps / 8, steps=20, norm=norm, precision="bf16", engine=engine)
    adv = fastadv.pgd_fused(model, x, y, seed=9, **options)
    expected = accuracy_under_a_plain_loop(norm, eps)
    # The attack is neither idle nor total.
    assert 0.1 < expected < 0.8 < robust_accuracy(model, x, y)
    assert abs(robust_accuracy(model, adv, y) - expected) <= 0.01


@pytest.mark.parametrize("loss", ["ce", "cw", "dlr", "kl"])
def test_every_loss_is_raised_in_bf16_as_far_as_in_fp32(loss: str) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(128)
    measure = {
        "ce": cross_entropy,
        "cw": margin,
        "dlr": logits_ratio,
        "kl": divergence_from(model(x)),
    }
    reached = []
    for way in ({"precision": "fp32"}, {"precision": "bf16", "engine": "compiled"}):
        values = []
        for seed in range(4):  # one seed alone moves the logits' ratio by 8 %
            adv = fastadv.pgd_fused(model, x, y, eps=0.08, alpha=0.01, loss=loss, seed=seed, **way)
            values.append(measure[loss](model(adv), y).item() / len(x))
        reached.append(sum(values) / len(values))
    clean = measure[loss](model(x), y).item() / len(x)
    assert reached[0] > clean + 0.3
    assert reached[1] - clean == pytest.approx(reached[0] - clean, rel=0.05)


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_fp16_is_as_strong_on_a_confident_net(engine: str) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(128)
    with torch.no_grad():
        model.linear.weight.mul_(5)  # the same decisions, with five times the confidence
        model.linear.bias.mul_(5)
    options = dict(eps=0.08, alpha=0.01, seed=0)
    wide = fastadv.pgd_fused(model, x, y, precision="fp32", **options)
    narrow = fastadv.pgd_fused(model, x, y, precision="fp16", engine=engine, **options)
    assert robust_accuracy(model, narrow, y) <= robust_accuracy(model, wide, y) + 0.02


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_folded_copy_in_fp32_is_as_strong_as_the_plain_loop(norm: str) -> None:
    """Folding rounds otherwise, so signs of vanishing gradients differ, and nothing else."""
    model, (x, y) = trained_small_cnn(), digits_test(128)
    eps, alpha = LIMITS[norm]
    options = dict(eps=eps, alpha=alpha, steps=10, norm=norm, precision="fp32", seed=0)
    live = fastadv.pgd_fused(model, x, y, engine="eager", **options)
    folded = fastadv.pgd_fused(model, x, y, engine="compiled", **options)
    # In l2 one flipped sign of a ReLU moves a whole image a little: three of the 128 may.
    assert ((live - folded).abs() < 1e-4).float().mean() > 0.97
    assert robust_accuracy(model, folded, y) == pytest.approx(
        robust_accuracy(model, live, y), abs=0.01
    )


def test_a_given_start_takes_the_place_of_the_random_one() -> None:
    model, x, y = randomise(resnet18()), images(4), torch.arange(4)
    attack = fastadv.PGD(model, 0.1, 0.03, 3, engine="eager", precision="fp32")
    start = random_start(x, 0.1, seed=7)
    assert torch.equal(attack(x, y, start=start), attack(x, y, seed=7))
    assert torch.equal(
        attack(x, y, start=x),
        fastadv.PGD(model, 0.1, 0.03, 3, False, engine="eager", precision="fp32")(x, y),
    )
    with pytest.raises(ValueError, match="start"):
        attack(x, y, start=x[:2])
