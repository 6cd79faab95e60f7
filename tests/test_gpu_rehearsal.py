"""Code for GPUs on the pretended GPU of gpu_rehearsal, which takes the place of CUDA in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_rehearsal.build import HERE, build, missing
from paths import ROOT, environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.longest,
    pytest.mark.processes,
    pytest.mark.skipif(missing() is not None, reason=f"{missing()}"),
]

OWN = sorted(f"tests/gpu_rehearsal/{path.name}" for path in HERE.glob("rehearsed_*.py"))
FOR_GPUS = ["tests/attacks/test_gpu_attacks.py", "tests/trainers/test_gpu_training.py"]
# The part of them that every run has, as an expression of pytest's -k.
CHOSEN = (
    "rehearsed or does_not_wait or order_of or failed_recording or ghosts or nothing_that_changes "
    "or (bits and (pgd-linf or cw-l2)) or (first_loss and (arrest or las_at)) or (resumed and arrest)"
)


def test_each_stage_of_the_script_for_gpus_ends_in_order(
    pytestconfig: pytest.Config, tmp_path: Path
) -> None:
    if not pytestconfig.option.thorough:
        pytest.skip("takes minutes; runs with --thorough")
    build()
    everywhere = str(HERE / "everywhere")
    found = environment(PYTHON=sys.executable, PYTEST_PLUGINS="gpu_rehearsal.plugin")
    found["PYTHONPATH"] = os.pathsep.join((everywhere, found["PYTHONPATH"]))
    found["PATH"] = os.pathsep.join((everywhere, found["PATH"]))
    stages = ["build", "smoke", "test", "sanitize", "ops", "throughput"]
    command = ["bash", "bench/gpu.sh", "-r", "-s", "3000", str(tmp_path), *stages]
    done = subprocess.run(command, env=found, cwd=ROOT, capture_output=True, text=True)
    lines = (tmp_path / "summary.txt").read_text().split("\n")
    told = [" ".join(line.split()[:2]) for line in lines]
    # There is no NCCL for the last check of the smoke test, and no test of an op for the ops.
    passed = [f"{name} passed" for name in ("test", "memcheck", "racecheck")]
    wanted = ["build passed", "smoke failed", *passed, "ops failed", "throughput passed"]
    assert told[1:-1] == wanted, done.stdout[-8000:]
    assert "refused: pgd_step_: it has no test" in done.stdout
    failed = json.loads((tmp_path / "smoke.json").read_text())["checks"]
    assert [name for name, check in failed.items() if not check["passed"]] == ["parallel"]
    assert "GPU rehearsal:" not in (tmp_path / "log.txt").read_text()


def test_tests_for_gpus_pass_on_the_pretended_gpu(pytestconfig: pytest.Config) -> None:
    build()
    command = [sys.executable, "-m", "pytest", "-p", "gpu_rehearsal.plugin", "--no-header"]
    command += ["-p", "no:cacheprovider", "--tb=short", *OWN, *FOR_GPUS]
    command += [] if pytestconfig.option.thorough else ["-k", CHOSEN]
    done = subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=3600
    )
    told = f"{' '.join(command)}\n{done.stdout[-8000:]}\n{done.stderr[-4000:]}"
    assert done.returncode == 0, told
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and "skipped" not in done.stdout.splitlines()[-1], told
    assert int(passed[1]) >= 40, told  # none is left out by an expression that fits no longer
