"""The time of the headline benchmark: what compiles too long is left out, and the rest is measured."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import throughput
from arrangements import COMPILED, Task
from attack_parts import parts_of_attack
from measure import at_most, interleave
from torch import nn

from fastadv.engine import cpu_convolution, replayed_program
from fastadv.engine.cpu_program import Program

CPU = torch.device("cpu")
SLOW, SKIPPED = COMPILED[:2]


def builder(seconds: float) -> Callable[[Task], Callable[[], object]]:
    """Builds an arrangement that is ready after some seconds."""

    def build(task: Task) -> Callable[[], object]:
        time.sleep(seconds)
        return lambda: None

    return build


def test_what_compiles_too_long_is_left_out_and_the_rest_is_measured() -> None:
    task = Task(nn.Identity(), torch.rand(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64), 1)
    builders = {SLOW: builder(60), SKIPPED: builder(0), "fastadv": builder(0)}
    args = SimpleNamespace(quick=False, rounds=3)
    part = throughput.compare("title", builders, task, 1.0, args, seconds=1.0)
    assert list(part["rows"]) == ["fastadv"]
    assert part["missing"][SLOW].startswith("failed (not ready after ")
    assert part["missing"][SKIPPED] == "left out after 1 s"
    whole = throughput.compare("title", {**builders, SLOW: builder(0)}, task, 1.0, args)
    assert list(whole["rows"]) == list(builders) and not whole["missing"]


def test_no_further_round_begins_when_the_time_is_over() -> None:
    runs = {"a": lambda: time.sleep(0.01), "b": lambda: None}
    found = interleave(runs, 1000, CPU, seconds=0.1)
    assert 1 <= found["a"].rounds == found["b"].rounds < 20
    assert interleave(runs, 5, CPU, seconds=-1.0)["a"].rounds == 1


def test_an_alarm_rings_once_and_never_late() -> None:
    with pytest.raises(TimeoutError, match="not ready after"), at_most(0.01):
        time.sleep(10)
    with at_most(0.05):
        pass
    time.sleep(0.1)


@pytest.mark.skipif(not cpu_convolution.available(), reason="programs need the compiled part")
@pytest.mark.parametrize("worth", [0.0, float("inf")])
def test_the_parts_of_an_attack_are_timed(worth: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replayed_program, "_WORTH", worth)
    plain, own = Program.forward, []
    monkeypatch.setattr(
        Program, "forward", lambda self, x: own.append(len(x) == 6) or plain(self, x)
    )
    counts = []
    for rounds in (1, 4):
        own.clear()
        task = throughput.make_task("small_cnn", 6, 1, CPU, (1, 8, 8))
        name, times = parts_of_attack(task, rounds, "fp32")
        counts.append(sum(own))
        assert times["forward"].rounds == times["input gradient"].rounds == rounds
    replayed, too_little = "replayed from the calls", "not replayed: a replay would save too little"
    assert name.startswith("fused program in fp32, " + (replayed if worth == 0 else too_little))
    # Of the timed passes a replayed one leaves the program's own code out.
    assert counts[1] - counts[0] == (0 if worth == 0 else 3)


def test_the_parts_of_an_attack_on_a_live_model_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastadv.engine.selection.candidates", lambda *_: iter(()))
    task = throughput.make_task("small_cnn", 6, 1, CPU, (1, 8, 8))
    with pytest.warns(UserWarning, match="eager engine"):
        name, times = parts_of_attack(task, 1, "bf16")
    assert name.startswith("live model")
    assert {"forward and input gradient", "update"} <= set(times)
