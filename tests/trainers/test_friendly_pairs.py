"""FAT for TRADES and for MART: the attack against algorithm 1 for one image at a time, tau, and the presets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_baselines import learned_model
from test_pair_methods import kl
from torch import Tensor
from training_helpers import CPU, make_batch, make_method, small_data, small_recipe

from fastadv.trainers import (
    MartRecipe,
    MultiStep,
    Runtime,
    TradesRecipe,
    TrainBatch,
    VfdRecipe,
    find_method,
    train,
)
from fastadv.trainers.phases import PhaseTimer
from fastadv.trainers.unused import check_all_used

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
ATTACK: dict[str, Any] = {"eps": 0.2, "alpha": 0.05, "steps": 6, "friendly": True}


def slow_attack(model: Any, start: Tensor, x: Tensor, y: int, loss: str, tau: int) -> Any:
    """The early-stopped PGD of FAT's code for one image; returns it and how many steps it took."""
    clean, adv, taken = model(x[None]).detach(), start, 0
    for _ in range(6):
        leaf = adv[None].clone().requires_grad_()
        logits = model(leaf)
        wrong = int(logits.argmax()) != y
        if wrong and tau == 0:
            break
        tau -= wrong
        value = kl(clean, logits).sum() if loss == "kl" else -logits.log_softmax(1)[0, y]
        (gradient,) = torch.autograd.grad(value, leaf)
        adv = torch.minimum(torch.maximum(adv + 0.05 * gradient[0].sign(), x - 0.2), x + 0.2)
        adv, taken = adv.clamp(0, 1), taken + 1
    return adv, taken


@pytest.mark.parametrize("tau", [0, 2])
@pytest.mark.parametrize(("name", "loss"), [("trades", "kl"), ("mart", "ce")])
def test_a_friendly_attack_equals_a_plain_loop(name: str, loss: str, tau: int) -> None:
    model, data = learned_model(), small_data().train
    recipe: Any = small_recipe(name, **ATTACK, tau=tau, start_std=0.01)
    method: Any = find_method(name)(recipe, model, Runtime(CPU, None, PhaseTimer(CPU)))
    x, y = data.images[:30].double() / 255, data.labels[:30]
    batch = TrainBatch(x, y, torch.arange(30), 0, 0, run_seed=5)
    adv, starts = method.attack(batch).x, method.start_of(batch)
    counts = set()
    for row in range(len(x)):
        slow, taken = slow_attack(model, starts[row], x[row], int(y[row]), loss, tau)
        assert torch.allclose(adv[row], slow, rtol=0, atol=1e-12), row
        counts.add(taken)
    assert min(counts) == tau and len(counts) >= 3, counts
    plain: Any = make_method(name, model, **{**ATTACK, "friendly": False}, start_std=0.01)
    assert float((plain.attack(batch).x - adv).abs().max()) > 0.04


@pytest.mark.parametrize(
    ("name", "friendly", "first"),
    [("mart", True, "x'"), ("mart", False, "x"), ("trades", True, "x"), ("trades", False, "x")],
)
def test_batch_norm_sees_images_in_the_order_of_the_scripts(
    name: str, friendly: bool, first: str
) -> None:
    """FAT's script for MART passes the adversarial images first, MART's own script the clean ones."""
    method: Any = make_method(name, learned_model().float(), friendly=friendly)
    batch, seen = make_batch(), []
    attacked = method.attack(batch)
    method.model.register_forward_hook(
        lambda model, args, out: seen.append("x" if torch.equal(args[0], batch.x) else "x'")
    )
    method.training_loss(batch, attacked)
    assert seen == [first, "x" if first == "x'" else "x'"]


def test_tau_grows_with_the_epochs() -> None:
    trades, mart = TradesRecipe.preset("fat"), MartRecipe.preset("fat")
    # The scripts count epochs from 1: `epoch <= 30` is tau 0, and so on.
    assert [trades.tau_at(e - 1) for e in (1, 30, 31, 50, 51, 70, 71, 85)] == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
    ]
    assert [mart.tau_at(e - 1) for e in (20, 21, 40, 41, 60, 61, 80, 81)] == [
        0,
        1,
        1,
        2,
        2,
        3,
        3,
        4,
    ]
    method: Any = make_method("mart", learned_model().float(), friendly=True, tau_epochs=(1, 2))
    for epoch in range(3):
        method.attack(make_batch(epoch=epoch))
        assert method.pgd.tau == epoch


def test_the_presets_have_the_numbers_of_fats_scripts() -> None:
    trades, mart = TradesRecipe.preset("fat"), MartRecipe.preset("fat")
    for recipe, numbers in ((trades, (85, 0.1, 2e-4, 6.0)), (mart, (90, 0.1, 2e-4, 6.0))):
        assert (recipe.epochs, recipe.lr, recipe.weight_decay, recipe.beta) == numbers
        assert (recipe.eps, recipe.alpha, recipe.steps, recipe.tau) == (0.031, 0.007, 10, 0)
        assert recipe.friendly and recipe.start_std == 1e-3
    assert [trades.lr_at(e - 1) for e in (74, 75, 85)] == pytest.approx([0.1, 0.01, 0.01])
    assert [mart.lr_at(e - 1) for e in (59, 60, 89, 90)] == pytest.approx([0.1, 0.01, 0.01, 0.001])
    assert mart.code_constants and not TradesRecipe().friendly
    assert TradesRecipe.preset("fat", epochs=17).schedule == MultiStep((14.8,), 0.1)
    assert VfdRecipe(base="trades").epochs == TradesRecipe().epochs


def test_what_has_no_effect_is_refused(tmp_path: Any) -> None:
    for numbers in ({"tau": 1}, {"tau_epochs": (3,)}):
        with pytest.raises(ValueError, match=f"{next(iter(numbers))} has no effect with friendly"):
            check_all_used(find_method("trades"), TradesRecipe(**numbers))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tau_epochs must be ascending"):
        MartRecipe(tau_epochs=(5, 2))
    with pytest.raises(ValueError, match="tau must be >= 0, got -1"):
        TradesRecipe(tau=-1)
    recipe = small_recipe("trades", friendly=True, tau=1, norm="l2", epochs=1)
    done = train(
        "trades", recipe, data=small_data(), model="small_cnn", run_dir=tmp_path, progress=False
    )
    assert 0 <= done.record["robust_accuracy"] <= 1
