"""What the build says, before it compiles anything, where a compiler or a fitting torch is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TORCH = """
__version__ = "{version}"
class version:
    cuda = None
def compiled_with_cxx11_abi():
    return True
"""

pytestmark = [pytest.mark.slow, pytest.mark.processes]


def _configured(folder: Path, torch: str, **environment: str) -> str:
    """The words of CMake about a build against a torch of this version."""
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(TORCH.format(version=torch))
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert cmake is not None
    words = [cmake, "-S", ROOT, "-B", folder / "build", f"-DPython_EXECUTABLE={sys.executable}"]
    environ = {**os.environ, "PYTHONPATH": str(folder), **environment}
    done = subprocess.run(words, env=environ, capture_output=True, text=True)
    assert done.returncode != 0
    return " ".join(done.stderr.split())


def test_a_missing_compiler_is_told(tmp_path: Path) -> None:
    said = _configured(tmp_path, "2.13.0+cpu", CXX="/no/compiler")
    assert "no C++ compiler was found" in said and "'/no/compiler'" in said


def test_an_old_torch_is_refused(tmp_path: Path) -> None:
    assert "needs torch >= 2.9, and" in (said := _configured(tmp_path, "2.8.1+cpu"))
    assert "has torch 2.8.1+cpu" in said
