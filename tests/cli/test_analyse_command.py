"""`fastadv analyse` from end to end: what it writes, what it keeps, and what a report shows of it."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastadv.cli import main
from fastadv.commands.analysis import run_analysis
from fastadv.evaluation.analyses import AnalysisRecord, Measured, load_records
from fastadv.evaluation.analyses.groups import grouped
from fastadv.evaluation.analyses.records import analyses_folder
from fastadv.evaluation.results import Subject
from fastadv.models import create_model

pytest.importorskip("sklearn")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
TRAIN = [
    "--data",
    "digits",
    "--epochs",
    "1",
    "--batch_size",
    "256",
    "--monitor_images",
    "8",
    "--lr",
    "0.05",
]
FEW = ["--max_examples", "12", "--quiet"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs and the results of one judgement."""
    folder = tmp_path_factory.mktemp("runs")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for seed, name in enumerate(("std", "other")):
        words = ["train", "standard", "--run", str(folder / name), "--seed", str(seed), *TRAIN]
        assert main(words) == 0
        assert main(["eval", str(folder / name), "--attacks", "clean", "fgsm", *FEW]) == 0
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> list[str]:
    return [str(shutil.copytree(trained / name, tmp_path / name)) for name in ("std", "other")]


def rows_of(text: str) -> list[dict[str, str]]:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return list(csv.DictReader(io.StringIO("\n".join(lines))))


def analyse(*words: str) -> int:
    of_weights = {"frobenius", "importance", "merger-weights"}.issuperset(
        words[words.index("--what") + 1 :]
    )
    return main(["analyse", *words, *(["--quiet"] if of_weights else FEW)])


