"""Several radii in one evaluation, and attacks without a ball."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from attack_helpers import digits_test, trained_small_cnn
from linear_model import linear_problem

from fastadv.evaluation import Distances, Report, Subject, add_results, evaluate, load_results
from fastadv.evaluation.comparison import Comparison, EvaluatedRun
from fastadv.evaluation.results import results_of

pytestmark = pytest.mark.usefixtures("one_thread")
QUIET: dict[str, Any] = {"progress": False}
RADII = (0.005, 0.01, 0.02)


def test_every_attack_is_run_at_every_radius_and_clean_once() -> None:
    model, x, y = linear_problem(classes=2, n=100, wrong=5)
    report = evaluate(model, (x, y), ["clean", "fgsm", "pgd-20"], eps=RADII, **QUIET)
    names = [row.name for row in report.rows]
    assert names == ["clean", "fgsm", "pgd-20", "fgsm", "pgd-20", "fgsm", "pgd-20"]
    for eps in RADII:
        exact = int(model.exactly_robust(x, y, eps).sum())
        alone = evaluate(model, (x, y), ["pgd-20"], eps=eps, **QUIET)
        for name in ("fgsm", "pgd-20"):
            row = report.at(name, eps)
            assert row.eps == eps and row.correct == exact
        assert report.at("pgd-20", eps).alpha == alone["pgd-20"].alpha == eps / 4
    assert report["clean"].correct == 95
    with pytest.raises(KeyError, match=r"several rows 'fgsm', at 0.005, 0.01, 0.02"):
        report["fgsm"]
    with pytest.raises(KeyError, match=r"no row 'fgsm' at 0.5"):
        report.at("fgsm", 0.5)
    assert "0.02" in report.table() and Report.from_dict(report.to_dict()) == report


def test_each_radius_has_a_worst_case_of_its_own(tmp_path: Path) -> None:
    model, data = trained_small_cnn(), digits_test(64)
    names = ["clean", "mim-3", "cwl2-5", "pgd-3"]
    both = evaluate(model, data, names, eps=[0.04, 0.08], worst_case=True, **QUIET)
    for eps in (0.04, 0.08):
        alone = evaluate(model, data, names, eps=eps, worst_case=True, **QUIET)
        for name in ("mim-3", "pgd-3"):
            assert both.at(name, eps).correct == alone[name].correct
    results = results_of(both, Subject(run="a"))
    after = [(r.row.name, r.after) for r in results]
    own = [("mim-3", ()), ("pgd-3", ("mim-3",))]
    assert after == [("clean", ()), own[0], ("cwl2-5", ()), own[1], *own]
    file = add_results(tmp_path / "r.json", results)
    assert load_results(file) == results
    assert len({result.key for result in results}) == len(results)


@pytest.mark.parametrize("wrong", [(), (0.1, 0.1), (0.1, -1.0), "0.1", (0.1, 7.0)])
def test_wrong_radii_are_refused(wrong: Any) -> None:
    model, x, y = linear_problem(classes=2, n=4)
    with pytest.raises((TypeError, ValueError), match="eps must"):
        evaluate(model, (x, y), "fgsm", eps=wrong, **QUIET)


def test_the_smallest_radius_of_fgsm_is_the_closed_form() -> None:
    """Of a linear model with two classes FGSM reaches the worst image of every ball."""
    model, x, y = linear_problem(classes=2, n=60, wrong=6)
    radii = (0.004, 0.01, 0.03)
    row = evaluate(model, (x, y), "min-fgsm", eps=radii, **QUIET)["min-fgsm"]
    assert row.distances is not None and row.eps == 0 and row.distances.norm == "linf"
    exact = [int(model.exactly_robust(x, y, eps).sum()) / 60 for eps in radii]
    assert [share for _, share in row.distances.curve] == exact and 0 < exact[-1] < exact[0] < 1
    assert row.correct == 0 and row.distances.broken == 54
    # The distance of an image is that to the boundary where no pixel meets the bounds.
    weight = model.linear.weight.detach().double()
    logits = model(x).double()
    margin = (logits[:, 0] - logits[:, 1]).abs() / (weight[0] - weight[1]).abs().sum()
    margin = margin.detach()
    inside = (x.flatten(1).amin(1) > margin) & (x.flatten(1).amax(1) < 1 - margin)
    inside[:6] = False
    assert int(inside.sum()) > 5
    some = evaluate(model, (x[inside], y[inside]), "min-fgsm", **QUIET).rows[0].distances
    assert some is not None and some.mean == pytest.approx(float(margin[inside].mean()), rel=2e-3)
    assert some.median is not None and 0 < some.median < 1


@pytest.mark.slow
def test_more_steps_need_no_larger_radius() -> None:
    model, data = trained_small_cnn(), digits_test(24)
    names = ["min-fgsm", "min-pgd-10"]
    report = evaluate(model, data, names, eps=[0.06, 0.1], **QUIET)
    one, ten = (report[name].distances for name in names)
    assert one is not None and ten is not None
    assert all(few <= many for (_, few), (_, many) in zip(ten.curve, one.curve, strict=True))
    assert sum(share for _, share in ten.curve) < sum(share for _, share in one.curve)
    assert ten.broken >= one.broken and ten.median is not None and ten.median < 0.1
    # An attack at the smallest radius of each image is what a row in a ball counts.
    fgsm = evaluate(model, data, "fgsm", eps=0.06, **QUIET)["fgsm"]
    assert one.curve[0][1] <= fgsm.accuracy


@pytest.mark.slow
def test_carlini_and_wagner_without_a_ball() -> None:
    model, data = trained_small_cnn(), digits_test(40)
    names = ["clean", "cwl2-30", "cwl2-30-5"]
    settings: dict[str, Any] = dict(cw_c=0.1, cw_lr=0.05)
    report = evaluate(model, data, names, norm="l2", eps=[0.5, 1.0], **settings, **QUIET)
    one, searched = report["cwl2-30"], report["cwl2-30-5"]
    for row in (one, searched):
        found = row.distances
        assert found is not None and found.norm == "l2" and row.eps == 0 and row.alpha == 0.05
        assert found.broken == report["clean"].correct - row.correct > 0
        assert [radius for radius, _ in found.curve] == [0.5, 1.0]
        assert found.curve[0][1] >= found.curve[1][1] >= row.accuracy
    assert one.variant == "c 0.1, lr 0.05" and searched.variant == "c from 0.1, lr 0.05"
    assert searched.correct == 0 < one.correct  # c grows until every image is broken
    # A larger c asks for success at a larger distance, so that it breaks more.
    strong = evaluate(model, data, "cwl2-30", cw_c=10.0, cw_lr=0.05, **QUIET)["cwl2-30"]
    assert strong.correct < one.correct and strong.distances is not None
    assert (
        strong.distances.norm == "l2" and strong.distances.curve == ()
    )  # the radii were those of linf
    assert "no ball" in report.table() and "median" in one.line()
    for arguments in ({"cw_c": 0.0}, {"cw_lr": -1.0}, {"cw_lr": math.inf}):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))} must"):
            evaluate(model, data, "cwl2-5", **arguments, **QUIET)  # type: ignore[arg-type]


def test_rows_without_a_ball_have_lines_of_their_own_in_a_comparison(tmp_path: Path) -> None:
    model, data = trained_small_cnn(), digits_test(16)
    names = ["clean", "pgd-2", "cwl2-5", "min-fgsm"]
    report = evaluate(model, data, names, eps=0.08, **QUIET)
    file = add_results(tmp_path / "r.json", results_of(report, Subject(run="a", weights="w")))
    comparison = Comparison([EvaluatedRun("a", "-", "-", tuple(load_results(file)))])
    heading, line = comparison.cells()
    assert dict(zip(heading, line, strict=True))["eps"] == "0.08"
    assert not any("cwl2" in title or "min-" in title for title in heading)
    assert [line.ball for line in comparison.lines].count(False) == 2
    assert comparison.radius() == ("linf", 0.08)


def test_distances_are_summed_up_over_broken_images() -> None:
    far = torch.tensor([0.0, 1.0, 3.0, torch.inf])
    found = Distances.of(far, "l2", (0.5, 1.0, 2.0))
    assert (found.broken, found.mean, found.median) == (2, 2.0, 2.0)
    assert found.curve == ((0.5, 0.75), (1.0, 0.5), (2.0, 0.5))
    none = Distances.of(torch.tensor([0.0, torch.inf]), "linf", ())
    assert none.mean is None and "no image was broken" in none.sentence()
