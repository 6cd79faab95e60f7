"""The functions of torch that a recording refuses or leaves out, and the kinds of arguments that it keeps."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastadv.engine.operands import tensors_in
from fastadv.engine.recording import ArrayArgument
from fastadv.engine.watched_size import WatchedSize

# Functions that hand a tensor's values to Python, which may then do anything with them.
READS = frozenset(
    ("__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__", "__array__",
     "item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "data_ptr", "__dlpack__", "__format__",
     "__repr__", "storage", "untyped_storage", "_local_scalar_dense", "_nnz")
)  # fmt: skip
# Functions that a recording refuses, each with the reason.
REFUSED = {
    "register_hook": "its forward registers a hook on a tensor",
    "backward": "its forward takes gradients of its own",
    "grad": "its forward takes gradients of its own",
}
# Why a result is refused that no recorded function has made.
UNSEEN = (
    "its forward runs operations that cannot be seen, such as scripted code, a transform of torch.func, or a "
    "subclass of Tensor"
)
# Functions that compute nothing.
NO_OPERATION = frozenset(("requires_grad_", "retain_grad", "_assert", "_set_grad_enabled"))

# Types of arguments that a recording keeps as they are; KEPT are those that need no further check.
ARGUMENTS = (int, float, complex, str, type(None), type(...), torch.dtype, torch.device, torch.layout,
             torch.memory_format)  # fmt: skip
KEPT = frozenset((*ARGUMENTS, bool))
# Types of arguments that stand for code.
CODE = (nn.Module, types.FunctionType, types.MethodType, functools.partial)
# Functions that return a size.
SIZES = frozenset(("size", "numel", "nelement"))
# Properties of a tensor that are tensors.
TENSOR_PROPERTIES = frozenset(("T", "mT", "H", "mH", "data", "real", "imag"))


def name_of(function: Any) -> str:
    """The name of a function of torch, that of its operator for an overload such as ``aten.add.Tensor``."""
    name: str = getattr(function, "__name__", "")
    return name.partition(".")[0] if isinstance(function, torch._ops.OpOverload) else name


def plain_argument(value: object) -> Any:
    """An argument that is no container, in the form in which a recording keeps it; None if it keeps none."""
    if isinstance(value, WatchedSize):
        return value.plain()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return ArrayArgument.of(value)
    if isinstance(value, range):
        return list(value)
    return value if isinstance(value, ARGUMENTS) else None


def targets_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors into which a function writes, as far as its name tells, such as ``add_`` or ``__setitem__``."""
    values = args[:1] if _is_in_place(name) and name not in NO_OPERATION else ()
    return tensors_in((*values, kwargs.get("out")))


def may_write(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether a function may write into one of its arguments, as far as its name and keywords tell."""
    return _is_in_place(name) or "out" in kwargs


def _is_in_place(name: str) -> bool:
    return name in _WRITES or (name.endswith("_") and not name.endswith("__"))


def uncounted(
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    result: Any,
    depends: Callable[[Tensor], bool],
) -> list[Tensor]:
    """The tensors that a function has changed though torch counts no write to them.

    It counts no writes to tensors made in inference mode. Such a tensor may be changed if it is the result. Torch
    does not count either that a tensor is cut out of the graph of its gradients.

    Args:
        name: of the function.
        args: its positional arguments.
        kwargs: its arguments by keyword.
        result: its result.
        depends: whether a tensor depends on the images; others have no gradient, and keep their values.
    """
    if name == "detach_":
        return [t for t in tensors_in(args[:1]) if depends(t)]
    returned = [t for t in tensors_in(args[:1]) if t is result and depends(t)]
    targets = targets_of(name, args, kwargs) or returned
    return [t for t in targets if t.is_inference()]


_OPERATORS = ("add", "sub", "mul", "truediv", "div", "floordiv", "mod", "pow", "and", "or", "xor")
_WRITES = frozenset(("__setitem__", *(f"__i{name}__" for name in _OPERATORS)))
