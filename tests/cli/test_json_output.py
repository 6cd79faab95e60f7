"""`--json`: standard output is one document and nothing else, and the exit status tells of failure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastadv.cli import main
from fastadv.evaluation import Report

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
QUICK = (
    *("--data", "digits", "--epochs", "1", "--train_images", "64", "--batch_size", "32"),
    *("--pad", "1", "--no-flip", "--monitor_images", "16", "--precision", "fp32", "--device=cpu"),
)
FEW = ("--max_examples", "20", "--device", "cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two runs, whose folders are called alike."""
    folder = tmp_path_factory.mktemp("runs")
    paths = [str(folder / name / "standard") for name in ("one", "two")]
    for seed, path in enumerate(paths):
        words = ["train", "standard", "--run", path, "--seed", str(seed), *QUICK]
        assert main([*words, "--quiet"]) == 0
    return paths


def document(words: list[str], capfd: pytest.CaptureFixture[str]) -> Any:
    """What a command prints, which must be JSON as a whole."""
    capfd.readouterr()
    assert main([*words, "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def test_an_evaluation(
    runs: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # With the bars and lines of progress, which go to standard error.
    words = ["eval", runs[0], "--attacks", "clean", "fgsm", *FEW, "--sanity", "--eps", ".1"]
    found = document(words, capfd)
    assert [row["name"] for row in found["rows"]] == ["clean", "fgsm"]
    assert found["rows"][1]["accuracy"] * 20 == found["rows"][1]["correct"]
    assert found["subject"]["method"] == "standard" and found["file"] == f"{runs[0]}/eval.json"
    assert found["sanity"]["n"] == 20 and len(found["sanity"]["findings"]) > 1
    assert Report.from_dict(found)["fgsm"].eps == 0.1
    assert document([*words[:4], *FEW, "--quiet"], capfd)["sanity"] is None


def test_an_evaluation_that_cannot_be_written_is_printed_and_fails(
    runs: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("a file where a folder should be")
    out = ["--out", str(tmp_path / "file" / "r.json")]
    words = ["eval", runs[0], "--attacks", "clean", *FEW, *out, "--json", "--quiet"]
    capfd.readouterr()
    assert main(words) == 2
    printed, told = capfd.readouterr()
    assert json.loads(printed)["rows"][0]["name"] == "clean" and "r.json" in told


def test_failures_print_nothing_on_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["eval", "nowhere"],
        ["report", "nowhere"],
        ["transfer", "nowhere", "x", "--data=digits"],
    ):
        assert main([*words, "--json"]) == 2
        printed, told = capfd.readouterr()
        assert printed == "" and "nowhere" in told


def test_a_report_and_a_transfer_matrix(runs: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    for run in runs:
        assert main(["eval", run, "--attacks", "clean", *FEW, "--quiet"]) == 0
    found = document(["report", *runs], capfd)
    again = f"{runs[0]}/../standard/"  # is the first run
    assert document(["report", *runs, again], capfd)["results"] == found["results"]
    assert {entry["run"] for entry in found["results"]} == {"one/standard", "two/standard"}
    found = document(["transfer", *runs, "--attack", "fgsm", *FEW], capfd)
    assert found["names"] == ["one/standard", "two/standard"] and len(found["correct"]) == 2


def test_what_can_be_reproduced_and_what_is_left_to_do(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    items = document(["reproduce", "--list"], capfd)
    assert {"item", "title", "published"} == items[0].keys()
    assert "arrest/table2" in {entry["item"] for entry in items}
    assert {entry["published"] for entry in items} <= {"all", "some", "no"}
    words = ["reproduce", "arrest/table2", "--scale", "tiny", "--out", str(tmp_path), "--plan"]
    left = document([*words, "--device", "cpu"], capfd)
    assert left["runs"] > 1 and left["training"] > 0 and left["device"] == "cpu"
    assert (left["item"], left["scale"]) == ("arrest/table2", "tiny")


def test_the_installation(capfd: pytest.CaptureFixture[str]) -> None:
    assert document(["info"], capfd)["ops"]["pgd_step"]["owner"]["cpu"]
