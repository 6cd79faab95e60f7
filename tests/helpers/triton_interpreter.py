"""A pytest plugin for a process with Triton's interpreter: which tests run there, and how it computes.

It keeps tests marked `interpreter`, on the backend "triton", for the parameters that `when` of the mark accepts.

It makes the interpreter compute with bfloat16 as a GPU does. Triton 3.6's interpreter cuts the lower bits off
where the hardware rounds to the nearest number. It multiplies matrices of bfloat16 as if their bits were integers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton.language as tl
from marks import accepted, parameters
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast = InterpreterBuilder.cast_impl
_dot = InterpreterBuilder.create_dot


def _rounding_cast(builder: InterpreterBuilder, source: Any, dtype: Any) -> Any:
    if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
        rounded = torch.from_numpy(source.data.copy()).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
    return _cast(builder, source, dtype)


def _widening_dot(builder: InterpreterBuilder, a: Any, b: Any, *others: Any) -> Any:
    if a.dtype.scalar == tl.bfloat16:
        a, b = (_cast(builder, t, tl.float32) for t in (a, b))
    return _dot(builder, a, b, *others)


InterpreterBuilder.cast_impl = _rounding_cast
InterpreterBuilder.create_dot = _widening_dot


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, others = [], []
    for item in items:
        mark = item.get_closest_marker("interpreter")
        place = [
            parameters(item).get(key, own) for key, own in (("device", "cpu"), ("name", "triton"))
        ]
        chosen = mark is not None and place == ["cpu", "triton"] and accepted(item, mark)
        (kept if chosen else others).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=others)
