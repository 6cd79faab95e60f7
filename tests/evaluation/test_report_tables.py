"""What a report says of several runs: means over seeds, and ARDist where it means something."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_helpers import EPS, by_heading, result
from training_helpers import small_recipe

from fastadv.commands import run_report
from fastadv.evaluation import Result, Row, Subject, add_results
from fastadv.evaluation.comparison import Comparison, EvaluatedRun
from fastadv.evaluation.reporting import Summary
from fastadv.trainers import train

pytestmark = pytest.mark.slow


def runs(*counts: tuple[int, int], series: str = "same", **changes: Any) -> list[EvaluatedRun]:
    return [
        EvaluatedRun(
            f"at{seed}",
            *("pgd_at", "small_cnn"),
            (result("clean", clean, **changes), result("autoattack", robust, **changes)),
            series=series,
            seed=seed,
        )
        for seed, (clean, robust) in enumerate(counts)
    ]


def test_runs_that_differ_in_their_seed_are_averaged() -> None:
    counts = [(240, 120), (246, 129), (252, 141)]
    summary = Summary(Comparison(runs(*counts)))
    table = summary.over_seeds()
    row = dict(zip(table.heading, table.rows[0], strict=True))
    clean, robust = np.array(counts).T / 3.0
    assert len(table.rows) == 1 and row["seeds"] == "0, 1, 2" and row["runs"] == "at0, at1, at2"
    assert row["clean %"] == f"{clean.mean():.2f} ± {clean.std(ddof=1):.2f}"
    assert row["autoattack %"] == f"{robust.mean():.2f} ± {robust.std(ddof=1):.2f}"
    assert row["Sum"] == f"{(clean + robust).mean():.2f} ± {(clean + robust).std(ddof=1):.2f}"
    points = summary.points()
    assert [point.minor for point in points] == [True] * 3 + [False]
    assert points[-1].name == "pgd_at, mean of 3"
    assert (points[-1].clean, points[-1].robust) == pytest.approx((clean.mean(), robust.mean()))


def test_figures_made_of_doubtful_rows_are_marked() -> None:
    fine, doubtful = runs((240, 120), (246, 129))
    clean, robust = doubtful.results
    row = replace(robust.row, status="suspect", notes=("gradients are zero",))
    doubtful = replace(doubtful, results=(clean, replace(robust, row=row)))
    summary = Summary(Comparison([fine, doubtful]))
    (mean,) = by_heading(summary.over_seeds())
    assert mean["clean %"] == "81.00 ± 1.41" and mean["autoattack %"] == "41.50 ± 2.12 suspect"
    assert mean["Sum"].endswith(" suspect") and mean["mean"].endswith(" suspect")
    first, second = by_heading(summary.trade_offs())
    assert second["robust %"].startswith("43.00 suspect [") and "suspect" not in second["clean %"]
    assert second["Sum"].startswith("125.00 suspect [")
    assert second["mean"].startswith("62.50 suspect [") and second["ARDist"] == "-"
    assert not any("suspect" in cell for cell in first.values())
    stages = [line["left %"] for line in by_heading(summary.stages())]
    assert [cell.endswith(" suspect") for cell in stages] == [False, False, True, True]
    names = [point.name for point in summary.points()]
    assert names == ["at0", "at1 suspect", "pgd_at, mean of 2 suspect"]


def test_runs_that_differ_in_more_are_not_averaged() -> None:
    first, second = runs((240, 120), (246, 129))
    for other in (
        replace(second, series="another recipe"),
        replace(second, series=""),
        replace(second, seed=0),
        replace(second, results=(result("clean", 246), result("autoattack", 129, eps=0.1))),
    ):
        summary = Summary(Comparison([first, other]))
        assert summary.over_seeds().rows == () and not any(p.minor for p in summary.points())


CIFAR = Subject(weights="a", data="cifar10 test", images="b")


def test_ardist_is_there_for_what_the_curve_was_fitted_to_alone() -> None:
    def ardist_of(*results: Result) -> str:
        table = Summary(Comparison([EvaluatedRun("r", "m", "n", results)])).trade_offs()
        return dict(zip(table.heading, table.rows[0], strict=True))["ARDist"]

    def pair(**changes: Any) -> tuple[Result, Result]:
        rows = (
            Row("clean", 10_000, 9024, 0.0, 0, 1.0),
            Row("autoattack", 10_000, 5020, EPS, 0, 1.0),
        )
        plain = [Result(CIFAR, row, "linf", (0.0, 1.0), 256, "cpu", {}) for row in rows]
        clean, robust = (replace(one, **changes) for one in plain)
        return clean, robust

    clean, robust = pair()
    assert ardist_of(clean, robust).startswith("3.52 [")  # as the ARREST paper has it, 3.521
    hundred = pair(subject=replace(CIFAR, data="cifar100 test"))
    assert ardist_of(*hundred) != "-" and ardist_of(*hundred) != ardist_of(clean, robust)
    for other in (
        replace(robust, row=replace(robust.row, name="pgd-20")),
        replace(robust, row=replace(robust.row, eps=4 / 255)),
        replace(robust, row=replace(robust.row, status="invalid")),
        replace(robust, norm="l2"),
    ):
        assert ardist_of(clean, other) == "-"
    assert ardist_of(*pair(subject=replace(CIFAR, data="digits test"))) == "-"
    summary = Summary(Comparison([EvaluatedRun("r", "m", "n", (clean, robust))]))
    table = summary.published_points()
    assert ("AT", "87.14", "44.04", "131.18", "65.59", "-1.50") in table.rows


def test_run_directories_tell_their_seeds_and_lose_their_images_with_their_results(
    tmp_path: Path,
) -> None:
    paths = [tmp_path / f"at{seed}" for seed in (0, 1)]

    def trained(seed: int, **options: Any) -> None:
        recipe = small_recipe("standard", epochs=1, train_images=32, seed=seed)
        train(
            "standard",
            recipe,
            data="digits",
            model="small_cnn",
            run_dir=paths[seed],
            device="cpu",
            progress=False,
            **options,
        )

    for seed, path in enumerate(paths):
        trained(seed)
        add_results(path / "eval.json", [result("clean", 270 + 6 * seed), result("pgd-20", 150)])
    record = json.loads(run_report([*map(str, paths)], json=True))
    (series,) = record["series"]
    assert series["runs"] == ["at0", "at1"] and series["seeds"] == [0, 1]
    clean = series["accuracy_percent"]["clean"]
    assert clean["values"] == pytest.approx([90, 92])
    assert clean["mean"] == pytest.approx(91) and clean["std"] == pytest.approx(2**0.5)
    printed = run_report([*map(str, paths)])
    assert "Over seeds:" in printed and re.search(
        r"pgd-20 %.* runs\n.* 0, 1 .* 91\.00 ± 1\.41 .* at0, at1\n", printed
    )
    (paths[0] / "worst").mkdir()
    assert "Over seeds" not in run_report([str(paths[0])])
    trained(0, overwrite=True)
    assert not (paths[0] / "worst").exists() and not (paths[0] / "eval.json").exists()
