"""The benchmark of AutoAttack by three searches."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import evaluation

from fastadv.evaluation import AutoAttackResult, Stage

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pytest.importorskip("pyautoattack")
    words = ["evaluation.py", "--quick", "--attacks", "apgd-ce", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    evaluation.main()
    found = json.loads((tmp_path / "evaluation_digits.json").read_text())
    assert [row["search"] for row in found["results"]] == list(evaluation.SEARCHES)
    for row in found["results"]:
        assert row["n"] == 16 and row["robust"] == row["stages"]["apgd-ce"]["left"]
        assert row["seconds"] == pytest.approx(sum(row["parts"])) and len(row["parts"]) == 2
    assert "found alone" in capsys.readouterr().out


def test_an_image_that_one_search_alone_has_broken_counts_for_it() -> None:
    def result(*robust: bool) -> list[tuple[float, AutoAttackResult]]:
        flags = torch.tensor(robust)
        stages = (Stage("apgd-ce", int(flags.sum()), seconds=1.0),)
        nothing = torch.empty(0)
        return [(2.0, AutoAttackResult(flags, nothing, nothing, stages, "ok", (), 0, 4, 2.0))]

    rows = evaluation.summary_of(
        {"a": result(False, True, False), "b": result(False, True, True), "c": result(*[True] * 3)}
    )
    assert [(row.robust, row.alone) for row in rows] == [(1, 1), (2, 0), (3, 0)]


def test_claims_are_held_against_the_network() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)).eval()
    x = torch.rand(2, 1, 2, 2)
    y = model(x).argmax(1)
    flags, rows = torch.tensor([False, True]), torch.tensor([0])
    claim = AutoAttackResult(flags, rows, x[:1], (), "ok", (), 0, 4, 1.0)
    with pytest.raises(RuntimeError, match="not adversarial"):
        evaluation.check(model, x, y, claim, {"eps": 0.1, "norm": "linf"})
