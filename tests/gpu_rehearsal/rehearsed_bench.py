"""The first check on a GPU, on the pretended one: with a small network and one op."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import gpu_smoke
from throughput import make_task


def test_all_checks_but_nccl_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    task = make_task("small_cnn", 4, 2, torch.device("cuda"), (3, 8, 8))
    monkeypatch.setattr(gpu_smoke, "make_task", lambda *_: task)
    chosen = {name: gpu_smoke.CASES[name] for name in ("softmax_losses/dlr", "pgd_step/l2")}
    monkeypatch.setattr(gpu_smoke, "CASES", chosen)
    monkeypatch.setattr(gpu_smoke, "HEADLINE", ("fastadv", "B2 bf16 autocast"))
    command = ["gpu_smoke.py", "--rounds", "1", "--triton-seconds", "-1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    assert gpu_smoke.main() == 1
    found = json.loads((tmp_path / "smoke.json").read_text())
    told = {name: check["told"] for name, check in found["checks"].items() if not check["passed"]}
    assert set(told) == {"parallel"} and "NCCL" in told["parallel"], told
    assert found["checks"]["graph"]["told"].startswith("engine graph")
    assert set(found["headline"]["images_per_second"]) == {"fastadv", "B2 bf16 autocast"}


def test_ops_are_measured_until_the_time_is_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import ops

    monkeypatch.setattr(ops, "failures", lambda *_: {})  # those of Triton fail without a GPU
    options = ["--quick", "--device", "cuda", "--rows", "pgd_step_/linf", "--backend", "native"]
    for seconds, status in ((600, 0), (0, "nothing was measured")):
        command = ["ops.py", *options, "--seconds", str(seconds), "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", command)
        if status == 0:
            assert ops.main() == 0
        else:
            with pytest.raises(SystemExit, match=str(status)):
                ops.main()
            assert "left out, as the time is over" in capsys.readouterr().out
    found = json.loads((tmp_path / "ops_cuda_quick_part.json").read_text())
    names = {entry["params"]["name"] for entry in found["benchmarks"]}
    assert {"native", "reference", "copy"} <= names
