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
from measure import at_most, interleave
from torch import nn

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
