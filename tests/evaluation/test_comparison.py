"""The table of runs: what may not be compared stands on lines of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fastadv.commands import run_report
from fastadv.evaluation import Report, Result, Row, Subject, add_results
from fastadv.evaluation.comparison import Comparison, EvaluatedRun, distinct_names, distinct_paths
from fastadv.evaluation.result_row import RANDOM

WEIGHTS = Subject("at", "pgd_at", "small_cnn", "step_000010", "a1" * 32, "digits test", "b2" * 32)
OTHERS = replace(WEIGHTS, checkpoint="step_000020", weights="c3" * 32)


def result(
    name: str,
    correct: int,
    eps: float = 8 / 255,
    subject: Subject = WEIGHTS,
    n: int = 100,
    seed: int = 0,
    alpha: float | None = None,
    **changes: object,
) -> Result:
    row = Row(name, n, correct, 0.0 if name == "clean" else eps, seed, 1.0, alpha=alpha)
    plain = Result(subject, row, "linf", (0.0, 1.0), 256, "cpu", {})
    return replace(plain, **changes)  # type: ignore[arg-type]


def table(*results: Result, name: str = "at") -> list[dict[str, str]]:
    return as_dicts(Comparison([EvaluatedRun(name, "pgd_at", "small_cnn", results)]))


def as_dicts(comparison: Comparison) -> list[dict[str, str]]:
    heading, *lines = comparison.cells()
    return [dict(zip(heading, line, strict=True)) for line in lines]


def test_radii_and_norms_are_apart_and_share_the_clean_accuracy() -> None:
    lines = table(
        result("pgd-20", 40),
        result("pgd-20", 70, eps=3 / 255),
        result("clean", 90),
        result("pgd-20", 50, eps=0.5, norm="l2"),
        result("fgsm", 60),
    )
    assert [(line["norm"], line["eps"]) for line in lines] == [
        ("linf", "8/255"),
        ("linf", "3/255"),
        ("l2", "0.5"),
    ]
    assert [line["clean %"] for line in lines] == ["90.00"] * 3
    assert [line["pgd-20 %"] for line in lines] == ["40.00", "70.00", "50.00"]
    assert [line["fgsm %"] for line in lines] == ["60.00", "-", "-"]
    assert list(lines[0]) == [
        *("run", "method", "model", "data", "n", "norm", "eps"),
        *("clean %", "pgd-20 %", "fgsm %"),
    ]


def test_checkpoints_seeds_and_images_are_apart_and_shown_where_they_differ() -> None:
    lines = table(
        result("clean", 90),
        result("pgd-20", 40),
        result("clean", 95, subject=OTHERS),
        result("pgd-20", 45, subject=OTHERS),
        result("pgd-20", 41, seed=1),
        result("pgd-20", 8, n=20),
    )
    assert [line["checkpoint"] for line in lines] == ["step_000010", "step_000020"] + [
        "step_000010"
    ] * 2
    assert [line["seed"] for line in lines] == ["0", "0", "1", "0"]
    assert [line["clean %"] for line in lines] == ["90.00", "95.00", "90.00", "-"]
    assert [line["n"] for line in lines] == ["100", "100", "100", "20"]


def test_the_clean_accuracy_of_a_model_that_draws_is_of_one_seed() -> None:
    def drawn(name: str, correct: int, seed: int) -> Result:
        plain = result(name, correct, seed=seed)
        return replace(plain, row=replace(plain.row, notes=(RANDOM,)))

    lines = table(
        drawn("clean", 90, 0), drawn("pgd-20", 40, 0), drawn("pgd-20", 41, 1), drawn("clean", 93, 2)
    )
    assert [(line["seed"], line["clean %"], line["pgd-20 %"]) for line in lines] == [
        *(("0", "90.00", "40.00"), ("1", "-", "41.00"), ("2", "93.00", "-"))
    ]


def test_one_name_for_other_weights_or_images_gets_a_hash() -> None:
    trained_anew = replace(WEIGHTS, weights="c3" * 32)
    lines = table(result("pgd-20", 40), result("pgd-20", 45, subject=trained_anew))
    assert [line["checkpoint"] for line in lines] == [
        "step_000010 (a1a1a1a)",
        "step_000010 (c3c3c3c)",
    ]
    other_images = replace(WEIGHTS, images="d4" * 32)
    lines = table(result("pgd-20", 40), result("pgd-20", 45, subject=other_images))
    assert [line["data"] for line in lines] == ["digits test (b2b2b2b)", "digits test (d4d4d4d)"]


def test_an_attack_run_in_two_ways_has_two_columns() -> None:
    eps = 8 / 255
    (line,) = table(
        result("pgd-20", 40, alpha=eps / 4),
        result("pgd-20", 42, alpha=eps / 8),
        result("autoattack", 30),
        result("autoattack", 29, batch_size=50),
        result("pgd-20", 28, alpha=eps / 4, after=("fgsm", "mim-5")),
        result("mim-5", 50, alpha=eps / 4),
    )
    assert line["pgd-20 (alpha 0.25 eps) %"] == "40.00"
    assert line["pgd-20 (alpha 0.125 eps) %"] == "42.00"
    assert line["autoattack (batches of 256) %"] == "30.00"
    assert line["autoattack (batches of 50) %"] == "29.00"
    assert line["pgd-20 after fgsm+mim-5 %"] == "28.00"
    assert line["mim-5 %"] == "50.00"


def test_a_status_that_is_not_ok_is_shown() -> None:
    suspect = result("autoattack", 45)
    suspect = replace(suspect, row=replace(suspect.row, status="suspect"))
    (line,) = table(suspect)
    assert line["autoattack %"] == "45.00 suspect"


def test_a_run_without_an_attack_has_a_line() -> None:
    (line,) = table(result("clean", 90))
    assert line["clean %"] == "90.00" and line["eps"] == line["norm"] == "-"


def test_runs_of_one_name_are_told_apart() -> None:
    assert distinct_names(["runs/at", "runs/trades"]) == ["at", "trades"]
    assert distinct_names(["a/at", "b/at", "trades"]) == ["a/at", "b/at", "trades"]
    assert distinct_names(["x/a/at", "y/a/at/"]) == ["x/a/at", "y/a/at"]
    assert distinct_names(["at", "./at"]) == ["at", "at"]
    assert distinct_paths(["b/at", "at", "./b/at/", "c", "at"]) == ["b/at", "at", "c"]


def test_a_figure_is_of_one_radius() -> None:
    both = [result("clean", 90), result("pgd-20", 40), result("pgd-20", 70, eps=3 / 255)]
    runs = [EvaluatedRun(name, "pgd_at", "small_cnn", tuple(both)) for name in ("a", "b")]
    comparison = Comparison(runs)
    assert comparison.radius() == ("linf", 8 / 255)
    assert comparison.radius(eps=3 / 255) == ("linf", 3 / 255)
    assert [line.run.name for line in comparison.at(comparison.radius())] == ["a", "b"]
    with pytest.raises(
        ValueError, match="got 4/255; they were all attacked at 8/255 linf, at 3/255"
    ):
        comparison.radius(eps=4 / 255)
    small = [result("pgd-20", 70, eps=e / 255) for e in (1, 3)]
    with pytest.raises(ValueError, match="eps must name one radius"):
        Comparison([EvaluatedRun("a", "pgd_at", "small_cnn", tuple(small))]).radius()


def test_points_of_one_run_are_told_apart() -> None:
    results = (result("pgd-20", 40), result("pgd-20", 45, subject=OTHERS))
    comparison = Comparison([EvaluatedRun("a", "pgd_at", "small_cnn", results)])
    assert [comparison.label(line) for line in comparison.lines] == [
        "a step_000010",
        "a step_000020",
    ]


@pytest.mark.slow
def test_files_of_results_are_compared_and_plotted_at_one_radius(tmp_path: Path) -> None:
    for name, subject in (("one", WEIGHTS), ("two", OTHERS)):
        add_results(
            tmp_path / f"{name}.json",
            [
                result("clean", 90, subject=subject),
                result("pgd-20", 40, subject=subject),
                result("pgd-20", 70, eps=3 / 255, subject=subject),
            ],
        )
    files = [str(tmp_path / "one.json"), str(tmp_path / "two.json")]
    text = run_report(files, out=str(tmp_path / "figures"))
    assert [line.split()[0] for line in text.splitlines()] == ["run"] + ["one.json"] * 2 + [
        "two.json"
    ] * 2
    assert text.count(" 8/255 ") == text.count(" 3/255 ") == 2
    assert (tmp_path / "figures" / "trade_off.png").is_file()
    assert "| 3/255 |" in (tmp_path / "figures" / "report.md").read_text()
    run_report(files, out=str(tmp_path / "figures"), eps=3 / 255, robust="pgd-20")
    with pytest.raises(ValueError, match="robust must be an attack that all runs have"):
        run_report(files, out=str(tmp_path / "figures"), robust="autoattack")
    for name, value in (("robust", "pgd-20"), ("eps", 0.1), ("norm", "linf")):
        with pytest.raises(ValueError, match=f"{name} must come with out"):
            run_report(files, **{name: value})  # type: ignore[arg-type]


def test_the_report_of_an_earlier_version_is_shown(tmp_path: Path) -> None:
    rows = (result("clean", 90).row, result("pgd-20", 40).row)
    file = Report(rows, "Net", "digits test", batch_size=256).save(tmp_path / "old.json")
    _, line = run_report([str(file)]).splitlines()
    parts = ["old.json", "-", "Net", "digits", "test", "100", "linf", "8/255"]
    assert line.split()[:8] == parts
    assert line.split()[8:] == ["90.00", "[82.56,", "94.48]", "40.00", "[30.94,", "49.80]"]


def test_results_in_other_bounds_are_apart_with_their_own_clean_accuracy() -> None:
    wide = {"bounds": (-1.0, 1.0)}
    lines = table(
        *(result("clean", 90), result("pgd-20", 40)),
        *(result("clean", 80, **wide), result("pgd-20", 60, **wide)),
    )
    found = [(line["bounds"], line["clean %"], line["pgd-20 %"]) for line in lines]
    assert found == [("0 1", "90.00", "40.00"), ("-1 1", "80.00", "60.00")]


def test_batch_sizes_of_a_random_model_are_apart_with_their_own_clean_accuracy() -> None:
    def drawn(name: str, correct: int, batch_size: int) -> Result:
        one = result(name, correct, batch_size=batch_size)
        return replace(one, row=replace(one.row, notes=(RANDOM,)))

    lines = table(
        *(drawn("clean", 90, 8), drawn("pgd-20", 40, 8)),
        *(drawn("clean", 80, 16), drawn("pgd-20", 60, 16)),
    )
    found = [(line["batch"], line["clean %"], line["pgd-20 %"]) for line in lines]
    assert found == [("8", "90.00", "40.00"), ("16", "80.00", "60.00")]
