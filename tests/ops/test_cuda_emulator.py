"""The CUDA C++ kernels on CPU tensors, under the emulator of cuda_emulator.

It takes the place of the C++ kernels of the CPU, hence a process of its own. There the tests of test_ops.py and of
the ops' own files that run the backend "native" run the CUDA kernels.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from compiled import FOLDER
from cuda_emulator.build import CSRC, build, launches, missing, ops
from cuda_emulator.plugin import LAUNCHED, REORDERED
from paths import ROOT, environment

FILES = (
    "test_ops.py",
    "test_angular_distance.py",
    "test_euclidean_distance.py",
    "test_momentum_update.py",
    "test_noisy_replay.py",
    "test_pgd_step.py",
    "test_pgd_step_l1.py",
    "test_random_start.py",
    "test_vanilla_feature_distillation.py",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.longest,
    pytest.mark.processes,
    pytest.mark.skipif(missing() is not None, reason=f"needs {missing()}"),
]


def test_every_kernel_on_the_emulator(tmp_path: Path) -> None:
    library = build(tmp_path, FOLDER / "cuda_emulator")
    command = [sys.executable, "-m", "pytest", "-p", "cuda_emulator.plugin"]
    command += [f"--emulator-library={library}", "-p", "no:cacheprovider", "--no-header"]
    command += ["--tb=short", *(f"tests/ops/{file}" for file in FILES)]
    done = subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=1200
    )
    summary = f"{' '.join(command)}\n{done.stdout[-8000:]}\n{done.stderr[-4000:]}"
    assert done.returncode == 0, summary
    launched = re.search(rf"^{LAUNCHED}(.*)$", done.stdout, re.MULTILINE)
    assert launched is not None, summary
    assert set(launched[1].split(", ")) == launches()
    reordered = re.search(rf"^{REORDERED}(\d+)$", done.stdout, re.MULTILINE)
    assert reordered is not None and int(reordered[1]) >= 2 * len(ops()), summary


@pytest.mark.parametrize(
    ("file", "known", "unknown"),
    [
        ("pgd_step.cu", "kLinfThreads, 0, stream>>>", "kLinfThreads, 64, stream>>>"),
        ("momentum_update.cu", "<<<blocks, threads, 0, stream>>>", "<<<blocks, threads>>>"),
        ("device.cuh", "st.global.v4.b32", "st.global.cs.v4.b32"),
        ("noisy_replay.cpp", "TORCH_LIBRARY_IMPL(fastadv, CUDA, m)", "REGISTER(fastadv, CUDA, m)"),
    ],
    ids=["shared memory", "default stream", "assembly", "registration"],
)
def test_an_unknown_form_is_refused(tmp_path: Path, file: str, known: str, unknown: str) -> None:
    sources = tmp_path / "csrc"
    shutil.copytree(CSRC, sources, ignore=shutil.ignore_patterns("cpu"))
    source = sources / "cuda" / file
    text = source.read_text()
    assert known in text
    source.write_text(text.replace(known, unknown))
    with pytest.raises(ValueError, match=re.escape(file)):
        build(tmp_path / "built", tmp_path / "results", sources)
