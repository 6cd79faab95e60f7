"""What the caller has entered, or replaced, around an attack that changes what torch's functions compute."""

from __future__ import annotations

import torch

from fastadv.engine.replaced_functions import replaced_function
from fastadv.engine.unseen_operations import is_of_others, others_below


def callers_change() -> str | None:
    """In words, what changes the results of torch's functions: a mode or a replaced function; None without one."""
    mode, function = _callers_mode(), replaced_function()
    if mode is not None:
        return f"the caller's {mode}"
    return None if function is None else f"the function that replaces {function}"


def _callers_mode() -> str | None:
    """The class of a mode, or "saved_tensors_hooks", that others have written and entered; None without one.

    A `TorchFunctionMode` or `TorchDispatchMode` may round every result, for example, and hooks of saved tensors
    may change every gradient. They see neither the fused steps of a program nor the operations that a copy has
    put together.
    """
    for mode in torch.overrides._get_current_function_mode_stack():
        if is_of_others(type(mode)):
            return type(mode).__name__
    return others_below()
