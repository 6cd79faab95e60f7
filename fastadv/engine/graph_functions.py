"""The forms in which a copy's graph calls recorded functions that a graph cannot call as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Applied:
    """An autograd function, which torch.fx (2.14) cannot name itself."""

    def __init__(self, apply: Callable[..., Any]) -> None:
        self._apply = apply
        self.__name__ = "autograd_function"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the autograd function."""
        return self._apply(*args, **kwargs)


class WithoutGradient:
    """A function under `torch.no_grad`, as the model called it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.__name__ = "without_gradient"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function without gradients."""
        with torch.no_grad():
            return self._function(*args, **kwargs)


class OutOfPlace:
    """A function that writes into its first argument, on a copy of that argument, which it returns."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.__name__ = "out_of_place"

    def __call__(self, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Call the function on a clone of ``target``, and return the clone."""
        own = target.clone()
        self._function(own, *args, **kwargs)
        return own


def has_out_of_place_form(function: Any, name: str) -> bool:
    """Whether a function that writes in place, such as `relu_`, has a form that returns a new tensor, `relu`."""
    if not name.endswith("_") or name.endswith("__"):
        return False
    plain = name[:-1]
    if is_method(function):
        return hasattr(Tensor, plain)
    return hasattr(torch, plain) or hasattr(F, plain)


def is_method(function: Any) -> bool:
    """Whether a function is a method of tensors."""
    name = getattr(function, "__name__", "")
    return hasattr(function, "__objclass__") or getattr(Tensor, name, None) is function
