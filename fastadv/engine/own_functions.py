"""Recognise the code of others by its Python frames: autograd functions, and questions about gradients."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.checkpoint

if TYPE_CHECKING:
    from fastadv.engine.recorder import Recorder


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


def is_checkpoint(frame: types.FrameType) -> bool:
    """Whether a frame is one of torch's checkpoints.

    In torch 2.11 a checkpoint keeps its inputs in the `grad_fn` of a tensor without elements.
    """
    return frame.f_globals.get("__name__") == torch.utils.checkpoint.__name__


@contextmanager
def sees_own_functions(recorder: Recorder, outermost: types.CodeType) -> Iterator[None]:
    """Record autograd functions as one op each, by watching the calling thread enter their forward methods.

    Args:
        recorder: of the pass that follows.
        outermost: the code that runs the pass.
    """
    if sys.getprofile() is not None:  # somebody is profiling, who is not to be disturbed
        yield
        return
    codes = forward_codes()
    calls: list[tuple[types.FrameType, Any, tuple[Any, ...]]] = []

    def watch(frame: types.FrameType, event: str, arg: Any) -> None:
        if event == "call" and not recorder.inside and id(frame.f_code) in codes:
            cls, args = own_call(frame, codes[id(frame.f_code)])
            calls.append((frame, cls, args))
            recorder.enter()
        elif event == "return" and calls and calls[-1][0] is frame:
            _, cls, args = calls.pop()
            recorder.leave()
            if arg is not None and not recorder.refusal:
                recorder.record_own_function(cls, args, arg)
        elif event == "c_call" and getattr(arg, "__name__", "") == "urandom":
            if is_importing(frame, outermost):
                return  # of a module that is needed for the first time
            recorder.refusal = "its forward draws random numbers (the system's)"

    recorder.profile = watch
    sys.setprofile(watch)
    try:
        yield
    finally:
        recorder.profile = None
        sys.setprofile(None)


def forward_codes() -> dict[int, Any]:
    """The autograd function that each forward method belongs to, by the id of its code: some code has no hash."""
    codes: dict[int, Any] = {}
    waiting = list(torch.autograd.Function.__subclasses__())
    while waiting:
        cls = waiting.pop()
        waiting.extend(cls.__subclasses__())
        code = getattr(cls.forward, "__code__", None)
        # It computes nothing: a checkpoint of torch 2.11 keeps its inputs with it.
        if code is not None and cls.__name__ != "_NoopSaveInputs":
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
