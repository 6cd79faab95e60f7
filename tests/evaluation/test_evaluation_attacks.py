"""The attacks that ``evaluate`` knows by name, and attacking only what is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attack_helpers import digits_test, trained_small_cnn
from linear_model import linear_problem
from short_autoattack import shorten
from torch import Tensor, nn

from fastadv.evaluation import Report, evaluate
from fastadv.evaluation.attack_list import BallAttack, parse_attacks

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
QUIET = {"progress": False}
NAMES = ["fgsm", "fgsm-rs", "pgd-5", "pgd-5-2", "cw-5", "cw-5-2", "mim-5"]
NAMES += ["apgd-ce-5", "apgd-dlr-5", "apgd-t-5", "fab-t-5", "fab-5", "square-100"]


def digits_and_net(count: int = 64) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    return trained_small_cnn(), digits_test(count)


def test_every_name_is_run_and_lowers_the_accuracy() -> None:
    model, data = digits_and_net()
    report = evaluate(model, data, ["clean", *NAMES], eps=0.08, **QUIET)
    assert [row.name for row in report.rows] == ["clean", *NAMES]
    assert all(row.status == "ok" for row in report.rows)
    clean = report["clean"].correct
    assert all(report[name].correct < 0.85 * clean for name in NAMES[:-1])
    assert report["square-100"].correct < clean  # so few queries break few
    assert report["pgd-5-2"].correct <= report["pgd-5"].correct + 1
    assert report["apgd-t-5"].correct <= report["apgd-ce-5"].correct


EXPECTED: dict[str, dict[str, Any]] = {
    "fgsm": {"steps": 1, "alpha": 0.4, "random_start": False},
    "fgsm-rs": {"steps": 1, "alpha": 0.5, "random_start": True},
    "pgd-20": {"steps": 20, "alpha": 0.1, "random_start": True},
    "pgd-50-10": {"steps": 50, "alpha": 0.1, "random_start": True, "restarts": 10},
    "cw-30": {"steps": 30, "alpha": 0.1, "random_start": True, "loss": "cw"},
    "cw-30-2": {"steps": 30, "alpha": 0.1, "random_start": True, "loss": "cw", "restarts": 2},
    "mim-20": {"steps": 20, "alpha": 0.1, "random_start": False, "kind": "mim"},
    "apgd-ce": {"steps": 100, "alpha": None, "random_start": True, "kind": "apgd"},
    "apgd-dlr-7": {"steps": 7, "alpha": None, "random_start": True, "kind": "apgd", "loss": "dlr"},
    "apgd-t": {"steps": 100, "alpha": None, "random_start": True, "kind": "apgd", "loss": "dlr-t"},
}
EXPECTED |= {
    "fab-t": {"steps": 100, "alpha": None, "random_start": False, "kind": "fab-t"},
    "fab-30": {"steps": 30, "alpha": None, "random_start": False, "kind": "fab"},
    "square": {"steps": 5000, "alpha": None, "random_start": True, "kind": "square", "loss": "cw"},
    "square-70": {"steps": 70, "alpha": None, "random_start": True, "kind": "square", "loss": "cw"},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_what_a_name_stands_for(name: str) -> None:
    (attack,) = parse_attacks(name, eps=0.4, alpha=None)
    assert attack == BallAttack(name, **EXPECTED[name])
    with pytest.raises(ValueError, match="built-in"):
        parse_attacks([(name, lambda model, x, y: x)], eps=0.4, alpha=None)


def test_alpha_is_that_of_all_attacks_with_a_step() -> None:
    attacks = parse_attacks(["pgd-3", "mim-3", "cw-3", "fgsm-rs"], eps=0.4, alpha=0.05)
    assert [attack.alpha for attack in attacks] == [0.05, 0.05, 0.05, 0.5]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["cw-5-3", "pgd-5-3"])
def test_restarts_attack_only_what_is_left(name: str) -> None:
    net, data = digits_and_net()
    sizes: list[int] = []

    def watching(images: Tensor) -> Tensor:
        if images.requires_grad:
            sizes.append(len(images))
        return net(images)

    row = evaluate(watching, data, name, eps=0.08, **QUIET)[name]
    # The first gradient tells whether there is any to follow. After 5 steps a run looks at its last points.
    runs = sizes[1::6]
    assert len(runs) == 3 and runs[0] > runs[1] >= runs[2] >= row.correct > 0


@pytest.mark.parametrize("name", ["pgd-5-2", "apgd-ce-5", "mim-5", "fab-t-4", "square-30"])
def test_results_do_not_depend_on_the_batch_size(name: str) -> None:
    model, data = digits_and_net()
    counts = [
        evaluate(model, data, name, eps=0.08, batch_size=size, **QUIET)[name].correct
        for size in (7, 64)
    ]
    assert counts[0] == counts[1]


def test_the_worst_case_is_exact_and_attacks_only_what_is_left() -> None:
    """Image by image, what is left after all attacks is what withstands every one of them alone."""
    net, (x, y) = digits_and_net(24)
    attacked: list[int] = []
    names = ["clean", "mim-5", "pgd-5", "cw-5"]
    alone = [
        [evaluate(net, (x[i : i + 1], y[i : i + 1]), name, eps=0.08, **QUIET).rows[0].correct
         for i in range(24)]
        for name in names[:2]
    ]  # fmt: skip

    def watching(images: Tensor) -> Tensor:
        if images.requires_grad:
            attacked.append(len(images))
        return net(images)

    report = evaluate(watching, (x, y), names, eps=0.08, worst_case=True, **QUIET)
    left = [report[name].correct for name in names]
    assert left == sorted(left, reverse=True) and all(row.n == 24 for row in report.rows)
    # The first gradient tells whether there is any to follow. After 5 steps an attack looks at its last points.
    assert attacked[1::6] == left[:-1]
    both = torch.tensor(alone).bool().all(0)
    assert left[1] == int(both.sum())
    separate = evaluate(net, (x, y), names, eps=0.08, **QUIET)
    assert left[-1] <= min(row.correct for row in separate.rows)


def test_the_worst_case_over_a_foreign_attack() -> None:
    model, x, y = linear_problem(classes=4, n=40)
    seen: list[int] = []

    def watch(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        seen.append(len(images))
        return images

    report = evaluate(
        model, (x, y), ["pgd-5", ("watch", watch)], eps=0.02, worst_case=True, **QUIET
    )
    assert seen == [report["pgd-5"].correct] and report["watch"].correct == seen[0] < 40


@pytest.mark.filterwarnings("ignore:there are")
def test_the_worst_case_over_autoattack(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyautoattack")
    shorten(monkeypatch)
    model, x, y = linear_problem(classes=4, n=40, wrong=3)
    report = evaluate(model, (x, y), ["mim-2", "autoattack"], eps=0.02, worst_case=True, **QUIET)
    first, ensemble = report["mim-2"], report["autoattack"]
    assert ensemble.n == 40 and 0 < ensemble.correct <= first.correct < 37
    assert ensemble.correct == int(model.exactly_robust(x, y, 0.02).sum())
    assert ensemble.stages[0].correct <= first.correct
    nothing = evaluate(model, (x, y), ["pgd-20", "autoattack"], eps=0.9, worst_case=True, **QUIET)
    assert [row.correct for row in nothing.rows] == [0, 0] and nothing.rows[1].stages == ()


def test_the_report_says_how_it_counts() -> None:
    model, x, y = linear_problem(classes=4, n=10)
    reports = [
        evaluate(model, (x, y), ["clean", "fgsm"], worst_case=worst, **QUIET)
        for worst in (False, True)
    ]
    words = "each row after all rows before it"
    assert [words in report.table() for report in reports] == [False, True]
    for report in reports:
        assert Report.from_dict(report.to_dict()) == report
    old = reports[0].to_dict()
    del old["worst_case"]  # written before there was a choice
    assert Report.from_dict(old) == reports[0]


@pytest.mark.parametrize(("name", "classes"), [("apgd-dlr", 2), ("apgd-t", 3)])
def test_too_few_classes_are_refused_before_anything_runs(name: str, classes: int) -> None:
    model, x, y = linear_problem(classes=classes, n=4)
    message = f"{name} needs at least {classes + 1} classes, the model has {classes}"
    with pytest.raises(ValueError, match=message):
        evaluate(model, (x, y), ["clean", name], **QUIET)


def test_options_that_no_attack_takes_are_refused() -> None:
    model, data = digits_and_net(8)
    for attacks in ("fgsm", ["clean", "apgd-ce-2", "square-5"], [("pgd", lambda model, x, y: x)]):
        with pytest.raises(ValueError, match="alpha must be left out"):
            evaluate(model, data, attacks, alpha=0.01, **QUIET)
    for attacks in ("clean", ["clean", "pgd-2"]):
        for name, value in (("engine", "fp32"), ("cw_c", 1.0), ("cw_lr", 0.1)):
            message = f"{name} must be left out, got {value!r}: .* the attacks are clean"
            with pytest.raises(ValueError, match=message):
                evaluate(model, data, attacks, **{name: value}, **QUIET)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="worst_case must be left out, got True"):
        evaluate(model, data, ["clean", "min-fgsm"], worst_case=True, **QUIET)
    report = evaluate(model, data, ["clean", "fgsm", "mim-1"], alpha=0.01, engine="auto", **QUIET)
    assert report["mim-1"].alpha == 0.01 and report["fgsm"].alpha == 8 / 255
