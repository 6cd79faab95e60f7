"""Checks of plain values: numbers, integers, flags, words, norms and bounds.

Every message names the argument, its value and the values that it may have. Numpy's numbers and flags count as
Python's. Under torch.compile these checks only compare a number that changes and never convert it, so that one
graph serves all its values.
"""

from __future__ import annotations

import difflib
import inspect
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastadv.ops.synonyms import WORDS

NORMS = ("linf", "l2", "l1")
_ORDERS = {math.inf: "linf", 2: "l2", 1: "l1"}
_NORM_WORDS = {
    **dict.fromkeys(("inf", "infty", "infinity", "\N{INFINITY}"), "linf"),
    "2": "l2",
    "1": "l1",
}
_MAX_SHOWN = 200  # characters of a value in a message


def shown(value: object) -> str:
    """The value as messages show it: a tensor by its shape, a module by its class, a long text by its start."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, torch.nn.Module):
        return with_article(type(value).__name__)
    if isinstance(value, Mapping | list | tuple) and _holds_tensors(value):
        return f"{with_article(type(value).__name__)} of {len(value)} with tensors or modules"
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def with_article(word: str) -> str:
    """The name of a class after "a" or "an"."""
    return f"an {word}" if word[:1] in "AEIOaeio" else f"a {word}"


def _holds_tensors(value: Mapping[Any, Any] | list[Any] | tuple[Any, ...]) -> bool:
    entries = value.values() if isinstance(value, Mapping) else value
    return any(isinstance(entry, Tensor | torch.nn.Module) for entry in entries)


def number(name: str, value: object) -> float:
    """Require a number, and return it as a float; a tensor, a flag or the text "8/255" is not a number.

    Raises:
        TypeError: it is no number.
        ValueError: it is larger than a float can be.
    """
    if type(value) is float:
        return value
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    try:
        return float(value)
    except OverflowError:  # of a file, which can hold any integer
        raise ValueError(f"{name} must be at most 1.8e308, got a larger number") from None


def integer(name: str, value: object, at_least: int | None = None) -> int:
    """Require an integer, and return it as Python's.

    Raises:
        TypeError: it is no integer.
        ValueError: it is below ``at_least``, or ``at_least`` is given and it does not fit into 64 bits.
    """
    if type(value) is not int and (not isinstance(value, Integral) or isinstance(value, bool)):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name} must be >= {at_least}, got {value}")
    if at_least is not None and int(value) >= 2**63:
        raise ValueError(f"{name} must fit into 64 bits, got {value}")
    return int(value)


def check_bool(name: str, value: object) -> bool:
    """Require True or False, and return it as Python's. Text and numbers are refused, because they are ambiguous.

    Raises:
        TypeError: it is neither.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def check_path(name: str, value: object) -> None:
    """Require the path of a file or a folder.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be a path, got {shown(value)}")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Require one of several words.

    Raises:
        ValueError: it is another word; the message has the word that may have been meant.
    """
    if not (isinstance(value, str) and value in choices):
        word = str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        hint = did_you_mean(word, choices, WORDS) if isinstance(word, str) else ""
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {shown(value)}{hint}")


