"""The report of an evaluation: written and read back, and shown as tables."""

from __future__ import annotations

import csv
import io
import json

import pytest
from linear_model import linear_problem

from fastadv.evaluation import Report, Row, Stage, evaluate


@pytest.fixture
def report() -> Report:
    rows = (
        Row("clean", 200, 190, 0.0, 7, 0.25),
        Row("pgd-20", 200, 100, 8 / 255, 7, 1.5, alpha=2 / 255, steps=20),
        Row("autoattack", 200, 91, 8 / 255, 7, 60.0, status="suspect", notes=("a, b", "c"),
            stages=(Stage("apgd-ce", 95), Stage("square", 91))),
    )  # fmt: skip
    return Report(rows, "Net", "cifar10 test", batch_size=50, versions={"torch": "2.13"})


def test_report_round_trip(report, tmp_path):
    path = report.save(tmp_path / "new" / "report.json")
    assert Report.load(path) == report
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]
    content = json.loads(path.read_text())
    assert content["rows"][1]["accuracy"] == 0.5
    assert content["rows"][1]["interval"] == pytest.approx([0.4313609, 0.5686391], abs=1e-6)


def test_an_evaluated_report_round_trips(tmp_path):
    model, x, y = linear_problem(classes=2, n=20)
    report = evaluate(model, (x, y), ("clean", "pgd-2"), eps=0.01, progress=False)
    assert Report.load(report.save(tmp_path / "r.json")) == report
    assert report["pgd-2"].alpha == 0.0025 and report["pgd-2"].steps == 2


def test_report_tables(report):
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert [row["name"] for row in rows] == ["clean", "pgd-20", "autoattack"]
    assert float(rows[2]["accuracy"]) == 0.455 and rows[2]["notes"] == "a, b; c"
    assert rows[0]["alpha"] == "" and rows[1]["steps"] == "20"
    table = report.table().splitlines()
    head, rule, *body = table[2:7]
    assert [part for part in rule.split("  ") if part.strip("-")] == []
    assert "43.14 to 56.86" in body[1] and "8/255" in body[1] and body[2].endswith("suspect")
    words = ["status", "ok", "ok", "suspect"]
    assert len({line.index(word) for line, word in zip([head, *body], words, strict=True)}) == 1
    assert "autoattack: 47.50 % after apgd-ce, 45.50 % after square" in table
    assert "| autoattack | 45.50 |" in report.markdown()
    assert str(report) == report.table()


def test_report_files_and_errors(report, tmp_path):
    for suffix, text in (
        (".csv", report.to_csv()),
        (".md", report.markdown()),
        (".txt", report.table()),
    ):
        assert report.save(tmp_path / f"r{suffix}").read_text() == text
    with pytest.raises(ValueError, match="path must end in"):
        report.save(tmp_path / "r.pdf")
    with pytest.raises(KeyError, match="there are clean, pgd-20, autoattack"):
        report["cw"]
    (tmp_path / "other.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match=r"other\.json: report must have format 1, got 99"):
        Report.load(tmp_path / "other.json")
    (tmp_path / "broken.json").write_text(report.to_json()[:-40])
    with pytest.raises(ValueError, match=r"broken\.json"):
        Report.load(tmp_path / "broken.json")
    with pytest.raises(ValueError, match="status must be one of"):
        Row("clean", 2, 1, 0.0, 0, 0.0, status="fine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="correct must be"):
        Row("clean", 2, 3, 0.0, 0, 0.0)
