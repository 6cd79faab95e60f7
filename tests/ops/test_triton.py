"""The Triton kernels against the reference on CPU tensors, under Triton's interpreter.

The interpreter has to be chosen before triton is imported, hence the process of its own. It runs the tests of
test_ops.py and test_pgd_step.py that are marked `interpreter`, which tell most about a kernel, and those of
triton_large_samples.py.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import pytest
from paths import ROOT, environment

FILES = (
    "tests/ops/test_ops.py",
    "tests/ops/test_pgd_step.py",
    "tests/helpers/triton_large_samples.py",
)
FEWEST = 200  # tests: fewer than now, so that some may go, and more than a mark that is lost leaves


@pytest.mark.slow
@pytest.mark.longest
@pytest.mark.processes
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "triton_interpreter", "-p", "no:cacheprovider"]
    command += ["--no-header", "--tb=short", *FILES]
    done = subprocess.run(
        command,
        env=environment(TRITON_INTERPRET="1"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    summary = f"{' '.join(command)}\n{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    assert done.returncode == 0, summary
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) >= FEWEST, summary
