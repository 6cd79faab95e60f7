"""One check for the fields of every dataclass of settings, from their type hints.

A dataclass calls `check_fields` first in its ``__post_init__``; ranges are for it to check afterwards.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
from collections.abc import Callable, Hashable, Iterable
from functools import cache
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from fastadv.ops.values import check_bool, check_choice, integer, number, shown


def check_fields(instance: Any) -> None:
    """Check every field against its type hint, and put Python's own type in place of numpy's and of lists.

    ``bool``, ``int``, ``float`` and ``str`` take nothing but what they say (an integer is a number too),
    ``Literal`` one of its words, ``tuple`` a sequence of what it holds, a class its instances, ``Callable`` what
    can be called; ``|`` takes one of several.

    Args:
        instance: a dataclass's, frozen or not.

    Raises:
        TypeError: a field is of another type.
        ValueError: it is not one of the words it can be.
    """
    for name, hint in hints_of(cast(Hashable, type(instance))).items():
        value = getattr(instance, name)
        checked = conforming(name, value, hint)
        if checked is not value:
            object.__setattr__(instance, name, checked)


@cache
def hints_of(kind: Any) -> dict[str, Any]:
    """The type hint of each field of a dataclass; a hint that only type checkers can read is left out."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        owner = next(c for c in kind.__mro__ if field.name in inspect.get_annotations(c))
        holder = types.SimpleNamespace(__annotations__={field.name: field.type})
        try:
            found.update(get_type_hints(holder, vars(sys.modules[owner.__module__]), vars(owner)))
        except NameError:
            continue
    return found


def conforming(name: str, value: Any, hint: Any) -> Any:
    """The value as its type hint has it.

    Raises:
        TypeError: it is of another type.
        ValueError: it is not one of the words it can be.
    """
    if hint is Any:
        return value
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        check_choice(name, value, parts)
        return value
    if origin in (Union, types.UnionType):
        return _one_of(name, value, parts)
    if origin is tuple:
        return _sequence(name, value, hint)
    if hint in _SIMPLE:
        return _SIMPLE[hint](name, value)
    if isinstance(hint, type) and issubclass(hint, float):  # a number that may be written otherwise
        return number(name, value)
    is_right = callable(value) if _is_callable(hint) else isinstance(value, origin or hint)
    if not is_right:
        raise TypeError(f"{name} must be {_words(hint)}, got {shown(value)}")
    return value


def _one_of(name: str, value: Any, hints: Iterable[Any]) -> Any:
    """The value as one of several hints has it; where only one is left beside None, in its words."""
    if value is None and type(None) in hints:
        return None
    rest = [hint for hint in hints if hint is not type(None)]
    if len(rest) == 1:
        return conforming(name, value, rest[0])
    for hint in rest:
        try:
            return conforming(name, value, hint)
        except (TypeError, ValueError):
            continue
    raise TypeError(f"{name} must be {' or '.join(map(_words, hints))}, got {shown(value)}")


def _sequence(name: str, value: Any, hint: Any) -> tuple[Any, ...]:
    parts = get_args(hint)
    if not isinstance(value, tuple | list) or (parts[-1] is not ... and len(value) != len(parts)):
        raise TypeError(f"{name} must be {_words(hint)}, got {shown(value)}")
    kinds = parts[:1] * len(value) if parts[-1] is ... else parts
    found = tuple(conforming(name, item, kind) for item, kind in zip(value, kinds, strict=True))
    same = isinstance(value, tuple) and all(a is b for a, b in zip(found, value, strict=True))
    return value if same else found  # type: ignore[return-value]


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be text, got {shown(value)}")
    return value


_SIMPLE: dict[Any, Callable[[str, Any], Any]] = {
    bool: check_bool,
    int: integer,
    float: number,
    str: _text,
}


def _is_callable(hint: Any) -> bool:
    return hint is Callable or get_origin(hint) is Callable or hint is types.FunctionType


def _words(hint: Any) -> str:
    """What a hint asks for, in words."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(parts)}"
    if origin is tuple:
        if parts[-1] is ...:
            return f"a sequence, each of it {_words(parts[0])}"
        return f"a sequence of {len(parts)}, each of it {_words(parts[0])}"
    if _is_callable(hint):
        return "a callable"
    known = {bool: "True or False", int: "an integer", float: "a number", str: "a name"}
    if hint in known or hint is type(None):
        return known.get(hint, "None")
    return f"a {(origin or hint).__name__}"
