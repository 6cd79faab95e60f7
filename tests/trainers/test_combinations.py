"""Options in combination: none is dropped in silence, and each has the effect that it has alone."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_l2_training import L2, make
from test_recipe_starts import printed
from training_helpers import make_batch, small_data, small_recipe, states_equal

from fastadv.attacks import uniform_radius_start
from fastadv.cli import main
from fastadv.models import create_model
from fastadv.trainers import (
    Constant,
    Cyclic,
    GradAlignRecipe,
    MultiStep,
    Piecewise,
    Recipe,
    Schedule,
    Step,
    find_method,
    train,
)
from fastadv.trainers.fast import FastRecipe
from fastadv.trainers.unused import check_all_used, warn_of_late_drop

pytestmark = pytest.mark.usefixtures("one_thread")
RADIUS = {"norm": "l2", "random_start": False, "l2_start": "radius"}


@pytest.mark.parametrize(
    ("method", "numbers", "message"),
    [
        ("mart", {"random_start": False, "start_std": 0.01}, "start_std .* random_start false"),
        ("free", {"engine": "compiled"}, "engine has no effect with free"),
        ("free", {"attack_precision": "bf16"}, "attack_precision has no effect with free"),
        (
            "pgd_at",
            {"epochs": 5, "awp_gamma": 0.01, "awp_warmup": 5},
            "awp_gamma has no effect with an awp_warmup that lasts all 5 epochs",
        ),
        ("fat", {"epochs": 5, "tau_epochs": (5, 7)}, "tau_epochs has no effect with 5 epochs"),
        ("sat", {"epochs": 30, "final_gap": 0.6}, "final_gap has no effect with 30 epochs"),
        ("arrest", {"replay_epochs": 0, "phi": 45.0}, "phi has no effect with replay_epochs 0"),
        ("arrest", {"phi": 90.0, "replay_with": "clean"}, "replay_with has no effect with phi 90"),
        ("arrest", {"replay": False, **RADIUS}, "l2_start has no effect with random_start false"),
        ("act", {"weight": 0.0, "temperature": 3.0}, "temperature has no effect with weight 0"),
        ("vfd", {"base": "mart", "beta": 0.0, "weight": 2.0}, "weight has no effect with beta 0"),
        ("afs", {"mix": "batch", "weight": 1.0, "eps_low": 0.01}, "eps_low .* attacks no image"),
        ("las_at", {"strategy_lr": 0.0, "clean_weight": 1.0}, "clean_weight .* strategy_lr 0"),
        ("s2o", {"weight": 0.0, "own": 0.3}, "own has no effect with weight 0"),
        ("sat", {"gap": 0.4, "gap_end": 90}, "gap_end has no effect with gap = final_gap"),
        (
            "kd_at",
            {"standard_weight": 0.0, "robust_weight": 0.0, "temperature": 4.0},
            "temperature has no effect with standard_weight 0 and robust_weight 0",
        ),
        (
            "kd_at",
            {"base": "trades", "label_weight": 0.0, "beta": 3.0},
            "beta has no effect with label_weight 0",
        ),
        ("pgd_at", {"weight_decay": 0.0, "norm_decay": False}, "norm_decay .* weight_decay 0"),
        (
            "pgd_at",
            {"extra_fraction": 1.0, "extra_weight": 0.5},
            "extra_weight has no effect with extra_fraction 1",
        ),
    ],
)
def test_what_another_number_leaves_without_effect_is_refused(
    method: str, numbers: dict[str, Any], message: str
) -> None:
    kind = find_method(method)
    with pytest.raises(ValueError, match=message):
        check_all_used(kind, kind.recipe_class(**numbers))


def test_the_scale_of_an_attack_with_one_term_has_no_effect() -> None:
    kind = find_method("act")
    recipe = kind.recipe_class(weight=1.0, attack_divergence="sum")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="attack_divergence has no effect with weight 1"):
        check_all_used(kind, recipe, "paper")


@pytest.mark.parametrize(
    ("method", "numbers"),
    [
        ("pgd_at", {"epochs": 6, "awp_gamma": 0.01, "awp_warmup": 5}),
        ("fat", {"epochs": 6, "tau_epochs": (5, 7)}),
        ("fat", {"epochs": 5}),
        ("sat", {"epochs": 31, "final_gap": 0.6}),
        ("mart", {"start_std": 0.01}),
        ("arrest", {"replay_epochs": 1, "phi": 45.0}),
        ("arrest", RADIUS),  # for the points that replace images
        ("act", {"weight": 1.0, "temperature": 3.0}),
        ("vfd", {"base": "mart", "beta": 0.1, "weight": 2.0}),
        ("kd_at", {"base": "hat", "label_weight": 0.0, "reach": 1.0}),
        ("pgd_at", {"epochs": 30}),
    ],
)
def test_what_has_an_effect_is_taken(method: str, numbers: dict[str, Any]) -> None:
    kind = find_method(method)
    check_all_used(kind, kind.recipe_class(**numbers))


def test_betas_are_left_to_a_schedule_that_cycles_the_first() -> None:
    with pytest.raises(ValueError, match=r"betas must begin with 0\.9 with a Cyclic schedule"):
        FastRecipe(optimizer="adamw", betas=(0.5, 0.99))
    assert FastRecipe(optimizer="adamw", betas=(0.9, 0.99)).betas == (0.9, 0.99)
    alone = Cyclic(0.5)
    assert FastRecipe(optimizer="adamw", betas=(0.5, 0.99), schedule=alone).betas[0] == 0.5


def test_one_step_of_grad_align_in_l2_reaches_the_edge_of_the_ball() -> None:
    recipe = GradAlignRecipe(norm="l2")
    assert (recipe.eps, recipe.alpha) == (128 / 255, 160 / 255)
    assert recipe.alpha * recipe.steps >= recipe.eps


@pytest.mark.parametrize("name", ["s2o", "kd_at"])
def test_bases_of_pgd_at_begin_in_l2_where_it_does(name: str) -> None:
    method, batch = make(name, l2_start="radius", base="pgd_at"), make_batch()
    check_all_used(type(method), method.recipe)
    wanted = make("pgd_at", l2_start="radius").attack(batch).x
    assert torch.equal(method.attack(batch).x, wanted)
    assert not torch.equal(make(name, base="pgd_at").attack(batch).x, wanted)


def test_afs_begins_inside_the_radius_that_it_draws() -> None:
    kind = find_method("afs")
    recipe = small_recipe("afs", **L2, l2_start="radius", eps_low=0.01)
    stack = create_model("stack:2*small_cnn", 4, 1)
    method: Any = kind(recipe, stack, make("pgd_at").runtime)
    for step in range(4):
        batch = make_batch(step=step)
        radius = method.radius_of(batch)
        assert radius < recipe.eps  # type: ignore[attr-defined]
        method.attack(batch)
        start = method.start_of(batch)
        seed = batch.seed("attack")
        wanted = uniform_radius_start(batch.x, radius, seed=seed, sample_ids=batch.ids)
        assert torch.equal(start, wanted)


def test_las_at_trains_its_strategy_also_where_epochs_are_shorter_than_its_turns(
    tmp_path: Path,
) -> None:
    seen: list[Any] = []
    kind = find_method("las_at")

    class Watched(kind):  # type: ignore[misc, valid-type]
        name = "watched"

        def step(self, batch: Any, update: Any) -> None:
            before = copy.deepcopy(self.strategy.state_dict())
            super().step(batch, update)
            seen.append(not states_equal(before, self.strategy.state_dict()))

    recipe = replace(small_recipe("las_at"), epochs=2, strategy_every=5, schedule=Constant())  # type: ignore[call-arg]
    train(Watched, recipe, data=small_data(), model="small_cnn", run_dir=tmp_path, progress=False)
    assert seen == [False] * 4 + [True] + [False] * 3


@pytest.mark.parametrize("epochs", ["40", "+40", "4_0", "0x28"])
def test_epochs_scale_the_schedule_however_they_are_written(
    epochs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = printed(capsys, "pgd_at", "--epochs", epochs)
    assert begun["epochs"] == 40
    assert begun["schedule"]["init_args"]["milestones"] == [30, 36]
    assert Recipe(epochs=40).schedule == Recipe().schedule.scaled(100, 40)


@pytest.mark.parametrize(("method", "argument"), [("las_at", "strategy"), ("act", "natural")])
def test_a_further_network_that_is_unknown_is_named(
    method: str, argument: str, tmp_path: Path
) -> None:
    recipe = small_recipe(method, **{argument: "nonsense"})
    with pytest.raises(ValueError, match=f"^{argument}: name must be one of .* got 'nonsense'"):
        train(method, recipe, data=small_data(), model="small_cnn", run_dir=tmp_path)


def test_a_sweep_trains_a_method_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "swept_module.py").write_text(
        "from fastadv.trainers.pgd_at import PGDAT\n\n\nclass Swept(PGDAT):\n    name = 'swept'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ["sweep", "swept_module:Swept", "--data", "digits", "--grid", "lr=.1,.2", "seeds=1"]
    assert main([*words, "--out", str(tmp_path / "sweep"), "--dry_run"]) == 0
    lines = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("fastadv train")
    ]
    assert len(lines) == 2
    assert all(line.startswith("fastadv train swept_module:Swept --") for line in lines)


@pytest.mark.parametrize(
    ("epochs", "schedule", "is_late"),
    [
        (30, MultiStep((30, 40)), True),
        (30, MultiStep((29, 40)), False),
        (30, Step(30), True),
        (9, Piecewise((0, 9), (1.0, 0.1)), True),
        (9, Piecewise((0, 9), (0.5, 0.1)), False),
        (9, Constant(), False),
    ],
)
def test_a_schedule_whose_first_drop_comes_too_late_is_named(
    epochs: int, schedule: Schedule, is_late: bool
) -> None:
    kind = find_method("pgd_at")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        warn_of_late_drop(kind.recipe_class(epochs=epochs, schedule=schedule))
    assert [f"learning rate within {epochs} epochs" in str(w.message) for w in told] == [
        True
    ] * is_late


def test_a_run_tells_of_a_late_drop_once(tmp_path: Path) -> None:
    words = (
        "train pgd_at --data digits --model small_cnn --epochs 1 --train_images 32 --batch_size 32"
    )
    words += " --monitor_images 8 --steps 1 --quiet --schedule MultiStep --schedule.milestones [5]"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert main([*words.split(), "--run", str(tmp_path)]) == 0
    assert len([w for w in told if "does not change the learning rate" in str(w.message)]) == 1
