"""Code for GPUs on the pretended GPU of gpu_rehearsal, which takes the place of CUDA in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys

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
