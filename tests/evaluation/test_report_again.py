"""A report and a matrix where files are already: of the user's, of other commands, of an earlier report."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from report_helpers import result
from training_helpers import small_data, small_recipe

from fastadv.cli import main
from fastadv.commands import run_report
from fastadv.evaluation import TransferMatrix, add_results
from fastadv.evaluation.transfer_table import check_matrix_file
from fastadv.trainers import train

pytest.importorskip("matplotlib")
MATRIX = TransferMatrix("fgsm", ("a", "b"), ((1, 2), (2, 1)), (3, 3), 4, 0.1, "linf", (0, 1), 0)


@pytest.fixture
def results(tmp_path: Path) -> str:
    add_results(tmp_path / "a.json", [result("clean", 271), result("pgd-20", 137)])
    return str(tmp_path / "a.json")


@pytest.mark.parametrize("suffix", ["md", "csv", "tex", "json", "html"])
def test_no_file_of_the_users_is_replaced_by_a_report(
    suffix: str, results: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "paper" / f"report.{suffix}"
    mine.parent.mkdir()
    for text in ("<!DOCTYPE html>\n<title>My work</title>", MATRIX.to_csv(), MATRIX.to_json()):
        mine.write_text(text)
        assert main(["report", results, "--out", str(mine.parent)]) == 2
        assert f"{mine} is there and was not written by" in capsys.readouterr().err
        assert [*mine.parent.iterdir()] == [mine] and mine.read_text() == text
    mine.write_text("")  # as mktemp makes it
    for _ in range(2):
        assert main(["report", results, "--out", str(mine.parent)]) == 0


def test_runs_that_nobody_has_judged_are_left_out_with_a_warning(
    results: str, tmp_path: Path
) -> None:
    """Such as the extractors of AFS in a folder of runs that `fastadv reproduce` has filled."""
    options = {"data": small_data(), "model": "small_cnn", "device": "cpu", "progress": False}
    train("standard", small_recipe("standard", epochs=1), run_dir=tmp_path / "extractor", **options)
    extractor = str(tmp_path / "extractor")
    with pytest.warns(UserWarning, match=r"not in the report: .*extractor; there are no results"):
        assert "a.json" in run_report([extractor, results])
    with pytest.raises(FileNotFoundError, match=r"extractor.eval\.json: no such file; run"):
        run_report([extractor])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run_report([results, str(tmp_path / "nowhere")])


@pytest.mark.parametrize("suffix", ["md", "csv", "json"])
def test_no_other_file_is_replaced_by_a_matrix(suffix: str, results: str, tmp_path: Path) -> None:
    run_report([results], str(tmp_path / "report"))
    there = tmp_path / "report" / f"report.{suffix}"
    with pytest.raises(FileExistsError, match="was not written by `fastadv transfer`"):
        check_matrix_file(there)
    if suffix == "json":
        with pytest.raises(FileExistsError, match="was not written by `fastadv transfer`"):
            check_matrix_file(results)
    check_matrix_file(tmp_path / f"new.{suffix}")
    check_matrix_file(MATRIX.save(tmp_path / f"matrix.{suffix}"))


def test_figures_of_an_earlier_report_are_told(results: str, tmp_path: Path) -> None:
    out = tmp_path / "report"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            run_report([results], str(out))
    other = tmp_path / "b.json"
    add_results(other, [result("clean", 200)])
    with pytest.warns(
        UserWarning, match=r"earlier report.*: cards/a.*json, trade_off\.png; delete"
    ):
        run_report([str(other)], str(out))
