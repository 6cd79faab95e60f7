"""Bundles of attacks, whole runs, gradients averaged over passes, and what a random model's rows say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from attack_helpers import digits_test, images, plain_pgd, trained_small_cnn
from torch import Tensor, nn

import fastadv
from fastadv.evaluation import evaluate
from fastadv.evaluation.attack_list import BUNDLES, NAMES, expand_bundles, parse_attacks

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
QUIET: dict[str, Any] = {"progress": False}


def test_a_bundle_is_its_attacks_in_place() -> None:
    assert expand_bundles("quick") == ["clean", "fgsm", "pgd-20"]
    assert expand_bundles(["mim-5", "quick"]) == ["mim-5", "clean", "fgsm", "pgd-20"]
    assert expand_bundles("standard") == ["clean", "autoattack"]
    for names in BUNDLES.values():
        assert [attack.name for attack in parse_attacks(list(names), 0.1, None)] == list(names)


def test_what_two_bundles_or_a_bundle_and_a_name_share_is_run_once() -> None:
    assert expand_bundles(["quick", "standard"]) == ["clean", "fgsm", "pgd-20", "autoattack"]
    assert expand_bundles(["fgsm", "quick"]) == ["fgsm", "clean", "pgd-20"]
    assert expand_bundles(["quick", "fgsm"]) == ["clean", "fgsm", "pgd-20"]
    with pytest.raises(ValueError, match="'fgsm' appears twice"):
        parse_attacks(["fgsm", "fgsm", "quick"], 0.1, None)


def test_the_quick_bundle_is_evaluated() -> None:
    model, data = trained_small_cnn(), digits_test(32)
    together = evaluate(model, data, "quick", eps=0.08, **QUIET)
    alone = evaluate(model, data, ["clean", "fgsm", "pgd-20"], eps=0.08, **QUIET)
    assert [(r.name, r.correct) for r in together.rows] == [(r.name, r.correct) for r in alone.rows]


def test_names_of_bundles_are_taken_and_near_misses_are_named() -> None:
    with pytest.raises(ValueError, match="built-in"):
        parse_attacks([("strong", lambda model, x, y: x)], 0.1, None)
    for wrong, meant in (
        ("stong", "strong"),
        ("cwl2", "cwl2-1000"),
        ("cw-l2-30", "cwl2-30"),
        ("min_fgsm", "min-fgsm"),
    ):
        with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
            parse_attacks(wrong, 0.1, None)


def test_of_whole_runs_the_lowest_counts_and_restarts_are_lower() -> None:
    model, data = trained_small_cnn(), digits_test(96)
    report = evaluate(model, data, ["pgd-2-6runs", "pgd-2-6"], eps=0.06, **QUIET)
    runs, restarts = report["pgd-2-6runs"], report["pgd-2-6"]
    (note,) = runs.notes
    found = re.fullmatch(
        r"the lowest of 6 whole runs, which left (\d+) to (\d+) images, (\S+) on average", note
    )
    assert found is not None
    lowest, highest, mean = int(found[1]), int(found[2]), float(found[3])
    assert runs.correct == lowest <= mean <= highest and lowest < highest
    assert (
        restarts.correct <= runs.correct
    )  # an image need not be broken by the same run as its neighbours
    assert runs.status == "ok" and runs.steps == 2


class Noisy(nn.Module):
    """A model whose images get noise of its own."""

    def __init__(self, model: nn.Module, size: float = 0.2) -> None:
        super().__init__()
        self.model, self.size = model, size

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x + self.size * torch.randn_like(x))


class Counting(nn.Module):
    """Adds, to the logits, a slope that differs from pass to pass: 1, 2, 3, and so on."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        total = x.flatten(1).sum(1)
        return torch.stack((-self.passes * total, self.passes * total), 1)


def test_a_gradient_over_passes_is_their_mean() -> None:
    x, y = images(3), torch.tensor([0, 0, 1])
    slopes: list[float] = []
    model = Counting()

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return logits[torch.arange(len(labels)), labels]

    attack = fastadv.PGD(model, 0.1, 0.05, 1, random_start=False, norm="l2", loss=loss)
    attack.precision, attack.engine, attack.passes = "fp32", "eager", 3
    attack(x, y)
    slopes.append(float(attack.last.loss_per_step[0]))
    signs = torch.where(y == 0, -1.0, 1.0)
    # The passes have slopes 1, 2 and 3, whose mean is 2.
    expected = float((2 * signs * x.flatten(1).sum(1)).mean())
    assert model.passes == 3 and slopes[0] == pytest.approx(expected, rel=1e-5)
    for wrong in (0, 1.5, "2"):
        with pytest.raises((TypeError, ValueError), match="passes must"):
            attack.passes = wrong  # type: ignore[assignment]


