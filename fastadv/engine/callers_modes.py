"""Modes of the caller's own that change what torch's functions compute."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

# The packages whose modes compute what is computed without them.
_WITHOUT_EFFECT = ("torch", "fastadv")


def callers_mode() -> str | None:
    """The class of a `TorchFunctionMode` or `TorchDispatchMode` that others have written and entered; or None.

    Such a mode may round every result, for example. It sees neither the fused steps of a program nor the
    operations that a copy has put together.
    """
    functions = torch.overrides._get_current_function_mode_stack()
    for mode in (*functions, *_get_current_dispatch_mode_stack()):
        kind = type(mode)
        if (kind.__module__ or "").split(".")[0] not in _WITHOUT_EFFECT:
            return kind.__name__
    return None
