"""Auto-PGD in a pool: what the attack itself finds, image by image, with batches that stay full."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from attack_helpers import digits_test, trained_small_cnn
from linear_model import Staircase
from torch import Tensor, nn

import fastadv
from fastadv.attacks.apgd_pool import APGDPool
from fastadv.attacks.apgd_runs import FinishedRun, Run
from fastadv.attacks.objectives import likeliest_wrong_classes
from fastadv.engine.engines import Engine

pytestmark = pytest.mark.usefixtures("one_thread")
SEED = 5


class Collector:
    """Keeps everything, and takes for broken what the plain model does."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self.model, self.x, self.y = model, x, y
        self.ended: list[FinishedRun] = []
        self.broken: dict[int, Tensor] = {}
        self.asked = 0

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.x[indices], self.y[indices]

    def confirm(self, images: Sequence[int], points: Tensor) -> Sequence[bool]:
        self.asked += len(images)
        with torch.no_grad():
            wrong = self.model(points).argmax(1) != self.y[list(images)]
        for image, point, yes in zip(images, points, wrong.tolist(), strict=True):
            if yes:
                self.broken.setdefault(image, point)
        return wrong.tolist()

    def record(self, finished: Sequence[FinishedRun]) -> None:
        self.ended += finished


def runs_of(model: nn.Module, x: Tensor, y: Tensor, targets: int) -> list[Run]:
    """All runs, target by target."""
    if not targets:
        return [Run(image) for image in range(len(x))]
    with torch.no_grad():
        classes = likeliest_wrong_classes(model(x), y, targets)
    return [
        Run(image, number, int(classes[image, number]))
        for number in range(targets)
        for image in range(len(x))
    ]


def best_of(ended: Iterable[FinishedRun], x: Tensor) -> Tensor:
    """What `APGD` returns: the first run that succeeds, else the point of highest value."""
    adv, first, value = x.clone(), {}, {}
    for one in sorted(ended, key=lambda one: one.run.number):
        image = one.run.image
        if image in first:
            continue
        if one.succeeded:
            first[image] = one.run.number
        if one.succeeded or one.value > value.get(image, -torch.inf):
            adv[image], value[image] = one.point, one.value
    return adv


@pytest.mark.parametrize("size", [5, 16, 64])
@pytest.mark.parametrize(
    ("loss", "norm", "eps"), [("ce", "linf", 0.08), ("dlr", "l2", 0.5), ("dlr-t", "linf", 0.08)]
)
def test_without_early_leaving_it_gives_what_the_attack_gives(
    loss: Any, norm: str, eps: float, size: int
) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(24)
    settings = {"steps": 12, "loss": loss, "norm": norm, "precision": "fp32", "engine": "eager"}
    attack = fastadv.APGD(model, eps, target_classes=3, **settings)
    expected = attack(x, y, seed=SEED)
    keeper = Collector(model, x, y)
    runs = runs_of(model, x, y, 3 if loss == "dlr-t" else 0)
    APGDPool(attack, size, SEED, early=False).run(runs, keeper.take, keeper)
    found = best_of(keeper.ended, x)
    furthest = (found - expected).flatten(1).abs().amax(1)
    assert (furthest <= 1e-5).float().mean() >= 0.9, furthest  # rounding may choose another side
    with torch.no_grad():
        assert torch.equal(model(found).argmax(1) == y, model(expected).argmax(1) == y)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_images_leave_once_broken_and_the_batch_stays_full(precision: Any) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(80)
    attack = fastadv.APGD(model, 0.08, 20, loss="dlr-t", precision=precision)
    keeper = Collector(model, x, y)
    pool = APGDPool(attack, 32, SEED)
    pool.run(runs_of(model, x, y, 4), keeper.take, keeper)
    plain = fastadv.APGD(
        model, 0.08, 20, loss="dlr-t", target_classes=4, precision="fp32", engine="eager"
    )
    with torch.no_grad():
        robust = model(plain(x, y, seed=SEED)).argmax(1) == y
    assert abs(int(robust.sum()) - (80 - len(keeper.broken))) <= (1 if precision == "fp32" else 2)
    assert len(keeper.broken) < 80 < keeper.asked + 80
    left = {one.run.image for one in keeper.ended} - set(keeper.broken)
    assert left == set(range(80)) - set(keeper.broken)
    # Each image that is left costs 4 runs of 21 gradients; the others a small part of this.
    needed = 84 * len(left)
    assert needed <= pool.steps < needed + 0.4 * 84 * len(keeper.broken)
    assert pool.steps > 0.9 * pool.rows
    for image, point in keeper.broken.items():
        assert (point - x[image]).abs().max() <= 0.08 + 1e-6


