"""The precisions a network's passes may have, and which of them pays on a device."""

from __future__ import annotations

import os
import platform

import torch

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


_ISA_VARIABLE = "FASTADV_MAX_CPU_ISA"
_ISAS = ("AVX2", "AVX512")


def isa_limit() -> str | None:
    """The instructions that our kernels are limited to by the environment variable FASTADV_MAX_CPU_ISA.

    With ``AVX2`` or ``AVX512`` fastadv takes the processor to have these and no more, so no bfloat16. The compiled
    part reads the variable when it is loaded.

    Raises:
        ValueError: the variable has another value.
    """
    name = os.environ.get(_ISA_VARIABLE) or None
    if name is not None and name not in _ISAS:
        raise ValueError(
            f"the environment variable {_ISA_VARIABLE} must be AVX2 or AVX512, got {name!r}"
        )
    return name


def fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    if isa_limit() is not None:
        return False
    if platform.machine() == "x86_64":
        # oneDNN takes bfloat16 on any AVX-512, but emulates it where the instructions are missing.
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
