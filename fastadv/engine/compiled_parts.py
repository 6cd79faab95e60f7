"""Recognise modules and functions that `torch.compile` has made."""

from __future__ import annotations

import sys

from torch import nn


def is_compiled_wrapper(part: object) -> bool:
    """Whether `torch.compile` has made a module of another one.

    torch's compiler takes a second to import. Where nobody has imported it, there is no such module.
    """
    dynamo = sys.modules.get("torch._dynamo")
    kind = getattr(dynamo, "OptimizedModule", None)
    return kind is not None and isinstance(part, kind)


def has_compiled_parts(model: nn.Module) -> bool:
    """Whether `torch.compile` has made a part of a model, in place or as a wrapper."""
    return any(
        is_compiled_wrapper(part) or part._compiled_call_impl is not None
        for part in model.modules()
    )
