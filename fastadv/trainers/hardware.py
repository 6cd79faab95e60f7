"""Where a run computes, and in which number format."""

from __future__ import annotations

import torch

from fastadv.engine.precision import fast_bf16


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype for autocast, or None for plain float32.

    Args:
        precision: "auto", "fp32" or "bf16"; "auto" is bfloat16 where the device computes it
            faster than float32.
        device: where the passes run.

    Raises:
        ValueError: for another precision.
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"precision must be 'auto', 'fp32' or 'bf16', got {precision!r}")
    if precision == "fp32" or (precision == "auto" and not fast_bf16(device)):
        return None
    return torch.bfloat16


def choose_device(device: torch.device | str | None) -> torch.device:
    """Return the device to use: the one asked for, or a GPU if there is one, or the CPU.

    Raises:
        ValueError: if there is no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen, dtype=torch.float32)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the latter
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(device)!r} cannot be used here: {reason}") from error
    return chosen
