"""Starts the pretended GPU in this process, and gives it the kernels that fastadv has for GPUs."""

from __future__ import annotations

import ctypes
import sys

from gpu_rehearsal.build import build, torch_folder


def start() -> None:
    """Start it, before torch is imported: on its import torch asks for the devices, once."""
    if "torch" in sys.modules:
        raise RuntimeError("the pretended GPU must be started before torch is imported")
    ctypes.CDLL(str(torch_folder() / "lib" / "libtorch_cpu.so"))
    library = ctypes.CDLL(str(build()))
    from gpu_rehearsal import torch_cuda

    torch_cuda.start(library)
    from cuda_emulator.build import ops as ops_in_cuda

    torch_cuda.own_kernels(ops_in_cuda())
    from fastadv.ops import registry

    torch_cuda.own_kernels(registry._TRITON_OWNED)
