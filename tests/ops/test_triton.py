"""The Triton kernels against the reference on CPU tensors, under Triton's interpreter.

The interpreter has to be chosen before triton is imported, hence the process of its own. It runs the op tests of
test_ops.py and test_pgd_step.py that tell most about a kernel, and those of triton_large_samples.py.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
from paths import ROOT, environment

FILES = (
    "tests/ops/test_ops.py",
    "tests/ops/test_pgd_step.py",
    "tests/helpers/triton_large_samples.py",
)
# Bits where they are promised, else the budget; half precision only where a kernel handles it in its own way.
# The bisection of an l1 step takes the interpreter seconds.
CHOSEN = (
    "(same_bits and (float32 or (bfloat16 and not pgd_step/l1))) or gradcheck or parts_of or several_blocks or "
    "64_bit or vectors_may or bounds_count or (numbers_per_sample and not l1) or "
    "(usable and dtype0 and (l2 or inf)) or "
    "(within_budget and (angular_distance or replay_mask or linear_merger or pgd_step/l2 or softmax or "
    "(float64 and not crop_flip and not pgd_step/l1) or (float64 and pgd_step_/l1-masked) or "
    "(float32 and (euclidean or vanilla or attention))))"
)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "triton_rounding", "-p", "no:cacheprovider"]
    command += ["--no-header", "--tb=short", "-m", "not gpu"]
    command += ["-k", f"triton and ({CHOSEN})", *FILES]
    done = subprocess.run(
        command,
        env=environment(TRITON_INTERPRET="1"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    summary = f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    assert done.returncode == 0, f"{' '.join(command)}\n{summary}"
