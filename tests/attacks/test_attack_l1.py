"""Attacks in the l1 ball: what plain loops in float64 compute, inside the ball, and as strong as can be said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attack_helpers import cross_entropy, digits_test, images, largest_change, trained_small_cnn
from linear_model import LinearModel, linear_problem
from torch import Tensor, nn

import fastadv
from fastadv import evaluate, minimum_perturbation
from fastadv.attacks.report import outside_share
from fastadv.attacks.rounding import round_towards
from fastadv.ops import random_start

pytestmark = pytest.mark.usefixtures("one_thread")
EPS, ALPHA = 2.5, 0.8


def projected(delta: Tensor, radius: float) -> Tensor:
    """The nearest point of the l1 ball to a vector, by sorting (Duchi et al. 2008, figure 1)."""
    if delta.abs().sum() <= radius:
        return delta
    ordered = delta.abs().sort(descending=True).values
    excess = (ordered.cumsum(0) - radius) / torch.arange(1, len(delta) + 1)
    theta = excess[ordered > excess][-1]
    return delta.sign() * (delta.abs() - theta).clamp(min=0)


def plain_step(adv: Tensor, grad: Tensor, x: Tensor, eps: float, alpha: float, k: int) -> Tensor:
    """One step of one image, [N] each: the k largest elements that can move do, by equal parts."""
    can_move = torch.where(grad > 0, adv < 1, adv > 0) & (grad != 0)
    largest = (grad.abs() * can_move).argsort(descending=True)[:k]
    largest = largest[can_move[largest]]
    moved = adv.clone()
    moved[largest] += alpha / len(largest) * grad[largest].sign()
    return (x + projected(moved - x, eps)).clamp(0, 1)


def plain_l1(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    start: Tensor,
    *,
    alpha: float = ALPHA,
    steps: int = 4,
    k: int = 4,
    decay: float | None = None,
) -> Tensor:
    """PGD, or with a decay MIM, in the l1 ball of radius EPS."""
    adv, momentum = start.clone(), torch.zeros_like(x)
    for _ in range(steps):
        leaf = adv.clone().requires_grad_()
        (direction,) = torch.autograd.grad(cross_entropy(model(leaf), y), leaf)
        if decay is not None:
            size = direction.abs().flatten(1).sum(1).view(-1, 1, 1, 1)
            direction = momentum = decay * momentum + direction / size
        rows = zip(adv.flatten(1), direction.flatten(1), x.flatten(1), strict=True)
        adv = torch.stack([plain_step(*row, EPS, alpha, k) for row in rows]).view_as(x)
    return adv


@pytest.mark.parametrize(
    ("kind", "options", "plain"),
    [
        (fastadv.PGD, {"alpha": ALPHA, "steps": 4}, {}),
        (fastadv.PGD, {"alpha": ALPHA, "steps": 4, "sparsity": 0.8}, {"k": 13}),
        (fastadv.PGD, {"alpha": ALPHA, "steps": 4, "sparsity": 0.0}, {"k": 64}),
        (fastadv.PGD, {"alpha": ALPHA, "steps": 4, "random_start": False}, {}),
        (fastadv.FGSM, {}, {"alpha": EPS, "steps": 1}),
        (fastadv.FGSMRS, {}, {"alpha": 1.25 * EPS, "steps": 1}),
        (fastadv.MIM, {"alpha": ALPHA, "steps": 4, "decay": 0.7}, {"decay": 0.7}),
    ],
    ids=["pgd", "pgd dense", "pgd all", "pgd from x", "fgsm", "fgsm-rs", "mim"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_plain_loop_gives_the_same(
    kind: Any, options: dict[str, Any], plain: dict[str, Any], dtype: torch.dtype
) -> None:
    model, (x, y) = trained_small_cnn().to(dtype), digits_test(32)
    x = x.to(dtype)
    attack = kind(model, EPS, norm="l1", precision="fp32", seed=5, **options)
    adv = attack(x, y)
    at_random = attack.settings.random_start
    start = random_start(x, EPS, "l1", seed=5) if at_random else x
    expected = plain_l1(model.double(), x.double(), y, start.double(), **plain)
    assert largest_change(expected, start, "l1") > 0.5  # the loop has moved something
    # Two elements next to one another in size may change places by rounding, in an image or two.
    furthest = (adv - expected).flatten(1).abs().amax(1)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert (furthest <= tolerance).double().mean() >= 0.9, furthest


def test_the_whole_gradient_is_counted() -> None:
    """Also the elements that a step leaves alone because they cannot move."""
    model, (x, y) = trained_small_cnn(), digits_test(8)
    reports = []
    for norm in ("l1", "l2"):
        attack = fastadv.PGD(model, EPS, ALPHA, 1, False, norm=norm, precision="fp32")
        attack(x, y)
        reports.append(attack.last.counts.tolist())
    assert reports[0] == reports[1]
    broken = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        broken[1].weight.fill_(torch.nan)
    attack = fastadv.PGD(broken, EPS, ALPHA, 2, norm="l1", precision="fp32", seed=0)
    adv = attack(x, y)
    assert attack.last.nan_gradients == 2 * x.numel()
    assert adv.isfinite().all() and attack.last.outside_share == 0


def test_an_element_at_its_bound_makes_room_for_the_next() -> None:
    """Of a linear model the elements move one after the other, the heaviest first."""
    weight = torch.zeros(2, 8)
    weight[1] = torch.tensor([8.0, -7, 6, 5, -4, 3, 2, 1])
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(weight)
    x = torch.tensor([[[[1.0, 0.0, 0.75, 0.5, 0.5, 0.5, 0.5, 0.5]]]])
    attack = fastadv.PGD(model, 1.0, 0.25, 4, False, norm="l1", precision="fp32", sparsity=0.9)
    adv = attack(x, torch.zeros(1, dtype=torch.int64))
    moved = torch.tensor([0.0, 0.0, 0.25, 0.5, -0.25, 0.0, 0.0, 0.0])
    torch.testing.assert_close((adv - x).flatten(), moved, rtol=0, atol=1e-6)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("sparsity", [0.99, 0.95])
def test_the_smallest_radius_is_the_distance_from_a_plane(sparsity: float, targeted: bool) -> None:
    """Far from the bounds the k heaviest elements move, so that the margin falls by their mean weight."""
    model = LinearModel(torch.randn(2, 64, generator=torch.Generator().manual_seed(0))).eval()
    x = images(16, channels=1)
    logits = model(x).detach()
    normal = (model.linear.weight[0] - model.linear.weight[1]).detach().abs()
    distance = (logits[:, 0] - logits[:, 1]).abs() / normal.topk({0.99: 1, 0.95: 4}[sparsity])[
        0
    ].mean()
    y = logits.argmax(1)
    options: dict[str, Any] = dict(norm="l1", bounds=(-20.0, 20.0), sparsity=sparsity)
    attack = fastadv.PGD(
        model, 1.0, 0.5, 8, targeted=targeted, random_start=False, precision="fp32", **options
    )
    largest = float(distance.max()) * 1.5
    labels = 1 - y if targeted else y
    found = minimum_perturbation(attack, x, labels, max_eps=largest, iterations=14)
    torch.testing.assert_close(found, distance, rtol=1e-3, atol=largest * 2**-13)


def test_what_is_outside_is_found() -> None:
    x = torch.full((4, 3, 32, 32), 0.5)
    inside = x + 1.2 / 3072  # every element rounded up
    assert (inside - x).double().sum() > 4 * 1.2 * (1 + 1e-5)
    outside = inside.clone()
    outside[1, 0, 0, 0] += 0.01
    outside[2, 0, 0, 0] = torch.nan
    assert float(outside_share(inside, x, 1.2, "l1", (0, 1))) == 0
    assert float(outside_share(outside, x, 1.2, "l1", (0, 1))) == 2 / 4
    assert float(outside_share(inside, x, 1.199, "l1", (0, 1))) == 1
    radii = torch.tensor([1.2, 0.5, 1.2, 2.0])
    assert float(outside_share(inside, x, radii, "l1", (0, 1))) == 1 / 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_half_precision_does_not_lengthen(dtype: torch.dtype) -> None:
    x = images(16, size=16).to(dtype)
    adv = random_start(x.float(), 20.0, "l1", seed=0)
    before = (adv.double() - x.double()).flatten(1).abs().sum(1)
    after = (round_towards(adv, x).double() - x.double()).flatten(1).abs().sum(1)
    assert (after <= before).all() and (after > 0.5 * before).all()


def test_evaluate_attacks_and_verifies_in_l1() -> None:
    model, x, y = linear_problem(classes=3, n=40)
    names = ["clean", "fgsm", "pgd-5", "pgd-5-2", "mim-5", "apgd-ce-5", "fab-t-5"]
    report = evaluate(model, (x, y), names, eps=1.5, norm="l1", progress=False)
    clean, *attacked = (row.accuracy for row in report.rows)
    assert all(row.status == "ok" for row in report.rows)
    assert clean == 1 and all(0 <= accuracy < 0.9 for accuracy in attacked)
