"""Presets of recipes: their numbers, what wins over them, and what a run records."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_helpers import train_quickly

from fastadv.cli import main
from fastadv.trainers import ActRecipe, MultiStep, find_method, method_names

pytestmark = pytest.mark.usefixtures("one_thread")


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """The options of `fastadv train act` as --print-config resolves them."""
    with pytest.raises(SystemExit) as exit_:
        main(["train", "act", *words, "--print-config"])
    assert exit_.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("name", method_names())
def test_presets_change_fields_of_their_recipe(name: str) -> None:
    kind = find_method(name).recipe_class
    names = {field.name for field in dataclasses.fields(kind)}
    assert "presets" not in names
    assert kind.preset("paper") == kind()
    for preset, numbers in kind.presets.items():
        assert set(numbers) <= names
        assert kind.preset(preset) == dataclasses.replace(kind(), **numbers)


def test_acts_official_preset_has_the_numbers_of_its_authors_code() -> None:
    recipe = ActRecipe.preset("official")
    assert (recipe.temperature, recipe.attack_divergence) == (4.0, "sum")
    assert recipe.schedule == MultiStep((59, 119, 159), 0.2)
    same = {"temperature": 1.0, "attack_divergence": "mean", "schedule": ActRecipe().schedule}
    assert dataclasses.replace(recipe, **same) == ActRecipe()


@pytest.mark.parametrize("name", ["trades", "hat", "fat", "s2o", "las_at", "sat"])
def test_defaults_that_are_the_authors_code_are_its_preset(name: str) -> None:
    kind = find_method(name).recipe_class
    assert kind.preset("official") == kind()


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("mart", {"code_constants": True}),
        ("lbgat", {"natural": "resnet18_layer2_stride1"}),
        ("free", {"pad": 2, "norm_decay": False}),
        ("tla", {"pad": 2, "norm_decay": False}),
        ("zero_grad", {"pad_mode": "reflect", "attack_mode": "moving"}),
    ],
)
def test_parts_of_the_authors_code_are_official_alone(name: str, numbers: dict[str, Any]) -> None:
    kind = find_method(name).recipe_class
    assert kind.preset("official") == dataclasses.replace(kind(), **numbers) != kind()


def test_changes_win_over_the_preset() -> None:
    recipe = ActRecipe.preset("official", temperature=2.0, weight=0.5)
    assert (recipe.temperature, recipe.weight, recipe.attack_divergence) == (2.0, 0.5, "sum")
    with pytest.raises(ValueError, match="weight must lie in"):
        ActRecipe.preset("official", weight=2.0)


@pytest.mark.parametrize("name", ["standard", "pgd_at", "arrest", "alp", "vfd"])
def test_no_official_numbers_without_published_code(name: str) -> None:
    with pytest.raises(ValueError, match="must be one of paper, got 'official'; it follows no"):
        find_method(name).recipe_class.preset("official")


def test_unknown_presets_are_named() -> None:
    with pytest.raises(
        ValueError, match="ActRecipe must be one of paper, official, imagenet, got 'code'"
    ):
        ActRecipe.preset("code")


def test_options_win_over_configs_and_configs_over_presets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "r.yaml"
    config.write_text("temperature: 3\nweight: 0.5\n")
    official = printed(capsys, "--preset", "official")
    assert (official["temperature"], official["attack_divergence"]) == (4.0, "sum")
    assert official["schedule"]["init_args"]["milestones"] == [59, 119, 159]

    for words in (["--preset", "official"], ["--preset=official"]):
        mixed = printed(capsys, "--config", str(config), *words, "--weight", "0.7")
        assert (mixed["temperature"], mixed["weight"]) == (3.0, 0.7)
        assert mixed["attack_divergence"] == "sum"
        # The place of the preset in the command line does not matter.
        assert printed(capsys, "--temperature", "2", *words)["temperature"] == 2.0
    part = printed(capsys, "--preset", "official", "--schedule.gamma", "0.5")
    assert part["schedule"]["init_args"] == {"milestones": [59, 119, 159], "gamma": 0.5}


def test_a_config_may_name_a_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "r.yaml"
    config.write_text("preset: official\nweight: 0.5\n")
    named = printed(capsys, "--config", str(config))
    assert (named["temperature"], named["weight"]) == (4.0, 0.5)
    assert printed(capsys, "--config", "{preset: official, weight: 0.5}") == named
    paper = printed(capsys, "--config", str(config), "--preset", "paper")
    assert (paper["temperature"], paper["weight"]) == (1.0, 0.5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["act", "--preset", "code"], "must be one of paper, official, imagenet, got 'code'"),
        (["vfd", "--preset", "official"], "must be one of paper, got 'official'"),
    ],
)
def test_wrong_presets_are_one_line_on_the_command_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.slow
def test_a_run_records_the_numbers_and_not_the_preset(tmp_path: Path) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    assert train_quickly("act", run, "--preset", "official", "--weight", "0.7", "--quiet") == 0
    recipe = json.loads((run / "run.json").read_text())["recipe"]
    assert (recipe["temperature"], recipe["weight"]) == (4.0, 0.7)
    assert recipe["attack_divergence"] == "sum"
    milestones = [59 / 200, 119 / 200, 159 / 200]  # of 200 epochs, in a run of one
    assert recipe["schedule"]["milestones"] == milestones
    assert "preset" not in recipe
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["temperature"] == 4.0 and "preset" not in config

    assert main(["train", "act", "--config", str(run / "config.yaml"), "--run", str(again)]) == 0
    assert json.loads((again / "run.json").read_text())["recipe"] == recipe


def test_a_recipe_of_ones_own_has_its_parents_presets() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(ActRecipe):
        extra: int = 1

    assert Mine.preset("official", extra=2) == Mine(
        extra=2, temperature=4.0, attack_divergence="sum", schedule=MultiStep((59, 119, 159), 0.2)
    )
