"""Checks of the fields of dataclasses and of the arguments of functions, by their type hints.

A dataclass calls `check_fields` first in its ``__post_init__``. A function has the decorator `arguments_checked`.
The dataclass or the function itself checks ranges afterwards.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
from collections.abc import Callable, Hashable, Mapping
from functools import cache, partial, wraps
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from fastadv.ops.synonyms import SYNONYMS
from fastadv.ops.values import (
    check_bool,
    check_choice,
    did_you_mean,
    integer,
    nearest,
    number,
    shown,
    with_article,
)

_MISSING = object()
Function = TypeVar("Function", bound=Callable[..., Any])
Check = Callable[[str, Any], Any]  # (name, value) -> the value as the type hint has it


def check_fields(instance: Any) -> None:
    """Check every field against its type hint, and put Python's own type in place of numpy's and of lists.

    ``bool``, ``int``, ``float`` and ``str`` take only values of their own type; ``float`` takes integers too.
    ``Literal`` takes one of its words, ``tuple`` a tuple or list of such items, ``dict`` a dict of such keys and
    values, a class its instances, and ``Callable`` any callable. ``|`` takes a value that one of its parts takes.

    Args:
        instance: an instance of a dataclass, frozen or not.

    Raises:
        TypeError: a field is of another type.
        ValueError: it is not one of the words it can be.
    """
    for name, check in _checks_of(cast(Hashable, type(instance))).items():
        value = getattr(instance, name, _MISSING)  # missing where the class itself is to fill it in
        checked = value if value is _MISSING else check(name, value)
        if checked is not value:
            object.__setattr__(instance, name, checked)


def arguments_checked(function: Function) -> Function:
    """Let a function check its arguments against its type hints, as `check_fields` does for a dataclass.

    It is for functions that nobody calls in a loop, nor under torch.compile.
    """
    signature = inspect.signature(function)
    called = function.__qualname__.removesuffix(".__init__")
    named = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]

    @cache
    def checks() -> dict[str, Check]:  # at the first call, when all that the hints name is there
        hints = get_type_hints(function)
        return {name: _check_of(hints[name]) for name in named if name in hints}

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            unknown = [name for name in kwargs if name not in signature.parameters]
            hint = did_you_mean(unknown[0], named, SYNONYMS) if unknown else ""
            raise TypeError(f"{called}: {error}{hint}") from None
        for name, check in checks().items():
            if name in bound.arguments:
                bound.arguments[name] = check(name, bound.arguments[name])
        return function(*bound.args, **bound.kwargs)

    return cast(Function, checked)


@cache
def _checks_of(kind: Any) -> dict[str, Check]:
    return {name: _check_of(hint) for name, hint in hints_of(kind).items()}


@cache
def hints_of(kind: Any) -> Mapping[str, Any]:
    """The type hint of each field of a dataclass; a hint that only type checkers can read is left out."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        owner = next(c for c in kind.__mro__ if field.name in inspect.get_annotations(c))
        holder = types.SimpleNamespace(__annotations__={field.name: field.type})
        try:
            found.update(get_type_hints(holder, vars(sys.modules[owner.__module__]), vars(owner)))
        except NameError:
            continue
    return types.MappingProxyType(found)


