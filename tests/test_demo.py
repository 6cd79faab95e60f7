"""The demo, shortened: it ends with a table, a plot and checkpoints."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from fastadv import demo
from fastadv.commands import run_evaluation
from fastadv.trainers import AdversarialRecipe, Recipe, load_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def test_recipes_change_only_what_small_images_need() -> None:
    recipes = demo.demo_recipes()
    assert list(recipes) == ["standard", "pgd_at", "arrest"]
    for recipe in recipes.values():
        assert not recipe.flip and recipe.pad == 1
    attacked = [r for r in recipes.values() if isinstance(r, AdversarialRecipe)]
    assert {(r.eps, r.alpha, r.steps) for r in attacked} == {(0.1, 0.025, 10)}


def test_the_demo_runs_and_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short() -> dict[str, Recipe]:
        few = {"epochs": 1, "train_images": 200, "monitor_images": 50}
        return {name: replace(r, **few) for name, r in full.items()}

    full = demo.demo_recipes()
    monkeypatch.setattr(demo, "demo_recipes", short)
    monkeypatch.setattr(demo, "_IMAGES", 6)
    quick = partial(run_evaluation, attacks=("clean", "pgd-2"))  # AutoAttack takes its time
    monkeypatch.setattr(demo, "run_evaluation", quick)
    for matplotlib in (False, True):
        with monkeypatch.context() as patch:
            if not matplotlib:
                loaded = [name for name in sys.modules if name.startswith("matplotlib.")]
                for name in ("matplotlib", *loaded):
                    patch.setitem(sys.modules, name, None)
            text = demo.run_demo(str(tmp_path), quiet=True)
        for name in full:
            assert f"\n{name} " in text
            load_model(tmp_path / name)
        assert (tmp_path / "trade_off.png").is_file() == matplotlib
        assert ("There is no report and no plot: plots need matplotlib" in text) != matplotlib
        assert re.search("clean % +pgd-2 %", text)
