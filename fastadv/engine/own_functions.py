"""Recognise the autograd functions of others by the Python frames of their forward methods."""

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
