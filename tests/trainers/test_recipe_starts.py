"""What a recipe begins with where one of its fields decides: VFD-Adv's base, and LBGAT's fixed guide."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_helpers import train_quickly

from fastadv.cli import main
from fastadv.trainers import (
    LbgatRecipe,
    Recipe,
    TradesRecipe,
    VfdRecipe,
    find_method,
)
from fastadv.trainers.plain_recipe import as_plain

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
BASES = ["trades", "mart", "alp", "hat"]
# What two methods must have in common to be compared.
COMPARED = (
    "epochs",
    "batch_size",
    "lr",
    "schedule",
    "momentum",
    "nesterov",
    "weight_decay",
    "pad_mode",
    "eps",
    "alpha",
    "steps",
    "start_std",
)


def compared(recipe: Recipe) -> dict[str, Any]:
    return {name: getattr(recipe, name) for name in COMPARED}


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """The options of `fastadv train` as --print-config resolves them."""
    with pytest.raises(SystemExit) as exit_:
        main(["train", *words, "--print-config"])
    assert exit_.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("base", BASES)
def test_vfd_begins_with_the_recipe_of_its_base(base: str) -> None:
    alone = find_method(base).recipe_class()
    for recipe in (VfdRecipe(base=base), VfdRecipe.preset("paper", base=base)):  # type: ignore[arg-type]
        assert compared(recipe) == compared(alone)
        assert recipe.base == base and recipe.lam == 0.02
    assert VfdRecipe() == VfdRecipe(base="trades")


def test_the_bases_numbers_are_those_of_their_papers() -> None:
    mart, hat, alp = (VfdRecipe(base=base) for base in ("mart", "hat", "alp"))  # type: ignore[arg-type]
    assert (mart.epochs, mart.lr, mart.weight_decay, mart.eps) == (120, 0.01, 3.5e-3, 0.031)
    assert (hat.epochs, hat.lr, hat.weight_decay, hat.eps) == (50, 0.21, 5e-4, 8 / 255)
    assert (alp.epochs, alp.lr, alp.weight_decay, alp.eps) == (100, 0.1, 5e-4, 0.031)
    assert VfdRecipe().epochs == 76
    weights = {base: VfdRecipe(base=base) for base in BASES}  # type: ignore[arg-type]
    assert {base: r.base_weight for base, r in weights.items()} == {
        "trades": 6.0,
        "mart": 1.0,
        "alp": 1.0,
        "hat": 2.5,
    }
    assert {b: r.inner_weight for b, r in weights.items()} == {
        "trades": 0.0,
        "mart": 5.0,
        "alp": 0.5,
        "hat": 0.0,
    }


def test_what_is_given_wins_over_the_base() -> None:
    recipe = VfdRecipe(base="mart", epochs=7, eps=0.1, beta=2.0, weight=3.0)
    assert (recipe.epochs, recipe.eps, recipe.base_weight, recipe.inner_weight) == (7, 0.1, 2, 3)
    assert recipe.lr == 0.01
    changed = dataclasses.replace(recipe, lr=0.2, weight=None)
    assert (changed.epochs, changed.lr, changed.base_weight) == (7, 0.2, 2.0)
    assert (changed.base, changed.eps, changed.inner_weight) == ("mart", 0.1, 5.0)


def test_replace_cannot_leave_the_numbers_of_another_base() -> None:
    recipe = VfdRecipe(lam=0.03)
    words = r"base must be chosen .* got 'mart' .* write VfdRecipe\(base='mart', ...\)"
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(recipe, base="mart")
    with pytest.raises(ValueError, match=r"fixed must be chosen .* write LbgatRecipe\(fixed=True"):
        dataclasses.replace(LbgatRecipe(), fixed=True)
    for kept in (recipe, LbgatRecipe(beta=6.0), VfdRecipe(base="mart", epochs=3)):
        for same in (
            dataclasses.replace(kept),
            copy.deepcopy(kept),
            pickle.loads(pickle.dumps(kept)),
        ):
            assert same == kept and as_plain(same) == as_plain(kept)
        assert "replaces" not in as_plain(kept) and "replaces" not in repr(kept)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"weight": 0.5}, "weight must be None with base 'trades'"),
        ({"base": "hat", "code_constants": True}, "code_constants must be False with base 'hat'"),
        ({"base": "mart", "weight": -1.0}, "inner_weight must be >= 0, got -1.0"),
        ({"base": "alp", "beta": -1.0}, "base_weight must be >= 0, got -1.0"),
        ({"base": "awp"}, "base must be one of alp, trades, mart, hat, got 'awp'"),
    ],
)
def test_numbers_that_a_base_does_not_have_are_refused(numbers: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        VfdRecipe(**numbers)


@pytest.mark.parametrize("base", BASES)
def test_the_command_line_begins_with_the_recipe_of_the_base(
    base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = printed(capsys, base)
    for words in (["--base", base], [f"--base={base}"], ["--config", f"{{base: {base}}}"]):
        begun = printed(capsys, "vfd", *words)
        assert {n: begun[n] for n in COMPARED} == {n: alone[n] for n in COMPARED}


def test_options_and_files_win_over_the_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "r.yaml"
    config.write_text("base: mart\nlr: 0.5\nepochs: 9\n")
    begun = printed(capsys, "vfd", "--config", str(config), "--epochs", "3")
    assert (begun["base"], begun["lr"], begun["epochs"]) == ("mart", 0.5, 3)
    assert begun["weight_decay"] == 3.5e-3
    # The last word counts, as with every option.
    other = printed(capsys, "vfd", "--config", str(config), "--base", "hat")
    assert (other["base"], other["lr"], other["nesterov"]) == ("hat", 0.5, True)
    part = printed(capsys, "vfd", "--base", "mart", "--schedule.gamma", "0.5")
    assert part["schedule"]["init_args"] == {"milestones": [74, 89, 99], "gamma": 0.5}
    same = printed(capsys, "vfd", "--base", "mart", "--preset", "paper")
    assert same == printed(capsys, "vfd", "--base", "mart")


def test_help_shows_the_numbers_of_the_base(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "vfd", "--base", "mart", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "passes over the training images. (a whole number; default: 120)" in text


def test_an_unknown_base_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["train", "vfd", "--base", "awp", "--data", "digits", "--run", "x"])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "awp" in line


def test_a_run_records_what_the_base_gave(tmp_path: Path) -> None:
    teacher, run, again = tmp_path / "standard", tmp_path / "vfd", tmp_path / "again"
    assert train_quickly("standard", teacher, "--quiet") == 0
    options = ["--base", "mart", "--teacher", str(teacher), "--quiet"]
    assert train_quickly("vfd", run, *options) == 0
    recipe = json.loads((run / "run.json").read_text())["recipe"]
    assert (recipe["base"], recipe["weight_decay"], recipe["epochs"]) == ("mart", 3.5e-3, 1)
    words = ["--config", str(run / "config.yaml"), "--teacher", str(teacher), "--run", str(again)]
    assert main(["train", "vfd", *words]) == 0
    assert json.loads((again / "run.json").read_text())["recipe"] == recipe


def test_bgat_begins_with_the_recipe_of_trades(capsys: pytest.CaptureFixture[str]) -> None:
    for preset in ("paper", "official"):
        alone = TradesRecipe.preset(preset)
        assert compared(LbgatRecipe.preset(preset, fixed=True)) == compared(alone)
    assert compared(LbgatRecipe(fixed=True)) == compared(TradesRecipe())
    assert LbgatRecipe(fixed=True).beta == 0 and LbgatRecipe().epochs == 100
    alone = printed(capsys, "trades")
    for words in (
        ["--fixed", "true"],
        ["--fixed=True"],
        ["--config", "{fixed: true}"],
        ["--fixed"],
        ["--fixed", "1"],
    ):
        begun = printed(capsys, "lbgat", *words, "--preset", "official")
        assert {n: begun[n] for n in COMPARED} == {n: alone[n] for n in COMPARED}
        assert begun["natural"] is None
    assert printed(capsys, "lbgat", "--fixed", "false")["epochs"] == 100


def test_a_subclass_may_begin_with_numbers_of_its_own() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(VfdRecipe):
        lam: float = 0.04

    recipe = Mine.preset("paper", base="mart")
    assert (recipe.weight_decay, recipe.lam) == (3.5e-3, 0.04)
