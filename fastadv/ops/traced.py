"""Calls of ops inside ``torch.compile`` with numbers that change, such as a warm-up of eps or a schedule of beta.

``torch.compile`` takes an op's float argument for a constant. It compiles anew for each new value until a limit,
at which ``fullgraph=True`` fails. Every op with float arguments therefore has a second form, ``<name>_traced``,
that takes them as float64 tensors without axes. Such a tensor is an input of the graph like any other. The second
form reads its value and calls the op.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SUFFIX = "_traced"
_FLOAT = re.compile(r"\bfloat (?=\w)")


def traced_schema(schema: str) -> str | None:
    """The schema with a tensor for each float argument; None where there is no float argument."""
    found, count = _FLOAT.subn("Tensor ", schema)
    return found if count else None


def traced_reference(overload: torch._ops.OpOverload) -> Callable[..., Any]:
    """The work of the second form of an op, on every device."""
    is_float = [str(argument.type) == "float" for argument in overload._schema.arguments]

    def run(*arguments: Any) -> Any:
        pairs = zip(arguments, is_float, strict=True)
        return overload(*[a.item() if number else a for a, number in pairs])

    return run


def changes(*numbers: float) -> bool:
    """Whether one of these numbers is not a constant of the code that ``torch.compile`` is tracing."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not all(has_static_value(number) for number in numbers)


def call(name: str, *arguments: Any) -> Any:
    """Call an op of this package by name, in the form that goes with its numbers."""
    if torch.compiler.is_compiling():
        numbers = [a for a in arguments if isinstance(a, float)]
        if changes(*numbers):
            tensors = [_as_tensor(a) if isinstance(a, float) else a for a in arguments]
            return getattr(torch.ops.fastadv, name + SUFFIX)(*tensors)
    return getattr(torch.ops.fastadv, name)(*arguments)


def _as_tensor(number: float) -> Tensor:
    # torch.compile turns a product with a tensor into tensor arithmetic. The value is read on the CPU.
    return torch.ones((), dtype=torch.float64, device="cpu") * number
