"""Notice functions of torch that others have replaced, as by ``torch.relu = theirs``.

Two things go wrong with them. A function such as `torch.nn.functional.relu` calls `torch.relu`, and a recording
shows the first of the two alone, as before. And torch finds the function that it hands to a `TorchFunctionMode` by
its name. So a replacement that calls the original runs twice where a mode watches.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

_BUILT_IN = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.GetSetDescriptorType,
)
_OWN = ("torch", "fastadv")
# The home of functions that compute and are not built in. Others of torch's, such as torch.compile and torch.load,
# are often replaced.
_PYTHON_FUNCTIONS = "torch.functional"
# Methods of tensors that libraries replace for the sake of display or files.
_NOT_COMPUTING = {
    *("__repr__", "__str__", "__format__", "__dir__", "__hash__", "__deepcopy__"),
    *("__reduce__", "__reduce_ex__", "__setstate__", "register_hook"),
}


class _Home:
    """The functions of one of torch's namespaces, as they were when fastadv was imported.

    Args:
        name: of the namespace.
        place: the module or class.
        original: the class of compiled code in which torch itself looks; None if there is none.
    """

    def __init__(self, name: str, place: Any, original: Any = None) -> None:
        self._name, self._now, self._original = name, vars(place), original
        self._then = {key: value for key, value in self._now.items() if callable(value)}
        # Those that others had replaced by then, as far as the home has no compiled code to tell.
        theirs = [key for key, value in self._then.items() if _is_of_others(value)]
        self._earlier = [k for k in theirs if name != "torch" or k in torch.functional.__all__]
        # The values last seen and what was found in them: one attribute, as several threads may ask at once.
        self._latest: tuple[list[Any], str | None] = ([], None)

    def replaced(self) -> str | None:
        """The name of a function that others have replaced; None if there is none."""
        values, (seen, found) = [*self._now.values()], self._latest
        if values != seen:  # mostly the same objects, which are compared fast
            found = next(self._search(), None)
            self._latest = values, found
        return found

    def _computes(self, key: str, function: Any) -> bool:
        if self._name == "torch" and not hasattr(self._original, key):
            return getattr(function, "__module__", "") == _PYTHON_FUNCTIONS
        return key not in _NOT_COMPUTING

    def _search(self) -> Iterator[str]:
        if any(_is_of_others(self._now.get(key)) for key in self._earlier):
            yield from self._replaced_earlier()
        for key, value in [*self._now.items()]:  # other threads may import parts of torch
            built_in = getattr(self._original, key, None)
            then = self._then.get(key, built_in)
            if isinstance(then, type) or not callable(then) or not callable(value):
                continue
            if not self._computes(key, then):
                continue
            # Before the import, others may have replaced what torch has built in.
            known = value is then and built_in is None
            if not known and _is_other(value, then):
                yield f"{self._name}.{key}"

    def _replaced_earlier(self) -> Iterator[str]:
        """Functions that others had replaced before the import. Torch lists its own names as overridable."""
        names = _overridable_names()
        for key in self._earlier:
            is_torchs_name = f"{self._name}.{key}" in names and key not in _NOT_COMPUTING
            if is_torchs_name and _is_of_others(self._now.get(key)):
                yield f"{self._name}.{key}"


def _overridable_names() -> set[str]:
    """The names of torch's functions that a mode sees, such as "torch.nn.functional.relu"."""
    listed = set(map(id, torch.overrides.get_testing_overrides()))  # in .1 s, and seldom needed
    found = {f"torch.{key}" for key in torch.functional.__all__}
    for name, place in (("torch.nn.functional", F), ("torch.Tensor", torch.Tensor)):
        found |= {f"{name}.{key}" for key, value in [*vars(place).items()] if id(value) in listed}
    return found


def _is_of_others(value: Any) -> bool:
    """Whether a function is none of torch's, and no type that torch imports."""
    if not callable(value) or isinstance(value, type):
        return False
    return _home_of(value) not in (*_OWN, "typing", "typing_extensions")


def _home_of(value: Any) -> str:
    """The package of a function."""
    if isinstance(value, types.FunctionType):
        home = value.__globals__.get("__name__", "")
    else:
        home = "torch" if isinstance(value, _BUILT_IN) else type(value).__module__
    return str(home).split(".")[0]


def _is_other(value: Any, then: Any) -> bool:
    """Whether a function is none of torch's, or another one of torch's."""
    if _home_of(value) not in _OWN:
        return True
    return getattr(value, "__name__", "") != getattr(then, "__name__", "")


_HOMES = (
    _Home("torch", torch, torch._C._VariableFunctions),
    _Home("torch.Tensor", torch.Tensor, torch._C.TensorBase),
    _Home("torch.nn.functional", F),
    _Home("torch._C._nn", torch._C._nn),
)


def replaced_function() -> str | None:
    """The name of a function of torch that others have replaced, such as "torch.relu"; None if there is none."""
    return next(filter(None, (home.replaced() for home in _HOMES)), None)


def registered_kernels() -> int:
    """The number of kernels that Python code has registered for operators, as ``torch.library.impl`` does.

    Such a kernel may change the gradient of an operator and leave its result, which no comparison of logits shows.
    So a copy is proven anew, gradients included, when this number is another one.
    """
    return len(torch.library._impls)
