"""Recognise the code of others by its Python frames: autograd functions, and questions about gradients."""

from __future__ import annotations

import inspect
import types
from typing import Any

import torch


def is_importing(frame: types.FrameType | None, outermost: types.CodeType) -> bool:
    """Whether a frame belongs to an import that began within the function of the code ``outermost``."""
    while frame is not None and frame.f_code is not outermost:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


# Properties of a tensor that tell whether it requires grad.
_ABOUT_GRADIENTS = frozenset(("requires_grad", "is_leaf", "grad_fn"))


def reads_for_itself(function: Any, frame: types.FrameType) -> bool:
    """Whether a frame that calls a function of torch asks so whether a tensor requires grad.

    torch's own code, such as FSDP's, asks so as well. Its results do not depend on the answer.
    """
    if getattr(function, "__name__", "") != "__get__":
        return False
    asked = getattr(function.__self__, "__name__", "") in _ABOUT_GRADIENTS
    return asked and not str(frame.f_globals.get("__name__", "")).startswith("torch.")


def forward_codes() -> dict[int, Any]:
    """The autograd function that each forward method belongs to, by the id of its code: some code has no hash."""
    codes: dict[int, Any] = {}
    waiting = list(torch.autograd.Function.__subclasses__())
    while waiting:
        cls = waiting.pop()
        waiting.extend(cls.__subclasses__())
        code = getattr(cls.forward, "__code__", None)
        if code is not None:
            codes.setdefault(id(code), cls)
    return codes


def own_call(frame: types.FrameType, cls: Any) -> tuple[Any, tuple[Any, ...]]:
    """The autograd function that a frame of a forward method runs, and its arguments."""
    code, variables = frame.f_code, frame.f_locals
    args = [variables[name] for name in code.co_varnames[: code.co_argcount]]
    if code.co_flags & inspect.CO_VARARGS:
        args.extend(variables[code.co_varnames[code.co_argcount + code.co_kwonlyargcount]])
    if args and isinstance(args[0], torch.autograd.function.BackwardCFunction):
        cls = getattr(type(args[0]), "_forward_cls", cls)
        args = args[1:]
    return cls, tuple(args)
