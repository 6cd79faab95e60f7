"""The code that a model runs: its forward methods, and the functions and methods that they name in turn."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fastadv.engine.networks import parts_of

_MOST_FUNCTIONS = 500


def named_by(model: object) -> Iterator[tuple[str, Any]]:
    """The variables that the code of a model or another callable names, and the functions that it may call.

    Variables are global ones and those of the functions around the code. A method is found by its name, in any
    class of which the model holds an object.

    Returns:
        Pairs of a name and a value.
    """
    is_module = isinstance(model, nn.Module)
    modules = list(model.modules()) if isinstance(model, nn.Module) else parts_of(model)
    held = [value for module in modules for value in vars(module).values()]
    held += [] if is_module else [model]
    waiting: list[Any] = [*held, *(type(value) for value in (*modules, *held))]
    kinds: dict[type, dict[str, Any]] = {}  # with their attributes
    names = {"forward", "__call__"}
    functions: set[types.FunctionType] = set()
    while waiting and len(functions) < _MOST_FUNCTIONS:
        value = waiting.pop()
        if _is_class(value):
            if value not in kinds and _is_others(value):
                kinds[value] = _attributes_of(value)
                waiting.extend(kinds[value].get(name) for name in names)
            continue
        function = _function_of(value)
        wrapped = None if function is None else inspect.unwrap(function)
        if not isinstance(wrapped, types.FunctionType) or wrapped in functions:
            continue
        if not _is_others(wrapped):
            continue
        functions.add(wrapped)
        mentioned, variables = _names_in(wrapped.__code__), wrapped.__globals__
        named = [(name, variables[name]) for name in mentioned if name in variables]
        cells = wrapped.__closure__ or ()
        named += [("a closure's variable", content_of(cell)) for cell in cells]
        yield wrapped.__name__, function
        yield from named
        for _, found in named:
            waiting += [found, found if _is_class(found) else type(found)]
        new = mentioned - names
        waiting.extend(own[name] for own in kinds.values() for name in new & own.keys())
        names |= new


def asks_for_gradients(model: nn.Module) -> bool:
    """Whether the code of a model names what tells whether gradients are computed.

    torch's own code, such as its checkpointing, asks so as well, and computes the same.
    """
    for _, value in named_by(model):
        function = _function_of(value)
        code = getattr(function, "__code__", None) if _is_others(function) else None
        if value is torch.is_grad_enabled or (code and not _QUESTIONS.isdisjoint(_names_in(code))):
            return True
    return False


def names_one_of(model: object, words: frozenset[str]) -> bool:
    """Whether the code of a model or of another callable names one of some variables, functions or attributes."""
    functions = (_function_of(value) for _, value in named_by(model))
    codes = (getattr(inspect.unwrap(f), "__code__", None) for f in functions if f is not None)
    return any(code and not words.isdisjoint(_names_in(code)) for code in codes)


_QUESTIONS = frozenset(("is_grad_enabled", "is_inference_mode_enabled", "requires_grad"))


def _attributes_of(kind: type) -> dict[str, Any]:
    """The attributes of a class, as `inspect.getattr_static` finds each; no code of the class runs."""
    homes = (*_static("__mro__", kind), *_static("__mro__", type(kind)))
    return {
        name: value for home in reversed(homes) for name, value in _static("__dict__", home).items()
    }


def _static(name: str, kind: type) -> Any:
    return type.__dict__[name].__get__(kind)


def _function_of(value: Any) -> Callable[..., Any] | None:
    """The function in a method or a partial application. Other objects are left alone: they may run code."""
    while type(value) in _AROUND:
        value = value.func if type(value) is functools.partial else value.__func__
    return value if type(value) in (types.FunctionType, functools._lru_cache_wrapper) else None


_AROUND = (types.MethodType, staticmethod, classmethod, functools.partial)


def content_of(cell: types.CellType) -> Any:
    """The value of a closure's variable; None before it is assigned."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _is_class(value: object) -> bool:
    """As `isinstance`, which a weak proxy without its object does not bear."""
    return issubclass(type(value), type)


def _is_others(code: Any) -> bool:
    """Whether a class or a function is neither torch's nor built in."""
    home = getattr(code, "__module__", None) or ""
    return home.split(".")[0] not in ("torch", "numpy", "builtins", "typing", "")


def _names_in(code: types.CodeType) -> set[str]:
    """The names of global variables and attributes in code, that of the functions within it included."""
    parts = (part for part in code.co_consts if isinstance(part, types.CodeType))
    return set(code.co_names).union(*map(_names_in, parts))
