"""A training of a table that is refused: the other rows are there, and the exit status tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastadv.cli import main
from fastadv.reproduction import Column, Item, RowSpec, registry, run_store
from fastadv.reproduction.measures import Accuracy
from fastadv.reproduction.specs import spec, spec_with_teachers
from fastadv.trainers import train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def test_a_refused_training_is_a_failure_and_a_missing_layer_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    standard = spec("standard")
    good = RowSpec("good", standard)
    layer = RowSpec("layer", spec_with_teachers("vfd", standard, layer="layer4"))
    bad = RowSpec("bad", spec("pgd_at"))

    def refusing(method: Any, *others: Any, **options: Any) -> Any:
        if method.name == "pgd_at":
            raise TypeError("an option that fits no more")
        return train(method, *others, **options)

    monkeypatch.setattr(run_store, "train", refusing)

    def status(*rows: RowSpec) -> int:
        item = Item("act", "table9", "Clean accuracy", rows, (Column("Clean", Accuracy()),))
        monkeypatch.setattr(registry.act, "items", lambda: [item])
        words = ["--scale", "tiny", "--out", str(tmp_path), "--device", "cpu", "--quiet", "--json"]
        return main(["reproduce", "act/table9", *words])

    assert status(good, layer) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["failures"] == [] and found["cells"][0][0]["mean"] > 0
    assert "cannot run: method vfd refuses: layer must be" in found["cells"][1][0]["reason"]
    assert status(good, bad) == 2
    found = json.loads(capfd.readouterr().out)
    assert "cannot run: method pgd_at refuses: " in found["cells"][1][0]["reason"]
    assert len(found["failures"]) == 1 and "an option that fits no more" in found["failures"][0]
    assert found["cells"][0][0]["mean"] > 0
