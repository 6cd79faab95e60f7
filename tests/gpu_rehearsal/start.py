"""Starts the pretended GPU in this process, and gives it the kernels that fastadv has for GPUs."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from gpu_rehearsal.build import build, torch_folder

with_torch = False  # whether the import of torch starts it; see everywhere/sitecustomize.py


def start() -> None:
    """Start it, before torch is imported: on its import torch asks for the devices, once."""
    if with_torch:
        import torch  # noqa: F401

        return
    if "torch" in sys.modules:
        raise RuntimeError("the pretended GPU must be started before torch is imported")
    finish(load(build()))


def load(library: Path) -> ctypes.CDLL:
    """Load the compiled library into this process, which has not imported torch."""
    ctypes.CDLL(str(torch_folder() / "lib" / "libtorch_cpu.so"))
    return ctypes.CDLL(str(library))


def finish(library: ctypes.CDLL) -> None:
    """Make torch, which is imported now, use the library."""
    from gpu_rehearsal import torch_cuda

    torch_cuda.start(library)
    from cuda_emulator.build import ops as ops_in_cuda

    torch_cuda.own_kernels(ops_in_cuda())
    from fastadv.ops import registry

    torch_cuda.own_kernels(registry._TRITON_OWNED)
