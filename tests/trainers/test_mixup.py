"""Mixup: pairs, shares and labels, its loss and attack against plain formulas, and runs that go on bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import Interruption, assert_same_end, run
from test_pair_methods import p_of
from torch import Tensor
from training_helpers import (
    make_batch,
    make_method,
    make_model,
    small_data,
    small_recipe,
)

from fastadv.ops import random_start
from fastadv.ranks import Ranks
from fastadv.trainers import Recipe, TrainBatch, find_method, train
from fastadv.trainers.mixup import mixed, partners_of, share_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
DOUBLE = torch.float64


class Parts(Ranks):
    """One of several processes that have parts of a batch, in one process."""

    def __init__(self, rank: int, parts: list[TrainBatch]) -> None:
        super().__init__(rank, len(parts))
        object.__setattr__(self, "parts", parts)

    def gather(self, part: Tensor) -> Tensor:
        parts: Any = vars(self)["parts"]
        (name,) = (n for n in ("ids", "x", "y") if getattr(parts[self.rank], n) is part)
        return torch.cat([getattr(one, name) for one in parts])


def test_a_batch_is_mixed_by_the_formula() -> None:
    batch = make_batch(16, DOUBLE)
    found = mixed(batch, 0.7, 4, Ranks())
    share, partners = share_of(batch, 0.7), partners_of(batch.ids, batch.seed("mixup"))
    assert sorted(partners.tolist()) == list(range(16))
    assert all(i != j for i, j in enumerate(partners.tolist()))
    for i, j in enumerate(partners.tolist()):
        assert torch.allclose(found.x[i], share * batch.x[i] + (1 - share) * batch.x[j])
        label = torch.zeros(4)
        label[batch.y[i]] += share
        label[batch.y[j]] += 1 - share
        assert torch.allclose(found.y[i], label, atol=1e-6)
    assert torch.equal(found.ids, batch.ids) and float(found.x.max()) <= 1
    other = mixed(make_batch(16, DOUBLE, step=1), 0.7, 4, Ranks())
    assert not torch.allclose(other.x, found.x)


def test_mixtures_do_not_depend_on_who_has_the_images() -> None:
    batch = make_batch(12)
    whole = mixed(batch, 1.0, 4, Ranks())
    order = torch.tensor([5, 3, 8, 0, 11, 2, 1, 4, 6, 10, 9, 7])
    halves = [
        TrainBatch(batch.x[rows], batch.y[rows], batch.ids[rows], 0, 0, 5)
        for rows in order.chunk(2)
    ]
    for rank, rows in enumerate(order.chunk(2)):
        part = mixed(halves[rank], 1.0, 4, Parts(rank, halves))
        assert torch.equal(part.x, whole.x[rows]) and torch.equal(part.y, whole.y[rows])


def test_shares_follow_the_beta_distribution_and_pairs_are_even() -> None:
    batches = [make_batch(4, step=step) for step in range(1000)]
    for alpha in (1.0, 0.3):
        shares = torch.tensor([share_of(batch, alpha) for batch in batches])
        assert float(shares.mean()) == pytest.approx(0.5, abs=0.03)
        assert float(shares.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)
    counts = torch.zeros(4, 4)
    for batch in batches:
        counts[torch.arange(4), partners_of(batch.ids, batch.seed("mixup"))] += 1
    assert float(counts.diag().sum()) == 0
    others = counts[~torch.eye(4, dtype=torch.bool)]
    assert float((others - 1000 / 3).abs().max()) < 70  # of which 15 is a standard deviation


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_attack_and_loss_equal_the_plain_version(smoothing: float) -> None:
    model = make_model(0, DOUBLE)
    method: Any = make_method("pgd_at", model, mixup=1.0, label_smoothing=smoothing)
    batch = mixed(make_batch(dtype=DOUBLE), 1.0, 4, Ranks())
    slow, labels = copy.deepcopy(model).eval(), batch.y.double()
    point = random_start(batch.x, 0.1, seed=batch.seed("attack"), sample_ids=batch.ids)
    for _ in range(3):
        leaf = point.clone().requires_grad_()
        value = -(labels * p_of(slow(leaf)).log()).sum()
        (gradient,) = torch.autograd.grad(value, leaf)
        point = point + 0.05 * gradient.sign()
        point = torch.minimum(torch.maximum(point, batch.x - 0.1), batch.x + 0.1).clamp(0, 1)
    method.train_mode()
    adv = method.attack(batch)
    assert torch.allclose(adv.x, point, rtol=0, atol=1e-9)
    slow.train()
    target = (1 - smoothing) * labels + smoothing / 4
    expected = -(target * p_of(slow(adv.x)).log()).sum(1).mean()
    loss = method.training_loss(batch, adv).loss
    loss.backward()
    expected.backward()
    assert torch.allclose(loss, expected, rtol=1e-9)
    for ours, plain in zip(model.parameters(), slow.parameters(), strict=True):
        assert torch.allclose(ours.grad, plain.grad, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("method", ["standard", "arrest", "free", "fat", "fast"])
def test_a_run_with_mixup_is_resumed_bit_for_bit(method: str, tmp_path: Path) -> None:
    changes = {"mixup": 1.0}
    run(method, tmp_path / "whole", changes=dict(changes))
    with pytest.raises(Interruption):
        run(method, tmp_path / "cut", 5, changes=dict(changes))
    run(method, tmp_path / "cut", resume=True, changes=dict(changes))
    assert_same_end(tmp_path / "whole", tmp_path / "cut")


def test_training_with_mixup_learns(tmp_path: Path) -> None:
    recipe = small_recipe("standard", mixup=0.4, epochs=6)
    found = train(
        "standard",
        recipe,
        data=small_data(),
        model=make_model(),
        run_dir=tmp_path / "run",
        progress=False,
    )
    assert found.record["clean_accuracy"] > 0.9


def test_what_cannot_be_mixed_is_refused() -> None:
    for name in ("trades", "mart", "alp"):
        with pytest.raises(ValueError, match=f"mixup must be 0 for {name}, whose loss takes no"):
            make_method(name, make_model(), mixup=1.0)
    with pytest.raises(ValueError, match="extra_weight must be 1 with mixup, got 2"):
        Recipe(mixup=1.0, extra_weight=2.0)
    with pytest.raises(ValueError, match=r"mixup must be >= 0, got -1\.0"):
        Recipe(mixup=-1.0)


@pytest.mark.parametrize("name", ["tla", "las_at", "sat", "dm_at", "trades", "s2o"])
def test_methods_that_take_no_soft_labels_refuse_mixup(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"mixup must be 0 for {name}, whose loss takes no soft labels"
    ):
        make_method(name, make_model(0), mixup=1.0)


@pytest.mark.parametrize("name", ["las_at", "n_fgsm", "zero_grad"])
def test_methods_of_one_norm_refuse_the_other(name: str) -> None:
    with pytest.raises(ValueError, match="norm must be 'linf' for this method, got 'l2'"):
        find_method(name).recipe_class(norm="l2")
