"""A pytest plugin for a process with Triton's interpreter: which tests run there, and how it computes.

It keeps tests marked `interpreter`, on the backend "triton", for the parameters that `when` of the mark accepts.

It makes the interpreter compute with bfloat16 as a GPU does. Triton 3.6's interpreter cuts the lower bits off
where the hardware rounds to the nearest number. It multiplies matrices of bfloat16 as if their bits were integers.

It spares the interpreter work without effect, over half of its time: integers computed a second time for a check
of overflow that counts in debug mode alone, and the language replaced again at each call of a function. The shape
and the name of a block's type are found once, where each tensor found them again. The type of a tuple gets a name
only if someone reads it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from marks import accepted, parameters
from triton.runtime import interpreter
from triton.runtime.interpreter import (
    InterpretedFunction,
    InterpreterBuilder,
    InterpreterOptions,
    TensorHandle,
)

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


_numpy_dtype_of_scalars = functools.cache(interpreter._get_np_dtype)


def _numpy_dtype(dtype: Any) -> Any:
    scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
    return np.dtype(np.uint64) if scalar.is_ptr() else _numpy_dtype_of_scalars(scalar)


@functools.cache
def _languages(function: Callable[..., Any]) -> list[ModuleType]:
    """The modules of the language that a function sees, which the interpreter replaces functions of."""
    seen = [value for value in function.__globals__.values() if inspect.ismodule(value)]
    return [module for module in seen if module in (tl, tl.core)]


def _call(function: InterpretedFunction[Any], *arguments: Any, **named: Any) -> Any:
    """Call a function from a kernel, with the language replaced unless the kernel's launch has done it."""
    if any(tl.core.is_builtin(language.load) for language in _languages(function.fn)):
        interpreter._patch_lang(function.fn)
    return function.rewrite()(*arguments, **named)


_block_type = tl.core.block_type.__init__


@functools.cache
def _facts_of_block_type(element: str, sizes: tuple[int, ...]) -> dict[str, Any]:
    """What a block's type has beside the type of its elements."""
    made = tl.core.block_type.__new__(tl.core.block_type)
    _block_type(made, element, list(sizes))
    return {name: value for name, value in vars(made).items() if name != "element_ty"}


def _remembered_block_type(block: Any, element: Any, shape: Any) -> None:
    block.element_ty = element
    sizes = tuple(size.value if isinstance(size, tl.constexpr) else size for size in shape)
    vars(block).update(_facts_of_block_type(str(element), sizes))


def _tuple_type(found: Any, types: Any, fields: Any = None) -> None:
    found.types, found.fields = types, fields or [""] * len(types)


def _name_of_tuple_type(found: Any) -> str:
    pairs = zip(found.fields, found.types, strict=False)
    return "[" + ",".join(f"{field}:{kind}" for field, kind in pairs) + "]"


InterpreterBuilder.cast_impl = _rounding_cast
InterpreterBuilder.create_dot = _widening_dot
InterpretedFunction.__call__ = _call
interpreter.interpreter_builder.options = InterpreterOptions(sanitize_overflow=False)
interpreter._get_np_dtype = _numpy_dtype
tl.core.block_type.__init__ = _remembered_block_type
tl.core.tuple_type.__init__ = _tuple_type
tl.core.tuple_type.name = property(_name_of_tuple_type)


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
