"""Arithmetic in full float32, which torch's defaults do not give on every device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Switch off every reduced-precision form of float32 arithmetic, and restore the settings on exit.

    torch keeps each setting twice, by its older names (``allow_tf32``) and its newer ones
    (``fp32_precision``), and raises when the two disagree and the older name is read. So both are set, the older
    first, because that changes the newer as well.
    """
    old_matmul = _read(torch.get_float32_matmul_precision)
    old_cudnn = _read(lambda: torch.backends.cudnn.allow_tf32)
    precisions = [(setting, setting.fp32_precision) for setting in _precision_settings()]
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        for setting, _ in precisions:
            # "none" means "as its parent says", which resolves to full precision unless the parent says not.
            if setting.fp32_precision not in ("ieee", "none"):
                setting.fp32_precision = "ieee"
        yield
    finally:
        if old_matmul is not None:
            torch.set_float32_matmul_precision(old_matmul)
        if old_cudnn is not None:
            torch.backends.cudnn.allow_tf32 = old_cudnn
        for setting, precision in precisions:
            setting.fp32_precision = precision


def _precision_settings() -> list[Any]:
    """The settings that name an operation; their parents (``cuda.all``...) only give defaults."""
    backends: Any = torch.backends  # its newer members are made at run time
    return [
        backends.cuda.matmul,
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.mkldnn.matmul,
        backends.mkldnn.conv,
        backends.mkldnn.rnn,
    ]


def _read(get: Callable[[], Any]) -> Any:
    """A setting by its older name, or None where the newer names were used and it cannot be read."""
    try:
        return get()
    except RuntimeError:
        return None
