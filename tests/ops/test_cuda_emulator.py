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
from cuda_emulator.build import CSRC, build, launches, missing
from cuda_emulator.plugin import LAUNCHED
from paths import ROOT, environment

FILES = (
    "test_ops.py",
    "test_angular_distance.py",
    "test_euclidean_distance.py",
    "test_momentum_update.py",
    "test_noisy_replay.py",
    "test_pgd_step.py",
    "test_random_start.py",
    "test_vanilla_feature_distillation.py",
)
# Where the bits must be the reference's, the budget says nothing more.
TWICE = "within_budget and float32 and (pgd_step or random_start or noisy_replay or momentum)"

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"needs {missing()}")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("cuda_emulator"))


def _run(library: Path, seed: int, chosen: str) -> str:
    """What pytest prints in a process where the CUDA kernels are emulated."""
    command = [sys.executable, "-m", "pytest", "-p", "cuda_emulator.plugin"]
    command += [f"--emulator-library={library}", f"--emulator-seed={seed}"]
    command += ["-p", "no:cacheprovider", "--no-header", "--tb=short", "-k", chosen]
    done = subprocess.run(
        [*command, *(f"tests/ops/{file}" for file in FILES)],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    summary = f"{done.stdout[-8000:]}\n{done.stderr[-4000:]}"
    assert done.returncode == 0, f"{' '.join(command)}\n{summary}"
    return done.stdout


def test_every_kernel_on_the_emulator(library: Path) -> None:
    printed = _run(library, seed=0, chosen=f"not ({TWICE})")
    launched = re.search(rf"^{LAUNCHED}(.*)$", printed, re.MULTILINE)
    assert launched is not None, printed
    assert set(launched[1].split(", ")) == launches()


def test_in_another_order_of_threads(library: Path) -> None:
    _run(library, seed=1, chosen="repetition")


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
        build(tmp_path / "built", sources)
