"""The descriptions of arrays in a pickle, which are checked before an array is made."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_DTYPE = re.compile(r"[<>|=]?([biuf])([1248])")
_MAX_DIMENSIONS = 8

_MULTIARRAY = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
}
_FROM_BUFFER = {("numpy.core.numeric", "_frombuffer"), ("numpy._core.numeric", "_frombuffer")}
_NDARRAY, _DTYPE_CLASS = ("numpy", "ndarray"), ("numpy", "dtype")
_ENCODE = ("_codecs", "encode")  # how Python 3 writes bytes for Python 2
_BYTES = ("__builtin__", "bytes")  # without arguments: how it writes bytes that are empty
NAMES = {*_MULTIARRAY, *_FROM_BUFFER, _NDARRAY, _DTYPE_CLASS, _ENCODE, _BYTES}


class PickleContentError(ValueError):
    """The pickle is damaged, or asks for more than a file of plain values and numeric arrays needs."""


@dataclass(frozen=True)
class Name:
    """A known name of a function or class in the file, (module, name). It is neither imported nor called."""

    full: tuple[str, str]


@dataclass(eq=False)
class DType:
    """A file's description of an array's elements."""

    text: str
    order: str = "="

    def build(self, state: Any) -> None:
        """Take in the state that numpy writes for a number's dtype, which only adds the byte order."""
        version, order, *rest = state
        if version != 3 or rest != [None, None, None, -1, -1, 0]:
            raise PickleContentError("it has a dtype with fields, subarrays or sizes of its own")
        order = text_of(order)
        if order not in ("<", ">", "=", "|"):
            raise PickleContentError(f"it has a dtype with the byte order {order!r}")
        self.order = "=" if order == "|" else order

    def dtype(self) -> np.dtype[Any]:
        """Return the dtype, which is of a plain number."""
        found = _DTYPE.fullmatch(self.text)
        if found is None:
            raise PickleContentError(
                f"it has an array of dtype {self.text!r}, not of plain numbers"
            )
        kind = "".join(found.groups())
        order = self.text[0] if self.text[0] in "<>" else self.order
        return np.dtype(order + kind)  # raises for kinds that do not exist, such as f1


@dataclass(eq=False)
class Array:
    """A file's description of an array."""

    dtype: DType | None = None
    shape: tuple[int, ...] = ()
    order: str = "C"
    raw: bytes = b""

    def build(self, state: Any) -> None:
        """Take in the state that numpy writes for an array."""
        _, self.shape, dtype, fortran, raw = state
        self.order = "F" if fortran else "C"
        self._fill(dtype, raw)

    def _fill(self, dtype: Any, raw: Any) -> None:
        if not isinstance(dtype, DType) or not isinstance(raw, bytes | bytearray):
            raise PickleContentError("it has an array whose values are not plain numbers")
        self.dtype, self.raw = dtype, bytes(raw)

    @classmethod
    def from_buffer(cls, raw: Any, dtype: Any, shape: Any, order: Any) -> Array:
        """Return the array that protocol 5 describes."""
        made = cls(shape=shape, order=text_of(order))
        made._fill(dtype, raw)
        return made

    def array(self) -> NDArray[Any]:
        """Make the array, after checking that its bytes are as many as its shape says."""
        if self.dtype is None:
            raise PickleContentError("it has an array without content")
        dtype, shape = self.dtype.dtype(), self.shape
        if not isinstance(shape, tuple) or len(shape) > _MAX_DIMENSIONS or self.order not in "CF":
            raise PickleContentError("it has an array of an impossible shape or order")
        if any(type(length) is not int or length < 0 for length in shape):
            raise PickleContentError(f"it has an array of shape {shape}")
        size = math.prod(shape) * dtype.itemsize
        if len(self.raw) != size:
            raise PickleContentError(
                f"it has an array {dtype}{list(shape)} of {size:,} bytes with {len(self.raw):,} bytes"
            )
        if size == 0:
            return np.empty(shape, dtype)
        return np.frombuffer(self.raw, dtype).reshape(
            shape, order="F" if self.order == "F" else "C"
        )


def object_of(name: tuple[str, str], arguments: tuple[Any, ...]) -> Any:
    """The value that a name stands for with these arguments."""
    if name in _MULTIARRAY:
        kind, shape, code = arguments
        if kind != Name(_NDARRAY) or shape != (0,) or text_of(code) != "b":
            raise PickleContentError("it has an array that is not made as numpy makes one")
        return Array()
    if name in _FROM_BUFFER:
        return Array.from_buffer(*arguments)
    if name == _DTYPE_CLASS:
        return DType(text_of(arguments[0]))  # the others are `align` and `copy`
    if name == _ENCODE:
        text, encoding = arguments
        if encoding != "latin1" or not isinstance(text, str):
            raise PickleContentError(f"it encodes text as {encoding!r}, only latin1 is in use")
        return text.encode("latin1")
    if name == _BYTES and not arguments:
        return b""
    raise PickleContentError(f"it calls {'.'.join(name)}, which no such file has need of")


def text_of(value: Any) -> str:
    """Text, which Python 2 wrote as bytes."""
    if isinstance(value, bytes):
        return value.decode("ascii")
    if not isinstance(value, str):
        raise PickleContentError(f"it has a {type(value).__name__} where text belongs")
    return value