def _check_of(hint: Any) -> Check:
    """The function that checks a value against a type hint."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return lambda name, value: value
    if origin is Literal:
        return partial(_word, parts)
    if origin in (Union, types.UnionType):
        rest = [part for part in parts if part is not type(None)]
        return partial(_one_of, [_check_of(p) for p in rest], len(rest) < len(parts), _words(hint))
    if origin is tuple:
        count = None if parts[-1] is ... else len(parts)
        return partial(
            _sequence, [_check_of(p) for p in parts if p is not ...], count, _words(hint)
        )
    if origin is dict:
        return partial(_mapping, _check_of(parts[0]), _check_of(parts[1]))
    if hint in _SIMPLE:
        return _SIMPLE[hint]
    if isinstance(hint, type) and issubclass(hint, float):  # a number that may be written otherwise
        return number
    if _is_callable(hint):
        return partial(_other, callable, _words(hint))
    kind = origin or hint
    if isinstance(kind, type) and inspect.isabstract(kind) and kind.__subclasses__():
        return partial(_instance, kind)
    try:
        isinstance(None, kind)
    except TypeError:  # such as a type variable or a protocol, of which nothing can be said
        return lambda name, value: value
    return partial(_other, lambda value: isinstance(value, kind), _words(hint))


def _word(words: tuple[Any, ...], name: str, value: Any) -> Any:
    if all(isinstance(word, str) for word in words):
        check_choice(name, value, words)
    elif not any(type(word) is type(value) and word == value for word in words):
        raise ValueError(f"{name} must be {_words(Literal[words])}, got {shown(value)}")
    return value


def _one_of(checks: list[Check], or_none: bool, words: str, name: str, value: Any) -> Any:
    """The result of the first check that accepts the value. If there is one check, its own message is raised."""
    if value is None and or_none:
        return None
    if len(checks) == 1:
        return checks[0](name, value)
    for check in checks:
        try:
            return check(name, value)
        except (TypeError, ValueError):
            continue
    raise TypeError(f"{name} must be {words}, got {shown(value)}")


def _sequence(checks: list[Check], count: int | None, words: str, name: str, value: Any) -> Any:
    if not isinstance(value, tuple | list) or (count is not None and len(value) != count):
        raise TypeError(f"{name} must be {words}, got {shown(value)}")
    each = checks * len(value) if count is None else checks
    found = tuple(check(name, item) for check, item in zip(each, value, strict=True))
    same = isinstance(value, tuple) and all(a is b for a, b in zip(found, value, strict=True))
    return value if same else found


def _mapping(key: Check, content: Check, name: str, value: Any) -> Any:
    if not isinstance(value, dict):
        raise TypeError(f"{name} must be a dict, got {shown(value)}")
    for word, one in value.items():
        key(f"each key of {name}", word)
        content(f"{name}[{word!r}]", one)
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be text, got {shown(value)}")
    return value


def _other(is_right: Callable[[Any], bool], words: str, name: str, value: Any) -> Any:
    if not is_right(value):
        raise TypeError(f"{name} must be {words}, got {shown(value)}")
    return value


def _instance(kind: type, name: str, value: Any) -> Any:
    """The value, if it is an instance of an abstract class; the message has the classes that can be made."""
    if isinstance(value, kind):
        return value
    kinds: list[type] = type.__subclasses__(kind)
    names = sorted(known.__name__ for known in kinds)
    word = value.__name__ if isinstance(value, type) else value
    meant = nearest(word, names) if isinstance(word, str) else ""
    hint = f"; did you mean {meant}()?" if meant else ""
    raise TypeError(
        f"{name} must be {with_article(kind.__name__)}, such as {names[0]}() or another of {', '.join(names)}, "
        f"got {shown(value)}{hint}"
    )


_SIMPLE: dict[Any, Check] = {bool: check_bool, int: integer, float: number, str: _text}


def _is_callable(hint: Any) -> bool:
    return hint is Callable or get_origin(hint) is Callable


def _words(hint: Any) -> str:
    """The values that a hint asks for, in words."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}" if len(parts) > 1 else repr(parts[0])
    if origin in (Union, types.UnionType):
        return " or ".join(map(_words, parts))
    if origin is tuple:
        length = "a sequence" if parts[-1] is ... else f"a sequence of {len(parts)}"
        return f"{length}, each of it {_words(parts[0])}"
    if _is_callable(hint):
        return "a callable"
    known = {bool: "True or False", int: "an integer", float: "a number", str: "a name"}
    if hint in known or hint is type(None):
        return known.get(hint, "None")
    return with_article((origin or hint).__name__)