def test_the_numbers_say_what_they_are_of(
    runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    std, other = runs
    assert analyse(std, other, "--what", "cosine", "frobenius", "--teacher", std) == 0
    printed = capsys.readouterr().out
    assert "mean cosine" in printed and "norm of all layers" in printed
    records = load_records(Path(other) / "analyses")
    assert [one.measured.analysis for one in records] == ["cosine", "frobenius"]
    cosine, weights = records
    assert cosine.n == 12 and cosine.subject.data == "digits test"
    assert cosine.subject.run == "other" and cosine.subject.method == "standard"
    assert cosine.command.startswith("fastadv analyse") and cosine.date
    assert {"fastadv", "torch"} <= cosine.versions.keys()
    assert cosine.teacher == load_records(Path(std) / "analyses")[1].subject.weights
    assert weights.n == 0 and weights.teacher == "" and weights.settings == {}
    text = cosine.path(Path(other) / "analyses", ".csv").read_text()
    for fact in (f"# weights: {cosine.subject.weights}", "# n: 12", f"# teacher: {cosine.teacher}"):
        assert fact in text
    assert [float(row["cosine"]) for row in rows_of(text)] == cosine.measured.column("cosine")
    of_std = load_records(Path(std) / "analyses")[0].measured
    assert of_std.summary["mean cosine"] == pytest.approx(1, abs=1e-6)
    assert cosine.measured.summary["mean cosine"] < 0.999


def test_json_has_all_numbers_of_all_models(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--what", "frobenius", "minimum", "--max_eps", "0.5", "--steps", "2", "--json"]
    assert analyse(*runs, *options) == 0
    found = json.loads(capsys.readouterr().out)
    of = [(one["model"], one["measured"]["analysis"]) for one in found["analyses"]]
    assert of == [(name, what) for name in ("std", "other") for what in ("frobenius", "minimum")]
    for one in found["analyses"]:
        record = AnalysisRecord.load(Path(one["file"]))
        assert [tuple(row) for row in one["measured"]["rows"]] == list(record.measured.rows)
        assert one["subject"]["weights"] == record.subject.weights and one["n"] == record.n
    assert found["together"] is None and isinstance(found["no_picture"], list)


def test_nothing_is_lost_and_what_is_there_is_not_computed_again(
    runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastadv.commands import analyser

    folder = Path(runs[0]) / "analyses"
    what = ["--what", "steps-curve", "--step_counts", "1", "3"]
    assert analyse(runs[0], *what, "--eps", "0.1") == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert analyse(runs[0], *what, "--eps", "0.2") == 0
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(after) == 2 * len(before) and before.items() <= after.items()
    assert sorted(one.settings["eps"] for one in load_records(folder)) == [0.1, 0.2]

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr(analyser, "run_analyses", never)
    assert analyse(runs[0], *what, "--eps", "0.1") == 0
    with pytest.raises(AssertionError, match="computed again"):
        analyse(runs[0], *what, "--eps", "0.1", "--anew")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == after


def test_a_record_is_read_back_and_a_damaged_one_is_told(tmp_path: Path) -> None:
    images = torch.rand(2, 1, 4, 4)
    measured = Measured("minimum", ("image", "radius"), ((0, 0.5), (1, None)), {"a": 1.5}, ("n.",),
                        images, images / 2)  # fmt: skip
    subject = Subject(run="r", weights="ab", data="d", images="cd")
    record = AnalysisRecord(measured, subject, 2, {"max_eps": 0.5, "seed": 0}, device="cpu")
    file = record.save(tmp_path)
    (found,) = load_records(tmp_path)
    assert found == record and found.key == record.key == file.stem
    assert found.measured.adversarials is not None
    assert torch.equal(found.measured.adversarials, images / 2)
    for change in ({"seed": 1}, {"max_eps": 0.25}):
        assert replace(record, settings={**record.settings, **change}).key != record.key
    assert replace(record, subject=replace(subject, weights="x")).key != record.key
    assert rows_of(record.path(tmp_path, ".csv").read_text())[1] == {"image": "1", "radius": ""}
    content = json.loads(file.read_text())
    for damage in ("{", "[]", json.dumps({**content, "format": 9}),
                   json.dumps({**content, "measured": {**content["measured"], "rows": [[1]]}}),
                   json.dumps({k: v for k, v in content.items() if k != "n"})):  # fmt: skip
        file.write_text(damage)
        with pytest.raises(ValueError, match=f"{re.escape(str(file))}: is no record"):
            load_records(tmp_path)


def test_several_models_share_a_picture_and_a_table(runs: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    what = ["eps-curve", "minimum", "entropy", "random-labels"]
    options = ["--radii", "0.1", "0.4", "--steps", "2", "--epochs", "2", "--train_examples", "20"]
    assert analyse(*runs, "--what", *what, *options, "--pictures", "2", "--out", str(out)) == 0
    names = sorted(re.sub("-[0-9a-f]{6,}", "", path.name) for path in out.iterdir())
    assert [name for name in names if name.endswith(".csv")] == [f"{n}.csv" for n in sorted(what)]
    pictures = [name for name in names if name.endswith(".png") and "images" not in name]
    assert pictures == [f"{n}.png" for n in sorted(what)]
    (curve,) = out.glob("eps-curve-*.csv")
    rows = rows_of(curve.read_text())
    assert [(row["run"], float(row["eps"])) for row in rows] == [
        (run, eps) for run in ("std", "other") for eps in (0.0, 0.1, 0.4)
    ]
    assert "# weights of other: " in curve.read_text()


def test_the_report_shows_the_analyses_of_the_weights_that_were_judged(
    runs: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    options = ["--pictures", "2", "--max_eps", "0.5", "--steps", "2"]
    assert analyse(*runs, "--what", "frobenius", "minimum", *options) == 0
    folder = Path(runs[0]) / "analyses"
    (record,) = (one for one in load_records(folder) if one.measured.analysis == "frobenius")
    replace(record, subject=replace(record.subject, weights="00" * 32)).save(folder)
    out = tmp_path / "report"
    assert main(["report", *runs, "--out", str(out)]) == 0
    page = (out / "report.html").read_text()
    assert page.count("<h2>Frobenius norm of the weights of each layer</h2>") == 2  # picture, table
    assert "<h2>Smallest perturbation</h2>" in page
    assert not re.search(r'(?:src|href|srcset)="(?!data:)', page), "the page needs nothing else"
    assert "std has analyses of other weights" in page and "other has analyses" not in page
    norm = next(iter(load_records(Path(runs[1]) / "analyses"))).measured.summary
    assert f">{norm['norm of all layers']:.4g}<" in page
    assert "Frobenius norm of the weights of each layer" in (out / "report.md").read_text()
    (table,) = (out / "analyses").glob("frobenius-*.csv")
    assert {row["run"] for row in rows_of(table.read_text())} == {"std", "other"}
    assert len(list((out / "analyses").glob("frobenius-*.png"))) == 1
    broken = [
        one.measured.originals for run in runs for one in load_records(Path(run) / "analyses")
    ]
    shown = sum(images is not None for images in broken)
    assert page.count("<h2>Smallest perturbations of ") == shown


def test_without_matplotlib_the_numbers_are_written_and_a_line_says_so(
    runs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastadv.evaluation import plot_style

    def absent() -> Any:
        raise ImportError("plots need matplotlib: pip install matplotlib")

    monkeypatch.setattr(plot_style, "_import_matplotlib", absent)
    assert analyse(runs[0], "--what", "frobenius") == 0
    assert "no picture was drawn: plots need matplotlib" in capsys.readouterr().out
    kinds = sorted(path.suffix for path in (Path(runs[0]) / "analyses").iterdir())
    assert kinds == [".csv", ".json"]


def test_a_file_of_weights_is_analysed_beside_itself(tmp_path: Path) -> None:
    file = tmp_path / "mine.pt"
    torch.manual_seed(0)
    torch.save(create_model("small_cnn", 10, 1).state_dict(), file)
    words = [str(file), "--model", "small_cnn", "--data", "digits", "--what", "frobenius"]
    assert analyse(*words) == 0
    (record,) = load_records(tmp_path / "mine.pt.analyses")
    assert record.subject.network == "small_cnn"
    assert analyses_folder(tmp_path / "mine.pt.eval.json") == tmp_path / "mine.pt.analyses"
    assert analyses_folder(tmp_path / "eval.json") == tmp_path / "analyses"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--what", "cosin"], "what must be one of .*did you mean 'cosine'"),
        (["--what", "cosine"], "teacher must be given with cosine: --teacher STD"),
        (["--what", "importance"], "model must be a Stack.*got SmallCNN"),
        (["--what", "frobenius", "--teacher", "x"], "teacher must be left out with frobenius"),
        (["--what", "minimum", "--epochs", "2"], "epochs must be left out with minimum"),
        (["--what", "minimum", "--train_examples", "2"], "train_examples must be left out"),
        (["--what", "minimum", "--teacher_model", "x"], "teacher_model must come with teacher"),
        (["--what", "cosine", "--teacher", "nowhere"], "nowhere: no such file or folder"),
        (
            ["--what", "entropy", "frobenius"],
            "max_examples must be left out, as entropy, frobenius",
        ),
    ],
)
def test_mistakes_are_told_in_a_line(
    runs: list[str], words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert analyse(runs[0], *words) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert not (Path(runs[0]) / "analyses").exists()


@pytest.mark.parametrize("option", [("--data", "digits"), ("--root", "x"), ("--resize", "8")])
def test_options_of_images_are_refused_where_none_are_looked_at(
    runs: list[str], option: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyse", runs[0], "--what", "frobenius", "--quiet", *option]) == 2
    assert f"{option[0][2:]} must be left out, as frobenius" in capsys.readouterr().err


def test_records_of_other_settings_are_not_put_into_one_picture() -> None:
    def record(weights: str, eps: float, checkpoint: str = "") -> AnalysisRecord:
        measured = Measured("eps-curve", ("eps",), ((eps,),))
        subject = Subject(weights=weights, checkpoint=checkpoint)
        return AnalysisRecord(measured, subject, 1, {"eps": eps})

    groups = grouped({"a": [record("1", 0.1), record("1", 0.2)], "b": [record("2", 0.1)]})
    assert [list(group.records) for group in groups] == [["a", "b"], ["a"]]
    (group,) = grouped({"a": [record("1", 0.1, "first"), record("2", 0.1, "last")]})
    assert list(group.records) == ["a first", "a last"]


def test_the_command_in_python_tells_where_the_numbers_are(runs: list[str]) -> None:
    text = run_analysis([runs[0]], ["frobenius"], quiet=True)
    assert str(Path(runs[0]) / "analyses") in text


def test_numbers_that_cannot_be_written_are_printed(
    runs: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    (Path(runs[0]) / "analyses").write_text("in the way")
    assert analyse(*runs, "--what", "frobenius") == 2
    out, err = capfd.readouterr()
    assert "norm of all layers" in out
    assert re.search(r"std/analyses.* cannot be written: ", err)
    assert len(load_records(Path(runs[1]) / "analyses")) == 1
    together = Path(runs[1]) / "together"
    together.write_text("in the way")
    assert analyse(runs[1], "--out", str(together), "--what", "frobenius") == 2
    out, err = capfd.readouterr()
    assert "norm of all layers" in out and "together" in err and "cannot be written" in err
    table = Path(runs[1]) / "table.json"
    table.mkdir()
    assert main(["transfer", *runs, "--attack", "fgsm", "--out", str(table), *FEW]) == 2
    out, err = capfd.readouterr()
    assert "std" in out and "table.json cannot be written: Is a directory" in err