def check_takes(name: str, function: Callable[..., Any], parameters: Sequence[str]) -> None:
    """Refuse a class, and a function that cannot be called with as many arguments as there are ``parameters``.

    Raises:
        TypeError: it is a class, or takes another number of arguments.
    """
    wanted = f"{', '.join(parameters[:-1])} and {parameters[-1]}"
    if isinstance(function, type):
        raise TypeError(
            f"{name} must be a callable of {wanted}, got the class {function.__name__}; pass "
            f"{function.__name__}()"
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin may have no signature
        return
    try:
        signature.bind(*parameters)
    except TypeError as error:
        called = getattr(function, "__name__", type(function).__name__)
        raise TypeError(
            f"{name} must be a callable of {len(parameters)} arguments, {wanted}, got {called}{signature}"
        ) from error


def check_finite_at_least_zero(name: str, value: float) -> None:
    """Require a finite number that is not negative.

    Raises:
        ValueError: it is negative, infinite or NaN.
    """
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and >= 0, got {value}")


def limit(name: str, value: object) -> float:
    """Require a finite number that is not negative, such as a radius or a weight, and return it as a float.

    Raises:
        TypeError: it is no number.
        ValueError: it is negative, infinite or NaN.
    """
    checked = number(name, value)
    check_finite_at_least_zero(name, checked)
    return checked


def share(name: str, value: object) -> float:
    """Require a number in 0..1, and return it as a float.

    Raises:
        TypeError: it is no number.
        ValueError: it is outside.
    """
    checked = number(name, value)
    if not 0 <= checked <= 1:
        raise ValueError(f"{name} must lie in 0..1, got {value}")
    return checked


def threshold(name: str, value: object) -> float:
    """Require a number with which others can be compared, and return it as a float.

    Raises:
        TypeError: it is no number.
        ValueError: it is NaN.
    """
    checked = number(name, value)
    if checked != checked:
        raise ValueError(f"{name} must not be NaN")
    return checked


def check_bounds(bounds: object) -> tuple[float, float]:
    """Require two finite numbers in order.

    Raises:
        TypeError: they are no pair of numbers.
        ValueError: they are not finite or not in order.
    """
    if not (isinstance(bounds, tuple | list) and len(bounds) == 2):
        raise TypeError(f"bounds must be a pair (low, high), got {shown(bounds)}")
    try:
        low, high = number("bounds", bounds[0]), number("bounds", bounds[1])
    except TypeError as error:
        raise TypeError(
            f"bounds must be a pair of numbers (low, high), got {shown(bounds)}"
        ) from error
    if not -math.inf < low <= high < math.inf:
        raise ValueError(f"bounds must be finite with low <= high, got ({low}, {high})")
    return low, high


def check_device(device: torch.device | str) -> torch.device:
    """The device of a name.

    Raises:
        ValueError: torch knows no device of that name, or it holds no values.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"device must be one of torch's, such as 'cpu' or 'cuda:0', got {shown(device)}"
        ) from error
    if found.type == "meta":  # to which a model would lose its weights
        raise ValueError("device must be one that holds values, such as 'cpu', got 'meta'")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device must be one that there is, got {str(found)!r}: torch finds {torch.cuda.device_count()} GPUs"
        )
    return found


def norm_name(norm: object) -> str:
    """The norm's name, "linf", "l2" or "l1", also as other libraries write it: "Linf", "L_2", 2, np.inf.

    Raises:
        ValueError: it is another word.
    """
    if isinstance(norm, str):
        if norm in NORMS:
            return norm
        word = norm.strip().lower().replace("_", "").replace("-", "").removeprefix("l")
        if word in _NORM_WORDS:
            return _NORM_WORDS[word]
    elif isinstance(norm, Real) and not isinstance(norm, bool) and norm in _ORDERS:
        return _ORDERS[float(norm)]
    raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {shown(norm)}")


def norm_name_if_known(word: object) -> object:
    """`norm_name` of a norm; any other value unchanged, for a later check to refuse it."""
    try:
        return norm_name(word)
    except ValueError:
        return word


def check_radius(
    name: str, eps: float, norm: str, bounds: tuple[float, float], elements: int = 1
) -> None:
    """Refuse a radius larger than the distance between any two images. It must be in other units.

    Args:
        name: the argument's name.
        eps: a radius.
        norm: the norm of the ball.
        bounds: lowest and highest value of an image.
        elements: the number of elements of an image, on which the largest radius depends in ``"l2"`` and ``"l1"``.

    Raises:
        ValueError: the radius is larger.
    """
    low, high = bounds
    largest = largest_radius(bounds, norm, elements)
    if eps > largest * (1 + 1e-6):  # computed in float32 it may be a rounding error larger
        raise ValueError(
            f"{name} must be at most {largest:.6g} in {norm}, the distance between the farthest images "
            f"within bounds ({low:g}, {high:g}), got {eps:g}; it is in the units of the images: a radius of "
            f"{eps:g} in pixels of 0..255 is {eps:g}/255 in images of 0..1"
        )


def largest_radius(bounds: tuple[object, object], norm: str, elements: int) -> float:
    """The distance between the farthest images within bounds; infinity where a bound is a tensor."""
    low, high = bounds
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return math.inf
    order = {"linf": math.inf, "l2": 2, "l1": 1}[norm]
    return (number("bounds", high) - number("bounds", low)) * float(elements ** (1 / order))


def did_you_mean(word: str, known: Iterable[str], synonyms: dict[str, str] | None = None) -> str:
    """``"; did you mean 'eps'?"``, for the end of a message about an unknown word; "" where none is near.

    Upper and lower case count as the same, and so do hyphens and underscores.
    """
    meant = nearest(word, known, synonyms)
    return f"; did you mean {meant!r}?" if meant else ""


def nearest(word: str, known: Iterable[str], synonyms: dict[str, str] | None = None) -> str:
    """The known word that is nearest to an unknown one, as in `did_you_mean`; "" where no word is near."""
    by_key = {_key(one): one for one in known}
    ours = synonyms or {}
    meant = _key(ours.get(word) or ours.get(_key(word), ""))
    near = [meant] if meant in by_key else difflib.get_close_matches(_key(word), by_key, n=1)
    return by_key[near[0]] if near else ""


def _key(word: str) -> str:
    return word.lower().replace("-", "_")
