"""The best point of a run is kept, sample by sample, and never a worse one than the last."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attack_helpers import digits_test, robust_accuracy, trained_small_cnn
from torch import Tensor

import fastadv
from fastadv.attacks.best import Best

pytestmark = pytest.mark.usefixtures("one_thread")
LIMITS = {"linf": (0.08, 0.06), "l2": (0.6, 0.4)}  # steps too long to settle


def points_of_a_run(norm: str, steps: int, **options: object) -> list[Tensor]:
    """Every point of one run: runs of fewer steps from the same start are parts of it."""
    eps, alpha = LIMITS[norm]
    points = []
    for count in range(1, steps + 1):
        attack = fastadv.PGD(
            trained_small_cnn(), eps, alpha, count, norm=norm, seed=2, precision="fp32", **options
        )
        points.append(attack(*digits_test(48)))
    return points


@pytest.mark.parametrize("norm", LIMITS)
def test_it_is_the_best_of_all_points(norm: str) -> None:
    model, (x, y), (eps, alpha) = trained_small_cnn(), digits_test(48), LIMITS[norm]
    start = fastadv.ops.random_start(x, eps, norm, seed=2)
    points = torch.stack([start, *points_of_a_run(norm, 6)])
    attack = fastadv.PGD(model, eps, alpha, 6, norm=norm, seed=2, precision="fp32", keep="best")
    best = attack(x, y)
    with torch.no_grad():
        logits = torch.stack([model(point) for point in points])
    loss = torch.stack([F.cross_entropy(z, y, reduction="none") for z in logits])
    wrong = logits.argmax(2) != y
    rank = torch.where(wrong, loss + 1e3, loss).argmax(0)
    expected = points[rank, torch.arange(48)]
    assert torch.equal(best, expected)
    if norm == "linf":  # where steps of one size overshoot; in l2 this run settles
        assert (rank < 6).any()


@pytest.mark.parametrize("norm", LIMITS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_best_is_as_strong_as_the_last(norm: str, precision: str) -> None:
    model, (x, y), (eps, alpha) = trained_small_cnn(), digits_test(200), LIMITS[norm]
    options = dict(norm=norm, seed=1, precision=precision)
    last = fastadv.pgd_fused(model, x, y, eps=eps, alpha=alpha, steps=8, **options)
    best = fastadv.pgd_fused(model, x, y, eps=eps, alpha=alpha, steps=8, keep="best", **options)
    slack = 0 if precision == "fp32" else 0.01  # bf16 ranks by logits of its own
    assert robust_accuracy(model, best, y) <= robust_accuracy(model, last, y) + slack
    losses = [F.cross_entropy(model(adv), y).item() for adv in (best, last)]
    assert losses[0] >= losses[1] - (0 if precision == "fp32" else 0.01)


def test_it_costs_one_forward_pass() -> None:
    model, (x, y), calls = trained_small_cnn(), digits_test(4), []

    def counting(images: Tensor) -> Tensor:
        calls.append(images.requires_grad)
        return model(images)

    fastadv.pgd_fused(counting, x, y, steps=5, keep="best")
    assert calls == [True] * 5 + [False]


def test_a_targeted_run_keeps_the_point_nearest_to_its_target() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(64)
    options = dict(eps=0.15, alpha=0.15, steps=6, targeted=True, seed=0, precision="fp32")
    targets = (y + 1) % 10
    reached = [
        (model(fastadv.pgd_fused(model, x, targets, keep=keep, **options)).argmax(1) == targets)
        for keep in ("best", "last")
    ]
    assert (reached[0] | ~reached[1]).all() and reached[0].sum() > reached[1].sum()


def test_a_success_ranks_above_any_value() -> None:
    images, flags = torch.arange(4.0)[:, None], torch.tensor([False, True, False, True])
    best = Best()
    best.offer(images, torch.tensor([1.0, 1, 1, 1]), flags)
    best.offer(
        images + 10, torch.tensor([0.5, 5, 0.5, 2]), torch.tensor([True, False, False, True])
    )
    assert best.images.flatten().tolist() == [10, 1, 2, 13]
    assert best.value.tolist() == [0.5, 1, 1, 2]
    assert best.succeeded.tolist() == [True, True, False, True]
    by_value = Best(prefer_success=False)
    by_value.offer(images, torch.tensor([1.0, 1, 1, torch.nan]), flags)
    by_value.offer(images + 10, torch.tensor([2.0, 5, torch.nan, 0]), ~flags)
    assert by_value.images.flatten().tolist() == [10, 11, 2, 13]


def test_a_search_over_some_samples_is_merged() -> None:
    best, some = Best(), Best()
    best.offer(torch.zeros(4, 2), torch.zeros(4), torch.zeros(4, dtype=torch.bool))
    some.offer(torch.ones(2, 2), torch.tensor([1.0, -1]), torch.tensor([False, False]))
    best.merge(some, torch.tensor([3, 1]))
    assert best.images[:, 0].tolist() == [0, 0, 0, 1] and best.value.tolist() == [0, 0, 0, 1]


def test_images_offered_may_be_written_to_afterwards() -> None:
    adv, best = torch.zeros(2, 3), Best()
    best.offer(adv, torch.zeros(2), torch.zeros(2, dtype=torch.bool))
    adv += 1
    assert (best.images == 0).all()
