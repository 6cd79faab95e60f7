"""The list of methods that bench/methods.py compares, and its table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fastadv.trainers import AdversarialRecipe, method_names

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import method_list
import methods


def test_every_method_is_compared() -> None:
    assert {entry.method for entry in method_list.ENTRIES} == set(method_names())
    labels = [entry.label for entry in method_list.ENTRIES]
    assert len(set(labels)) == len(labels)
    folders = {methods.run_dir(Path(), entry, 0) for entry in method_list.ENTRIES}
    assert len(folders) == len(labels)


@pytest.mark.parametrize("ground", method_list.GROUNDS.values(), ids=list(method_list.GROUNDS))
def test_recipes_fit_the_ground(ground: Any) -> None:
    for entry in method_list.ENTRIES:
        recipe = entry.recipe(ground, seed=7)
        assert recipe.seed == 7 and recipe.batch_size == 64
        assert recipe.epochs <= ground.epochs
        if isinstance(recipe, AdversarialRecipe) and not entry.label.startswith("."):
            assert recipe.eps == ground.eps


def test_what_a_method_builds_on_comes_first() -> None:
    order = [entry.label for entry in methods.chosen(["AFS"])]
    assert order[-1] == "AFS (3 extractors)"
    assert set(order[:-1]) == {"standard", "PGD-AT", ".3/8 of eps", ".5.5/8 of eps"}
    with pytest.raises(SystemExit, match="--only must be part of"):
        methods.chosen(["nothing"])


def test_the_table_has_means_and_deviations() -> None:
    results = [
        {
            "label": "ARREST",
            "clean": clean,
            "pgd-20": 50.0,
            "autoattack": robust,
            "cosine_to_standard": 0.9,
            "images_per_second": 100.0,
        }
        for clean, robust in ((90.0, 40.0), (92.0, 44.0))
    ]
    header, row = methods.rows_of(results)
    assert dict(zip(header, row, strict=True)) == {
        "method": "ARREST",
        "clean %": "91.0 ± 1.4",
        "PGD-20 %": "50.0 ± 0.0",
        "AutoAttack %": "42.0 ± 2.8",
        "clean + PGD-20": "141.0 ± 1.4",
        "cosine": "0.900 ± 0.000",
        "images/s": "100",
    }


@pytest.mark.parametrize(
    ("alone", "distilled"),
    [*((base, f"VFD-{base}") for base in ("TRADES", "MART", "ALP", "HAT")), ("TRADES", "BGAT")],
)
def test_a_base_and_what_builds_on_it_are_trained_alike(alone: str, distilled: str) -> None:
    entries = {entry.label: entry for entry in method_list.ENTRIES}
    for ground in method_list.GROUNDS.values():
        recipes = [vars(entries[label].recipe(ground, 0)) for label in (alone, distilled)]
        shared = recipes[0].keys() & recipes[1].keys() - {"beta", "weight"}
        assert {name: recipes[0][name] for name in shared} == {
            name: recipes[1][name] for name in shared
        }
