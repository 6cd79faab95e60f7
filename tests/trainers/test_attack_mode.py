"""Attacks on a model in training mode, with running statistics that come back or that move."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import Interruption, assert_same_end, run
from test_l2_training import make
from test_methods import take_step
from test_pair_methods import ce, kl
from torch import Tensor
from training_helpers import (
    copied_state,
    make_batch,
    make_model,
    small_data,
    small_recipe,
    states_equal,
)

import fastadv
from fastadv.attacks import APGD, FGSM, PGD
from fastadv.models import create_model
from fastadv.ops import random_start
from fastadv.trainers import AdversarialRecipe, AfsRecipe, train
from fastadv.trainers.fast import FastRecipe
from fastadv.trainers.unused import check_all_used

pytestmark = pytest.mark.usefixtures("one_thread")
DOUBLE = torch.float64
LINF: dict[str, Any] = {"norm": "linf", "eps": 0.1, "alpha": 0.04}


def slow_pgd(model: Any, x: Tensor, start: Tensor, value: Any, steps: int) -> Tensor:
    """The loop of robust_overfitting, which attacks the model as it is: here in training mode."""
    point = start
    for _ in range(steps):
        leaf = point.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(model(leaf)).sum(), leaf)
        point = point + 0.04 * gradient.sign()
        point = torch.minimum(torch.maximum(point, x - 0.1), x + 0.1).clamp(0, 1)
    return point


@pytest.mark.parametrize("mode", ["train", "moving"])
@pytest.mark.parametrize("name", ["pgd_at", "trades"])
def test_a_method_attacks_as_a_plain_loop_in_training_mode(name: str, mode: str) -> None:
    method = make(name, DOUBLE, attack_mode=mode, **LINF)
    method.train_mode()
    slow, batch = copy.deepcopy(method.model).train(), make_batch(dtype=DOUBLE)
    before = copied_state(method.model)
    if name == "trades":
        start, clean = method.start_of(batch), slow(batch.x).detach()
        adv = slow_pgd(slow, batch.x, start, lambda z: kl(clean, z), 3)
    else:
        start = random_start(batch.x, 0.1, seed=batch.seed("attack"), sample_ids=batch.ids)
        adv = slow_pgd(slow, batch.x, start, lambda z: ce(z, batch.y), 3)
    assert torch.allclose(method.attack(batch).x, adv, rtol=0, atol=1e-12)
    after, moved = method.model.state_dict(), slow.state_dict()
    if mode == "train":
        assert states_equal(dict(after), before)
    else:
        for entry, value in moved.items():
            assert torch.allclose(after[entry], value, rtol=1e-12, atol=1e-14), entry
        assert int(after["bn1.num_batches_tracked"]) == 6 + (name == "trades")
    assert method.model.training and all(p.requires_grad for p in method.model.parameters())
    evaluated = make(name, DOUBLE, **LINF).attack(batch).x
    assert float((evaluated - adv).abs().max()) > 0.01


@pytest.mark.parametrize("name", ["pgd_at", "mart", "hat", "kd_at", "fat", "act"])
def test_running_statistics_move_as_often_as_stated(name: str) -> None:
    method = make(name, attack_mode="moving", **LINF)
    before = int(method.model.bn1.num_batches_tracked)
    take_step(method, make_batch())
    moved = int(method.model.bn1.num_batches_tracked) - before
    assert moved == method.bn_updates == type(method).bn_updates + 3 + (name == "hat")


# As in the scripts: the model stays in training mode, and in two of them statistics stand still or move anyway.
OFFICIAL = {
    "fast": "moving",
    "kd_at": "moving",
    "n_fgsm": "moving",
    "zero_grad": "moving",
    "grad_align": "train",
    "dm_at": "train",
}


def test_official_presets_attack_in_the_mode_of_the_authors_scripts() -> None:
    for name in fastadv.trainers.method_names():
        kind = fastadv.trainers.find_method(name).recipe_class
        if "official" in kind.presets and hasattr(kind, "attack_mode"):
            assert kind.preset("official").attack_mode == OFFICIAL.get(name, "eval"), name
            assert kind().attack_mode == "eval", name
    kd_at = fastadv.trainers.find_method("kd_at").recipe_class
    assert kd_at.preset("official", base="trades").attack_mode == "eval"  # the base's own


def test_attacks_outside_training_take_the_mode_too() -> None:
    x, y = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1])
    for attack, passes in (
        (FGSM(make_model(), 0.1, train_mode="moving"), 1),
        (PGD(make_model(), 0.1, 0.05, 4, train_mode="moving"), 4),
        (PGD(make_model(), 0.1, 0.05, 4, train_mode="moving", keep="best"), 5),
        (PGD(make_model(), 0.1, 0.05, 4, train_mode=True), 0),
        (APGD(make_model(), 0.1, 3, train_mode=True), 0),
    ):
        model: Any = attack.model
        before = int(model.bn1.num_batches_tracked)
        attack(x, y, seed=1)
        assert int(model.bn1.num_batches_tracked) - before == passes
    model = make_model()
    fastadv.pgd_fused(model, x, y, steps=2, train_mode="moving", seed=0)
    assert int(model.bn1.num_batches_tracked) == 3 + 2  # type: ignore[arg-type]
    with pytest.raises((TypeError, ValueError), match=r"train_mode must be .*moving"):
        PGD(model, train_mode="moved")  # type: ignore[arg-type]


def test_a_run_with_moving_statistics_is_announced_and_resumed_bit_for_bit(tmp_path: Path) -> None:
    changes = {"attack_mode": "moving"}
    run("pgd_at", tmp_path / "whole", changes=dict(changes), progress=True)
    with pytest.raises(Interruption):
        run("pgd_at", tmp_path / "cut", 5, changes=dict(changes))
    run("pgd_at", tmp_path / "cut", resume=True, changes=dict(changes))
    assert_same_end(tmp_path / "whole", tmp_path / "cut")  # whose announcement ran the attack


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="attack_mode must be 'eval' with sync_bn"):
        AdversarialRecipe(attack_mode="train", sync_bn=True)
    with pytest.raises(ValueError, match="attack_mode has no effect with free"):
        check_all_used(
            fastadv.trainers.find_method("free"), small_recipe("free", attack_mode="moving")
        )
    assert FastRecipe.preset("official").attack_mode == "moving"
    assert FastRecipe().attack_mode == "eval"


def test_afs_whose_extractors_do_not_move_refuses_it(tmp_path: Path) -> None:
    recipe: Any = small_recipe("afs", attack_mode="moving")
    assert isinstance(recipe, AfsRecipe)
    with pytest.raises(ValueError, match="attack_mode must be 'eval' for afs, which trains no"):
        train(
            "afs",
            recipe,
            data=small_data(),
            model=create_model("stack:2*small_cnn", 4, 1),
            teacher=[make_model(1), make_model(2)],
            run_dir=tmp_path / "run",
            progress=False,
        )
