"""The first check on a GPU, rehearsed on the CPU: it passes where all is well, and fails where it must."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import gpu_smoke
from arrangements import Task
from throughput import make_task

CPU = torch.device("cpu")


@pytest.fixture
def task() -> Task:
    return make_task("small_cnn", 4, 2, CPU, (3, 8, 8))


def rehearse(
    monkeypatch: pytest.MonkeyPatch, task: Task, out: Path, ops: str = "softmax_losses/dlr"
) -> tuple[int, dict[str, Any]]:
    """The program on a small network and one op; its exit status and its results."""
    monkeypatch.setattr(gpu_smoke, "make_task", lambda *_: task)
    monkeypatch.setattr(gpu_smoke, "CASES", {ops: gpu_smoke.CASES[ops]})
    monkeypatch.setattr(gpu_smoke, "HEADLINE", ("fastadv", "B2 bf16 autocast"))
    command = ["gpu_smoke.py", "--device", "cpu", "--rounds", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    status = gpu_smoke.main()
    return status, json.loads((out / "smoke.json").read_text())


def test_all_checks_pass(
    monkeypatch: pytest.MonkeyPatch,
    task: Task,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, found = rehearse(monkeypatch, task, tmp_path)
    assert status == 0 and "\nPASS\n" in capsys.readouterr().out
    assert list(found["checks"]) == ["build", "ops", "graph", "arrest", "parallel"]
    assert set(found["headline"]["images_per_second"]) == {"fastadv", "B2 bf16 autocast"}


def test_one_wrong_op_fails_and_the_rest_still_runs(
    monkeypatch: pytest.MonkeyPatch,
    task: Task,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = gpu_smoke.run

    def wrong(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(result + 1 for result in right(*arguments))

    monkeypatch.setattr(gpu_smoke, "run", wrong)
    status, found = rehearse(monkeypatch, task, tmp_path)
    assert status == 1 and "\nFAIL\n" in capsys.readouterr().out
    passed = {name: check["passed"] for name, check in found["checks"].items()}
    assert passed == {"build": True, "ops": False, "graph": True, "arrest": True, "parallel": True}
    assert "softmax_losses/dlr" in found["checks"]["ops"]["told"]


def test_the_headline_is_there_before_ranks_are_asked_that_may_not_answer(
    monkeypatch: pytest.MonkeyPatch, task: Task, tmp_path: Path
) -> None:
    def interrupted(_: Task) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_smoke, "check_parallel", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rehearse(monkeypatch, task, tmp_path)
    assert json.loads((tmp_path / "smoke.json").read_text())["headline"]["images_per_second"]


def test_a_headline_that_fails_leaves_the_checks(
    monkeypatch: pytest.MonkeyPatch, task: Task, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_smoke, "build_all", lambda *_: 1 / 0)
    status, found = rehearse(monkeypatch, task, tmp_path)
    assert status == 1 and all(check["passed"] for check in found["checks"].values())


def test_sums_of_the_ranks_that_are_wrong_are_found(
    monkeypatch: pytest.MonkeyPatch, task: Task
) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda t, *_, **__: t.mul_(2))
    with gpu_smoke.process_group("gloo"), pytest.raises(gpu_smoke.Failed, match="mean"):
        gpu_smoke.check_collectives(task)


def test_graph_that_differs_is_named(monkeypatch: pytest.MonkeyPatch, task: Task) -> None:
    right = gpu_smoke.without_graphs

    def other(attack: Any, x: Tensor) -> None:
        right(attack, x)
        attack.alpha = attack.alpha / 2

    monkeypatch.setattr(gpu_smoke, "without_graphs", other)
    with pytest.raises(gpu_smoke.Failed, match="differ"):
        gpu_smoke.check_graph(task)


def test_time_for_triton_runs_out_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "softmax_losses/dlr"
    monkeypatch.setattr(gpu_smoke, "CASES", {name: gpu_smoke.CASES[name]})
    monkeypatch.setattr(gpu_smoke, "backends_of", lambda *_: ("native", "triton"))
    assert "2 Triton calls left out" in gpu_smoke.check_ops(CPU, seconds=-1.0)