def test_more_passes_than_a_graph_holds_are_refused_where_one_is_asked_for() -> None:
    attack = fastadv.PGD(trained_small_cnn(), 0.1, 0.02, 10, engine="graph")
    attack.passes = 5
    with pytest.raises(ValueError, match="it takes 60 gradients"):
        attack.passes = 6
    assert attack.passes == 5


def test_of_a_model_that_draws_nothing_the_mean_is_its_gradient() -> None:
    (x, y), model = digits_test(24), trained_small_cnn()
    for norm, eps in (("linf", 0.1), ("l2", 0.5)):
        attack = fastadv.PGD(
            model, eps, eps / 4, 5, norm=norm, precision="fp32", engine="eager", seed=3
        )
        one = attack(x, y)
        attack.passes = 2  # whose sum and half are exact
        assert torch.equal(attack(x, y), one)
    start = x.clone()
    plain = plain_pgd(
        model, x, y, start, eps=0.1, alpha=0.025, steps=5,
        loss=lambda logits, labels: nn.functional.cross_entropy(logits, labels, reduction="sum"),
    )  # fmt: skip
    attack = fastadv.PGD(model, 0.1, 0.025, 5, False, precision="fp32", engine="eager")
    attack.passes = 4
    assert torch.equal(attack(x, y), plain)


def test_eot_breaks_more_of_a_random_model_and_every_row_says_what_it_is() -> None:
    model, data = Noisy(trained_small_cnn()), digits_test(96)
    names = ["clean", "pgd-8", "apgd-ce-8", "square-10"]
    single = evaluate(model, data, names, eps=0.12, **QUIET)
    assert all("draws random numbers" in row.notes[-1] for row in single.rows)
    assert [row.status for row in single.rows] == ["ok", "suspect", "suspect", "ok"]
    names = ["clean", "pgd-8", "apgd-ce-8"]
    averaged = evaluate(model, data, names, eps=0.12, eot=8, **QUIET)
    assert [row.variant for row in averaged.rows] == ["", "EOT 8", "EOT 8"]
    assert all(row.status == "ok" and "draws" in row.notes[-1] for row in averaged.rows)
    assert averaged["pgd-8"].correct < single["pgd-8"].correct
    assert averaged["apgd-ce-8"].correct < single["apgd-ce-8"].correct - 5
    plain = evaluate(trained_small_cnn(), data, "pgd-8", eps=0.12, **QUIET)
    assert plain["pgd-8"].notes == () and plain["pgd-8"].status == "ok"


def test_a_random_model_is_judged_by_the_seed_and_the_generators_are_left_alone() -> None:
    model, data = Noisy(trained_small_cnn()), digits_test(64)
    found = []
    for state, seed in ((0, 1), (5, 1), (0, 2)):
        torch.manual_seed(state)
        before = torch.random.get_rng_state()
        names = ["clean", "fgsm", "pgd-4"]
        report = evaluate(model, data, names, eps=0.05, seed=seed, eot=2, **QUIET)
        assert torch.equal(before, torch.random.get_rng_state())
        found.append([row.correct for row in report.rows])
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("name", ["autoattack", "fab-t", "square", "cwl2-5", "min-fgsm"])
def test_eot_is_refused_by_name(name: str) -> None:
    model, data = trained_small_cnn(), digits_test(4)
    with pytest.raises(ValueError, match=f"eot must be 1 for {name}, got 3"):
        evaluate(model, data, ["clean", "fgsm", name], eps=0.1, eot=3, **QUIET)
    with pytest.raises(ValueError, match="eot must"):
        evaluate(model, data, "fgsm", eps=0.1, eot=0, **QUIET)


def test_the_names_are_listed_in_the_document_as_in_the_source() -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    table = page.split("## Attacks by name")[1].split("\n\n")[1].splitlines()[2:]
    found = dict(line.replace("`", "").strip("| ").split(" | ") for line in table)
    assert found == NAMES


def test_every_name_of_the_list_is_an_attack_or_a_bundle() -> None:
    numbers = str.maketrans({"K": "3", "R": "2", "N": "9", "S": "2"})
    names = [name.translate(numbers) for names in NAMES for name in names.split(", ")]
    assert {a.name for a in parse_attacks([n for n in names if n not in BUNDLES], 0.1, None)} == (
        set(names) - set(BUNDLES)
    )
    assert set(BUNDLES) <= set(names)
