"""Choosing the device and the precision of a run."""

from __future__ import annotations

import torch

from fastadv.engine.precision import fast_bf16
from fastadv.ops.values import check_device


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype for autocast, or None for plain float32.

    Args:
        precision: "auto", "fp32" or "bf16"; "auto" is bfloat16 if the device is faster in it than in float32.
        device: the device of the passes.

    Raises:
        ValueError: if the precision is unknown.
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"precision must be 'auto', 'fp32' or 'bf16', got {precision!r}")
    if precision == "fp32" or (precision == "auto" and not fast_bf16(device)):
        return None
    return torch.bfloat16


def choose_device(device: torch.device | str | None) -> torch.device:
    """Return the given device; for None a GPU if there is one, else the CPU.

    Raises:
        ValueError: if the device does not exist on this machine.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = check_device(device)
    try:
        torch.empty(0, device=chosen, dtype=torch.float32)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(f"device {str(device)!r} cannot be used here: {reason}") from error
    return chosen
