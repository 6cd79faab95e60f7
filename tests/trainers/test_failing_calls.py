"""Whichever call of the operating system fails, a run's files are the old ones or the new ones, and whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from failing_calls import each_call_failing

from fastadv.sweeps import Plan, parse_grid
from fastadv.trainers.checkpoint import LATEST, find_checkpoint, load_checkpoint, save_checkpoint
from fastadv.trainers.run_directory import Description, RunDirectory


def save(folder: Path, step: int, value: float) -> None:
    save_checkpoint(folder, step, {"w": torch.tensor(value)}, {"value": value}, {})


def value_of(folder: Path, which: str) -> float:
    found = load_checkpoint(find_checkpoint(folder, which))
    assert found.train_state["value"] == found.weights["w"].item()
    return found.weights["w"].item()


@pytest.mark.parametrize("step", [2, 3])
def test_a_checkpoint_is_the_old_or_the_new_one(step: int, tmp_path: Path) -> None:
    """Step 2 is there already, as in a run that has gone back to an earlier checkpoint."""
    failures = []
    for number, call in enumerate(each_call_failing()):
        folder = tmp_path / str(number)
        save(folder, 1, 1.0)
        save(folder, 2, 2.0)
        try:
            with call.at_work():
                save(folder, step, 5.0)
        except OSError as error:
            failures.append(call.failed)
            assert "No space left on device" in str(error) and str(folder) in str(error)
            assert value_of(folder, LATEST) in (2.0, 5.0)
            assert value_of(folder, "step_000002") in ((2.0, 5.0) if step == 2 else (2.0,))
        else:
            assert value_of(folder, LATEST) == 5.0
        save(folder, 4, 6.0)
        assert value_of(folder, LATEST) == 6.0
    assert len(failures) > 9 and any(name.startswith("replace") for name in failures)


def test_a_record_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    for number, call in enumerate(each_call_failing()):
        folder = tmp_path / str(number)
        run, plan = RunDirectory(folder / "run"), folder / "sweep" / "sweep.json"
        for rate in (0.1, 0.2):
            grid = parse_grid(["lr=.1" if rate == 0.1 else "lr=.1,.2", "seed=7"])
            try:
                with call.at_work() if rate == 0.2 else pytest.MonkeyPatch.context():
                    run.begin(Description("standard", {"lr": rate}, {}, {}, {}), {})
                    Plan(plan.parent, "standard", (), (), grid).save()
            except OSError as error:
                assert "run.json cannot" in str(error) or "sweep.json cannot" in str(error)
        rates = json.loads(plan.read_text())["grid"]["lr"]
        assert run.read().recipe["lr"] in ((0.1, 0.2) if call.failed else (0.2,))
        assert len(rates) in ((1, 2) if call.failed else (2,))
