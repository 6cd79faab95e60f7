"""Notice what happens below the functions of torch that a recording sees.

Scripted code and other people's C++ code run operators of torch that no `TorchFunctionMode` sees. A copy would not
run them. Their results mostly show that they are unseen, since they have a gradient. Without a gradient they look
like weights, and what is written in place shows nothing. A `TorchDispatchMode` sees each operator that runs.
Modes of others at that level, and hooks of saved tensors, change results or gradients of functions that are seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import (
    BuiltinFunctionType,
    MethodDescriptorType,
    MethodWrapperType,
    WrapperDescriptorType,
)
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from fastadv.engine.operands import tensors_in

# The packages whose modes and hooks compute what is computed without them.
_WITHOUT_EFFECT = ("torch", "fastadv")
_BUILT_IN = (BuiltinFunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType)
_LAYERS = frozenset(f for f in vars(F).values() if getattr(f, "__module__", "") == F.__name__)


class UnseenOperations(TorchDispatchMode):
    """Watches the operators that the calling thread runs.

    Args:
        is_seen: whether the operator that runs now is part of a function that has been seen.
        depends: whether a tensor depends on the images.
        note: called for each operator on such tensors that is not part of a function that has been seen.
    """

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Do not wrap the method below, at whose first call torch would import its compiler for a second."""
        return False

    def __init__(
        self,
        is_seen: Callable[[], bool],
        depends: Callable[[Tensor], bool],
        note: Callable[[], object],
    ) -> None:
        super().__init__()
        self._is_seen, self._depends, self._note = is_seen, depends, note

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operator."""
        kwargs = kwargs or {}
        if not self._is_seen() and any(map(self._depends, tensors_in((args, kwargs)))):
            self._note()
        return func(*args, **kwargs)


def unwatched(function: Any, operands: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """A context for a function that is seen, in which `UnseenOperations` spends no time on its operators.

    Subclasses of tensors, modes of others and functions that run torch's compiler, such as `torch.cond`, need what
    the context switches off.
    """
    is_simple = isinstance(function, _BUILT_IN) or function in _LAYERS
    if not is_simple or torch._C._len_torch_dispatch_stack() != 1:
        return nullcontext()
    is_plain = all(type(operand) in (Tensor, torch.nn.Parameter) for operand in operands)
    return torch._C._DisableTorchDispatch() if is_plain else nullcontext()


def others_below() -> str | None:
    """The name of what others have entered below torch's functions; None where there is nothing.

    That is a `TorchDispatchMode`, which may change every result, or `saved_tensors_hooks`, which may change every
    gradient.
    """
    if torch._C._len_torch_dispatch_stack():
        for mode in _get_current_dispatch_mode_stack():
            if type(mode) is not UnseenOperations and is_of_others(type(mode)):
                return type(mode).__name__
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is not None and any(map(is_of_others, hooks)):
        return "saved_tensors_hooks"
    return None


def is_of_others(code: object) -> bool:
    """Whether a class or a function is neither torch's nor this package's."""
    return (getattr(code, "__module__", None) or "").split(".")[0] not in _WITHOUT_EFFECT
