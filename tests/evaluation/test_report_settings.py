"""Transfer, EOT, attacks without a ball and masking checks in a report: none is taken for robust accuracy."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_helpers import EPS, by_heading, result

from fastadv.commands import run_report
from fastadv.evaluation import Result, Subject, add_results
from fastadv.evaluation.comparison import Comparison, EvaluatedRun
from fastadv.evaluation.distances import Distances
from fastadv.evaluation.findings import Finding
from fastadv.evaluation.plots import TradeOffPoint
from fastadv.evaluation.reporting import Summary, model_cards
from fastadv.evaluation.reporting.curves import curve_plots
from fastadv.evaluation.sanity_file import SanityResult, add_sanity_result
from fastadv.evaluation.trade_off import published_for, trade_off

pytestmark = pytest.mark.slow


def varied(of: Result, **changes: Any) -> Result:
    return replace(of, row=replace(of.row, **changes))


def transfer(name: str, correct: int, source: str = "b 12345678", **options: Any) -> Result:
    return varied(result(name, correct, **options), surrogate=source)


def without_ball(name: str, correct: int, source: str = "", **found: Any) -> Result:
    distances = Distances("l2", **({"broken": 200, "mean": 0.75, "median": 0.625} | found))
    changes = {"distances": distances, "variant": "c 1, lr 0.01", "surrogate": source}
    return replace(varied(result(name, correct, eps=0.0), **changes), norm="l2")


CLEAN = result("clean", 271)
WHITE = result("pgd-20", 137)
EOT = varied(result("pgd-20", 117), variant="EOT 10")
TRANSFER = [transfer("pgd-20", 201), transfer("pgd-20", 203, source="c 87654321")]
NO_BALL = without_ball("cwl2-1000", 3, curve=((EPS, 0.25),))
EVERYTHING = [CLEAN, WHITE, EOT, *TRANSFER, transfer("autoattack", 259), NO_BALL]
FINDINGS = (
    Finding("eps", True, "robust accuracy does not rise with eps", ((0.0, 0.9),)),
    Finding("gradients", False, "7 of the 9 images have no <gradient>", ((0.0, 0.7),)),
)
VERDICT = "1 of 2 checks are suspect: the robust accuracy may be too high"


def summary(*results: Result, **options: Any) -> Summary:
    return Summary(Comparison([EvaluatedRun("a", "pgd_at", "small_cnn", results)]), **options)


def test_the_first_table_has_white_box_accuracies_in_a_ball_alone() -> None:
    (line,) = by_heading(summary(*EVERYTHING).accuracies())
    assert line["clean %"].startswith("90.33 ") and line["eps"] == "8/255"
    assert line["pgd-20 %"].startswith("45.67 ")
    assert line["pgd-20 (EOT 10) %"].startswith("39.00 ")
    assert sum(name.endswith(" %") for name in line) == 3


def test_transfer_has_a_table_that_names_the_surrogates() -> None:
    _, _, table, *_ = (found := summary(*EVERYTHING)).printed
    assert [one.title for one in found.other_threat_models] == [
        "Black-box transfer",
        "Attacks without a ball",
    ]
    lines = by_heading(table)
    assert [(line["attack"], line["right %"].split()[0]) for line in lines] == [
        ("pgd-20 from b 12345678", "67.00"),
        ("autoattack from b 12345678", "86.33"),
        ("pgd-20 from c 87654321", "67.67"),
    ]
    assert all(line["clean %"].startswith("90.33 [") for line in lines)
    assert any("no white-box accuracies" in note for note in table.notes)


def test_attacks_without_a_ball_have_a_table_of_distances() -> None:
    nothing = without_ball("cwl2-5", 271, broken=0, mean=None, median=None)
    foreign = without_ball("cwl2-5", 90, source="b 12345678")
    _, table = summary(*EVERYTHING, nothing, foreign).other_threat_models
    first, second, third = by_heading(table)
    assert first["attack"] == "cwl2-1000 (c 1, lr 0.01)" and first["norm"] == "l2"
    assert (first["median distance"], first["mean distance"]) == ("0.625", "0.75")
    assert first["broken"] == "200" and first["right within a radius"] == "25.00 % within 8/255"
    assert first["right at any distance %"].startswith("1.00 [")
    assert second["median distance"] == second["mean distance"] == "-"
    assert third["attack"] == "cwl2-5 (c 1, lr 0.01) from b 12345678"


def test_a_run_with_transfer_alone_still_shows_its_clean_accuracy() -> None:
    found = summary(CLEAN, TRANSFER[0], NO_BALL)
    (line,) = by_heading(found.accuracies())
    assert line["clean %"].startswith("90.33 ") and line["eps"] == line["norm"] == "-"
    assert not any("pgd" in name or "cwl2" in name for name in line)
    assert found.points() == [] and found.trade_offs().rows == () and model_cards(found) == {}
    with pytest.raises(ValueError, match="they were all attacked at no radius"):
        summary(CLEAN, TRANSFER[0], NO_BALL, eps=EPS)
    assert found.no_plot.startswith("There is no trade-off plot: the runs share no radius")
    with pytest.raises(ValueError, match="they have clean, pgd-20 in common"):
        summary(CLEAN, WHITE, TRANSFER[0], robust="pgd-20 from b 12345678")


def test_trade_off_and_cards_are_of_the_white_box_alone() -> None:
    cifar = Subject("r", "m", "n", "c", "a1" * 32, "cifar10 test", "b2" * 32)
    found = summary(*(replace(one, subject=cifar) for one in EVERYTHING), robust="pgd-20")
    (point,) = found.points()
    assert point.robust == pytest.approx(100 * 137 / 300)
    (line,) = by_heading(found.trade_offs())
    assert (line["attack"], line["ARDist"]) == ("pgd-20", "-") and found.published() is None
    (card,) = model_cards(found).values()
    assert [(one["attack"], one["variant"]) for one in card["attacks"]] == [
        ("pgd-20", None),
        ("pgd-20", "EOT 10"),
    ]
    assert card["robust_accuracy"]["correct"] == 117
    # AutoAttack on the model itself has an ARDist here, on another's images and without a ball it has none.
    auto = replace(result("autoattack", 123), subject=cifar)
    assert published_for(auto) is not None
    for other in (varied(auto, surrogate="b"), varied(auto, distances=NO_BALL.row.distances)):
        assert published_for(other) is None
        for use in (trade_off, lambda clean, robust: TradeOffPoint.from_rows("a", clean, robust)):
            with pytest.raises(
                ValueError, match="robust must be an attack in a ball on the judged"
            ):
                use(CLEAN.row, other.row)


def test_curves_keep_surrogates_apart() -> None:
    at = [EPS / 2, EPS]
    white = [result("pgd-20", 150 - n, eps=eps) for n, eps in enumerate(at)]
    others = [
        transfer("pgd-20", correct - n, source=source, eps=eps)
        for source, correct in (("b 1", 200), ("c 2", 250))
        for n, eps in enumerate(at)
    ]
    plots = curve_plots(summary(CLEAN, *white, *others, NO_BALL).comparison)
    assert [(plot.surrogate, plot.attack) for plot in plots] == [
        ("", "pgd-20"),
        ("b 1", "pgd-20 from b 1"),
        ("c 2", "pgd-20 from c 2"),
    ]
    for plot, highest in zip(plots, (150, 200, 250), strict=True):
        (curve,) = plot.curves
        assert [row.correct for _, row in curve.points] == [271, highest, highest - 1]
        assert ("black-box transfer" in plot.title) == bool(plot.surrogate)


def test_means_over_seeds_do_not_mix_settings() -> None:
    runs = [
        EvaluatedRun(
            f"s{seed}",
            *("pgd_at", "small_cnn"),
            (CLEAN, varied(WHITE, correct=130 + seed), varied(TRANSFER[0], correct=200 + seed)),
            series="same",
            seed=seed,
        )
        for seed in (0, 1)
    ]
    found = Summary(Comparison(runs))
    (line,) = by_heading(found.over_seeds())
    assert line["pgd-20 %"].startswith("43.50 ") and "67" not in " ".join(line.values())
    assert [point.name for point in found.points()] == ["s0", "s1", "pgd_at, mean of 2"]
    assert [(one.lines[0].surrogate, len(one.lines)) for one in found.series] == [
        ("", 2),
        ("b 12345678", 2),
    ]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of all settings, with masking checks of this model and of another one."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("settings")
    file = add_results(folder / "eval.json", EVERYTHING)
    same = SanityResult(WHITE.subject, FINDINGS, 200, EPS, "linf")
    other = replace(same, subject=replace(WHITE.subject, weights="ff"), findings=FINDINGS[:1])
    for check in (same, other):
        add_sanity_result(folder / "eval.sanity.json", check)
    text = run_report([str(file)], out=str(folder / "out"))
    (folder / "out" / "printed.txt").write_text(text)
    return folder / "out"


def test_the_printed_report_has_a_heading_for_each_setting(written: Path) -> None:
    first, *rest = (written / "printed.txt").read_text().split("\n\n")
    assert first.splitlines()[0].split("model")[1].split() == [
        *("data", "n", "norm", "eps", "clean", "%", "pgd-20", "%", "pgd-20", "(EOT", "10)", "%")
    ]
    assert len(first.splitlines()) == 2
    titles = [part for part in rest if part.endswith(":")]
    assert titles == ["Black-box transfer:", "Attacks without a ball:"]
    assert VERDICT in rest[-1] and "other weights or images" in rest[-1]


def test_every_format_tells_the_settings(written: Path) -> None:
    for name in ("report.html", "report.md", "report.tex"):
        text = (written / name).read_text()
        assert "Black-box transfer" in text and "Attacks without a ball" in text
        assert "pgd-20 from b 12345678" in text and "0.625" in text and "(EOT 10)" in text
    record = json.loads((written / "report.json").read_text())
    settings = ["no attack", "white box", "white box", *["transfer"] * 3, "no ball"]
    assert sorted(one["setting"] for one in record["results"]) == sorted(settings)
    assert {one["attack"] for one in record["trade_off"]} == {"pgd-20", "pgd-20 (EOT 10)"}
    lines = list(csv.DictReader(io.StringIO((written / "report.csv").read_text())))
    assert sorted(line["setting"] for line in lines) == sorted(settings)
    (far,) = [line for line in lines if line["setting"] == "no ball"]
    assert (far["eps"], far["median_distance"], far["variant"]) == ("", "0.625", "c 1, lr 0.01")
    for line in lines:
        assert bool(line["surrogate"]) == (line["setting"] == "transfer")
        assert (line["sum"] != "") == (line["setting"] == "white box")


def test_masking_checks_are_shown_with_their_verdict_in_words(written: Path) -> None:
    page, document = (written / "report.html").read_text(), (written / "report.md").read_text()
    for text in (page, document):
        assert text.count("Signs of gradient masking") == 1 and VERDICT in text
        assert "7 of the 9 images have no &lt;gradient" in text
        assert "has masking checks of other weights or images, which are left out here" in text
    record = json.loads((written / "report.json").read_text())
    (checks,) = record["masking_checks"]
    assert (checks["run"], checks["verdict"], checks["n"]) == ("eval.json", VERDICT, 200)
    assert [one["verdict"] for one in checks["findings"]] == ["ok", "suspect"]
    (written.parent / "eval.sanity.json").write_text("{}")
    with pytest.raises(ValueError, match=r"eval\.sanity\.json: findings are damaged"):
        run_report([str(written.parent / "eval.json")])