def test_batches_shrink_with_their_runs_and_nothing_else_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the CPU an engine takes every size, so that few rows are without a run."""
    model, (x, y) = trained_small_cnn(), digits_test(41)
    attack = fastadv.APGD(model, 0.07, 30, precision="fp32", engine="compiled")

    def searched() -> tuple[APGDPool, Collector]:
        pool, keeper = APGDPool(attack, 64, SEED), Collector(model, x, y)
        pool.run(runs_of(model, x, y, 0), keeper.take, keeper)
        return pool, keeper

    pool, found = searched()
    engine_for = attack.engine_for

    def of_few_sizes(images: Tensor) -> Engine:
        engine = engine_for(images)
        engine.any_batch = False
        return engine

    monkeypatch.setattr(attack, "engine_for", of_few_sizes)
    coarse, known = searched()
    assert found.broken.keys() == known.broken.keys() and 3 < len(found.broken) < 38
    for image, point in found.broken.items():
        assert torch.allclose(point, known.broken[image], atol=1e-6)
    assert pool.steps == coarse.steps
    assert pool.steps > 0.85 * pool.rows and pool.rows < 0.95 * coarse.rows


def test_the_batches_have_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(70)
    attack = fastadv.APGD(model, 0.08, 10, precision="bf16")
    sizes = []
    engine_for = attack.engine_for
    monkeypatch.setattr(attack, "engine_for", lambda x: sizes.append(len(x)) or engine_for(x))
    keeper = Collector(model, x, y)
    APGDPool(attack, 32, SEED).run(runs_of(model, x, y, 0), keeper.take, keeper)
    assert sizes[0] == 32 and set(sizes) <= {32, 24, 16, 12, 8}
    assert len(keeper.broken) + len(keeper.ended) >= 70


@pytest.mark.slow
def test_the_order_and_the_size_do_not_decide_what_breaks() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(60)
    attack = fastadv.APGD(model, 0.06, 20, precision="fp32", engine="eager")
    found = []
    for size, order in ((60, 1), (7, 1), (16, -1)):
        keeper = Collector(model, x, y)
        runs = runs_of(model, x, y, 0)[::order]
        APGDPool(attack, size, SEED).run(runs, keeper.take, keeper)
        found.append(set(keeper.broken))
    assert found[0] == found[1] == found[2] and 0 < len(found[0]) < 60


@pytest.mark.parametrize("set_aside", [True, False])
def test_what_the_referee_refuses_goes_on_or_is_set_aside(set_aside: bool) -> None:
    model, (x, y) = trained_small_cnn(), digits_test(30)
    attack = fastadv.APGD(model, 0.08, 12, precision="fp32", engine="eager")

    class Stubborn(Collector):
        def confirm(self, images: Sequence[int], points: Tensor) -> Sequence[bool]:
            super().confirm(images, points)
            return [False] * len(images)

    keeper = Stubborn(model, x, y)
    APGDPool(attack, 16, SEED, set_aside=set_aside).run(
        runs_of(model, x, y, 0), keeper.take, keeper
    )
    assert sorted(one.run.image for one in keeper.ended) == list(range(30))
    early = [one for one in keeper.ended if one.step < 12]
    assert all(one.succeeded for one in early)
    assert bool(early) == set_aside


def test_a_run_may_begin_where_another_has_ended() -> None:
    model, (x, y) = trained_small_cnn(), digits_test(20)
    attack = fastadv.APGD(model, 0.05, 20, precision="fp32", engine="eager")
    first, second = Collector(model, x, y), Collector(model, x, y)
    APGDPool(attack, 20, SEED, early=False).run(runs_of(model, x, y, 0), first.take, first)
    again = [
        Run(one.run.image, point=one.point, alpha=0.01, step=15)
        for one in first.ended
        if not one.succeeded
    ]
    pool = APGDPool(attack, 20, SEED, early=False)
    pool.run(again, second.take, second)
    assert len(again) > 3 and pool.steps == 6 * len(again)
    before = {one.run.image: one.value for one in first.ended}
    assert all(one.value >= before[one.run.image] - 1e-4 for one in second.ended)


def test_runs_without_a_gradient_are_counted() -> None:
    (x, y), model = digits_test(6), Staircase(trained_small_cnn(), levels=50).eval()
    attack = fastadv.APGD(model, 0.01, 3, loss="dlr", precision="fp32", engine="eager")
    keeper, pool = Collector(model, x, y), APGDPool(attack, 4, SEED)
    pool.run(runs_of(model, x, y, 0), keeper.take, keeper)
    assert pool.starts_without_gradient == 6


def test_attacks_that_no_pool_runs_are_refused() -> None:
    for change in ({"targeted": True}, {"train_mode": True}):
        with pytest.raises(ValueError, match="neither targeted nor in train mode"):
            APGDPool(fastadv.APGD(trained_small_cnn(), **change), 4, SEED)
