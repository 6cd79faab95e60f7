"""Every program of bench/ finds what it imports, also outside of pytest, which has paths of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


@pytest.mark.slow
@pytest.mark.processes
def test_every_program_finds_its_modules() -> None:
    names = sorted(path.stem for path in BENCH.glob("*.py"))
    assert "gpu_smoke" in names
    # In a process of its own, as the modules of the tests are in this one already. And in the folder, which a
    # program has on its path.
    command = [sys.executable, "-c", IMPORT_ALL, *names]
    done = subprocess.run(command, cwd=BENCH, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
