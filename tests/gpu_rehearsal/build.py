"""Compiles the pretended GPU into a library, without importing torch, which must find it loaded."""

from __future__ import annotations

import functools
import importlib.util
import platform
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

from compiled import FOLDER, kept, version_of

HERE = Path(__file__).resolve().parent


def missing() -> str | None:
    """Why this machine cannot rehearse, or None."""
    if platform.system() != "Linux" or shutil.which("g++") is None:
        return "needs g++ on Linux"
    if version()["cuda"] is not None:
        return "needs a torch without CUDA, whose place the pretended GPU takes"
    return None


@functools.cache
def torch_folder() -> Path:
    """Where torch lies."""
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


@functools.cache
def version() -> dict[str, Any]:
    """The facts of ``torch.version``."""
    return runpy.run_path(str(torch_folder() / "version.py"))


def build(results: Path = FOLDER / "gpu_rehearsal") -> Path:
    """Compile the library, or take what an earlier call compiled from the same sources.

    Raises:
        RuntimeError: g++ fails.
    """
    units = sorted(HERE.glob("*.cpp"))
    headers = torch_folder() / "include"
    # Torch's headers take most of the time, so that one unit includes all others; and of the operators' headers
    # it has those that it names.
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-Wall", "-fvisibility=hidden", "-shared"]
    command += ["-DAT_PER_OPERATOR_HEADERS", f"-I{HERE}"]
    for place in (headers, headers / "torch/csrc/api/include"):
        command += ["-isystem", str(place)]
    libraries = [f"-L{torch_folder() / 'lib'}", "-ltorch_cpu", "-lc10"]
    ours = [path.read_text() for path in (*sorted(HERE.glob("*.h")), *units)]

    def make(made: Path) -> None:
        whole = made.with_suffix(".cpp")
        whole.write_text("".join(f'#include "{unit.name}"\n' for unit in units))
        try:
            _run([*command, "-o", str(made), str(whole), *libraries])
        finally:
            whole.unlink()

    facts = [str(command), str(libraries), version_of("g++"), version()["__version__"]]
    return kept(results / "gpu_rehearsal.so", [*facts, *ours], make)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-8000:]}")
