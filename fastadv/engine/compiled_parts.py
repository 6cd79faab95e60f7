"""Tell what `torch.compile` has made."""

from __future__ import annotations

import sys


def is_compiled_wrapper(part: object) -> bool:
    """Whether a module is what `torch.compile` makes of another one.

    torch's compiler takes a second to import. Where nobody has imported it, there is no such module.
    """
    dynamo = sys.modules.get("torch._dynamo")
    kind = getattr(dynamo, "OptimizedModule", None)
    return kind is not None and isinstance(part, kind)
