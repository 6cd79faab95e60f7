"""Files of results that were damaged, or changed by hand, after they were written."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from report_helpers import result

from fastadv.cli import main
from fastadv.evaluation import add_results, load_results
from fastadv.evaluation.finished_batches import FinishedBatches
from fastadv.evaluation.state_folder import Fingerprint
from fastadv.evaluation.verify import Violations
from fastadv.evaluation.worst import WorstImages
from fastadv.plain_text import csv_cell


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A file of two results whose second one was changed."""
    file = add_results(folder / "eval.json", [result("clean", 90), result("pgd-20", 40)])
    content = json.loads(file.read_text())
    change(content["rows"][1])
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"correct": 80}, "row 2: accuracy must be correct / n, 80 / "),
        ({"accuracy": 0.99}, "row 2: accuracy must be correct / n, 40 / "),
        ({"norm": "l7"}, "row 2: norm must be one of linf, l2, l1"),
        ({"bounds": [1, 0]}, "row 2: bounds must be finite and ascending"),
        ({"bounds": [0, float("nan")]}, "row 2: bounds must be finite and ascending"),
        ({"bounds": [0, 1, 2]}, "bounds must be a sequence of 2"),
        ({"alpha": float("nan")}, "row 2: alpha must be finite"),
        ({"batch_size": 0}, "row 2: batch_size must be >= 1"),
        ({"after": "clean"}, "after must be a sequence"),
        ({"notes": "abc"}, "notes must be a sequence"),
        ({"versions": [1]}, "versions must be a dict"),
    ],
)
def test_entries_that_cannot_be_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = edited(tmp_path, lambda row: row.update(change))
    with pytest.raises(ValueError, match=r"eval\.json") as caught:
        load_results(file)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [{"seed": 7}, {"steps": 100}, {"name": "autoattack"}, {"eps": 0.1}, {"weights": "other"}],
)
def test_a_changed_entry_is_suspect_wherever_it_goes(
    change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = edited(tmp_path, lambda row: row.update(change))
    clean, changed = load_results(file)
    assert clean.row.status == "ok" and changed.row.status == "suspect"
    assert "changed after it was written" in changed.row.notes[-1]
    add_results(file, [result("fgsm", 50)])  # which writes all entries again
    assert [one.row.status for one in load_results(file)] == ["ok", "suspect", "ok"]
    assert main(["report", str(file), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert sorted(one["status"] for one in record["results"]) == ["ok", "ok", "suspect"]


def test_both_numbers_changed_alike_are_suspect(tmp_path: Path) -> None:
    def change(row: dict[str, Any]) -> None:
        row.update(correct=80, accuracy=80 / row["n"])

    assert load_results(edited(tmp_path, change))[1].row.status == "suspect"


def test_files_without_hashes_are_read_as_before(tmp_path: Path) -> None:
    file = edited(tmp_path, lambda row: row.update(steps=100))
    content = json.loads(file.read_text())
    for row in content["rows"]:
        del row["sha256"]
    file.write_text(json.dumps(content))
    assert [one.row.status for one in load_results(file)] == ["ok", "ok"]


def test_two_entries_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    file = edited(tmp_path, lambda row: None)
    content = json.loads(file.read_text())
    other = dict(content["rows"][1])
    content["rows"].append(other)
    file.write_text(json.dumps(content))
    assert len(load_results(file)) == 2  # the same twice
    other.update(correct=41, accuracy=41 / other["n"])
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"row 3 has 41 images right .* another row has 40"):
        load_results(file)


def test_the_finished_part_of_an_evaluation_is_refused_where_it_was_changed(tmp_path: Path) -> None:
    identity = Fingerprint("weights", "images", {"eps": 0.1})
    kept, batch = FinishedBatches(tmp_path, identity), torch.arange(4)
    kept.save("pgd", batch, torch.tensor([1.0, 0.0, 1.0, 1.0]), Violations())
    assert kept.load("pgd", batch) is not None
    (file,) = tmp_path.rglob("pgd-*.json")
    file.write_text(file.read_text().replace("0.0", "1.0", 1))
    with pytest.raises(ValueError, match=r"cannot be read .*changed after it was written"):
        kept.load("pgd", batch)


def test_an_unfinished_merge_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = add_results(tmp_path / "eval.json", [result("clean", 90)])
    ours = file.read_text()
    file.write_text(ours.replace("    {\n", "<<<<<<< HEAD\n    {\n", 1))
    assert main(["report", str(file)]) == 2
    assert "has the marks of a merge, '<<<<<<<', which must be finished" in capsys.readouterr().err
    file.write_text(ours[:-20])
    with pytest.raises(ValueError, match="it is not valid JSON") as told:
        load_results(file)
    assert "marks of a merge" not in str(told.value)


def test_damaged_worst_images_are_named(tmp_path: Path) -> None:
    images = torch.rand(3, 1, 8, 8)
    numbers = torch.arange(3)
    worst = WorstImages(images, images, numbers, numbers, *(torch.rand(3),) * 2, numbers)
    file = worst.save(tmp_path / "worst.npz")
    content = file.read_bytes()
    random.seed(0)
    for _ in range(300):
        damaged = bytearray(content)
        damaged[random.randrange(len(damaged))] ^= 1 << random.randrange(8)
        file.write_bytes(damaged)
        try:
            found = WorstImages.load(file)
        except ValueError as error:
            assert "worst.npz" in str(error)
        else:
            assert np.array_equal(found.originals.numpy(), images.numpy())


def test_names_that_are_formulas_stay_text_in_a_spreadsheet(tmp_path: Path) -> None:
    formula = '=HYPERLINK("http://example.org")'
    one = result("pgd-20", 40)
    subject = replace(one.subject, network=formula, checkpoint="@step", data="+digits", run="")
    add_results(tmp_path / "-eval.json", [replace(one, subject=subject)])
    out = tmp_path / "report"
    assert main(["report", str(tmp_path / "-eval.json"), "--out", str(out)]) == 0
    (line,) = csv.DictReader(io.StringIO((out / "report.csv").read_text()))
    assert line["network"] == f"'{formula}"
    assert (line["run"], line["checkpoint"], line["data"]) == ("'-eval.json", "'@step", "'+digits")
    assert float(line["correct"]) == 40
    assert csv_cell(-1.5) == -1.5 and csv_cell(None) == "" and csv_cell("a=b") == "a=b"
