"""A pytest plugin that makes Triton's interpreter round to bfloat16 as a GPU does.

Triton 3.6's interpreter cuts the lower bits off where the hardware rounds to the nearest number.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast = InterpreterBuilder.cast_impl


def _rounding_cast(builder: InterpreterBuilder, source: Any, dtype: Any) -> Any:
    if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
        rounded = torch.from_numpy(source.data.copy()).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
    return _cast(builder, source, dtype)


InterpreterBuilder.cast_impl = _rounding_cast
