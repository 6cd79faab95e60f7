"""AdamW: its formula, its numbers, and runs that go on bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import Interruption, run
from test_recipe_starts import printed
from torch import nn
from training_helpers import make_model, small_data, small_recipe, states_equal

from fastadv.trainers import Cyclic, HatRecipe, Recipe, TradesRecipe, VfdRecipe, train
from fastadv.trainers.checkpoint import find_checkpoint, load_checkpoint
from fastadv.trainers.optim import build_optimizer, load_optimizer_state, set_place

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("channels_last", [False, True])
def test_adamw_equals_its_formula(channels_last: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    recipe = Recipe(optimizer="adamw", lr=0.03, weight_decay=0.1, betas=(0.8, 0.95), epochs=4)
    optimizer = build_optimizer(model, recipe)
    assert all(group["fused"] for group in optimizer.param_groups)
    expected = [p.detach().clone() for p in model.parameters()]
    first, second = ([torch.zeros_like(p) for p in expected] for _ in range(2))
    for t in range(1, 5):
        set_place(optimizer, recipe, t - 1)
        rate = recipe.lr_at(t - 1)
        x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
        loss = model(x).square().mean() + sum(p.square().sum() for p in model.parameters())
        optimizer.zero_grad()
        loss.backward()
        for i, parameter in enumerate(model.parameters()):
            g = parameter.grad
            assert g is not None
            expected[i] = expected[i] * (1 - rate * 0.1)
            first[i] = 0.8 * first[i] + 0.2 * g
            second[i] = 0.95 * second[i] + 0.05 * g * g
            mean, square = first[i] / (1 - 0.8**t), second[i] / (1 - 0.95**t)
            expected[i] = expected[i] - rate * mean / (square.sqrt() + 1e-8)
        optimizer.step()
        # A saved state, here in another memory layout, goes on the same way.
        state = copy.deepcopy(optimizer.state_dict())
        for entry in state["state"].values():
            for name in ("exp_avg", "exp_avg_sq"):
                entry[name] = entry[name].contiguous()
        optimizer = build_optimizer(model, recipe)
        load_optimizer_state(optimizer, state)
    for parameter, value in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(parameter, value, rtol=1e-10, atol=1e-12)


def test_adamw_begins_with_numbers_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    for recipe in (
        Recipe(optimizer="adamw"),
        TradesRecipe.preset("official", optimizer="adamw"),
        VfdRecipe(base="mart", optimizer="adamw"),
    ):
        assert (recipe.lr, recipe.weight_decay, recipe.betas) == (1e-3, 1e-2, (0.9, 0.999))
    given = HatRecipe(optimizer="adamw", lr=0.01, betas=(0.9, 0.9), norm="l2")
    assert (given.lr, given.weight_decay, given.betas) == (0.01, 1e-2, (0.9, 0.9))
    assert given.eps == 128 / 255
    words = ["pgd_at", "--data", "digits", "--run", "x", "--optimizer", "adamw"]
    options = printed(capsys, *words, "--betas", "[0.8, 0.99]")
    assert (options["lr"], options["weight_decay"]) == (1e-3, 1e-2)
    assert options["betas"] == [0.8, 0.99]


def test_a_schedule_that_cycles_the_momentum_cycles_the_first_beta() -> None:
    schedule = Cyclic(0.5, base_momentum=0.8, max_momentum=0.9)
    recipe = Recipe(optimizer="adamw", epochs=4, schedule=schedule)
    optimizer = build_optimizer(nn.Linear(2, 2), recipe)
    seen = []
    for epoch in (0, 1, 2, 4):
        set_place(optimizer, recipe, epoch)
        seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]))
    rates, betas = zip(*seen, strict=True)
    assert rates == pytest.approx((0, 5e-4, 1e-3, 0))
    assert [b[0] for b in betas] == pytest.approx([0.9, 0.85, 0.8, 0.9])
    assert {b[1] for b in betas} == {0.999}


@pytest.mark.parametrize("method", ["pgd_at", "act"])
def test_a_run_with_adamw_is_resumed_bit_for_bit(method: str, tmp_path: Path) -> None:
    changes = {"optimizer": "adamw", "ema_decay": None}
    run(method, tmp_path / "whole", changes=dict(changes))
    with pytest.raises(Interruption):
        run(method, tmp_path / "cut", 5, changes=dict(changes))
    run(method, tmp_path / "cut", resume=True, changes=dict(changes))
    a, b = (load_checkpoint(find_checkpoint(tmp_path / name)) for name in ("whole", "cut"))
    assert states_equal(a.weights, b.weights)
    for name, state in a.train_state["optimizers"].items():
        other = b.train_state["optimizers"][name]["state"]
        assert state["state"].keys() == other.keys() != set()
        for index, entry in state["state"].items():
            assert entry.keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert states_equal(entry, other[index])


def test_training_with_adamw_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe: Any = small_recipe("standard", optimizer="adamw", lr=0.01, epochs=3)
    found = train(
        "standard",
        recipe,
        data=small_data(),
        model=make_model(),
        run_dir=tmp_path / "run",
        device="cpu",
    )
    assert found.record["clean_accuracy"] > 0.9
    line = "optimizer: AdamW, learning rate 0.01, betas 0.9 and 0.999, weight decay 0.01"
    assert line in capsys.readouterr().err


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"betas": (0.5, 0.9)}, "betas has no effect with optimizer sgd"),
        ({"optimizer": "adamw", "momentum": 0.5}, "momentum has no effect with optimizer adamw"),
        ({"optimizer": "adamw", "nesterov": True}, "nesterov has no effect with optimizer adamw"),
    ],
)
def test_numbers_of_the_other_optimizer_are_refused(
    numbers: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        train(
            "standard",
            small_recipe("standard", **numbers),
            data=small_data(),
            model=make_model(),
            run_dir=tmp_path / "run",
        )


def test_numbers_out_of_range_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"
    ):
        Recipe(optimizer="adamw", betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="optimizer must be one of sgd, adamw, got 'adam'"):
        Recipe(optimizer="adam")  # type: ignore[arg-type]
