"""A safe reader for pickles of plain values and numeric arrays.

A pickle is a program. The standard library calls whatever function it names. Even the few functions of numpy that
an array's pickle needs are unsafe: with an object dtype, strides or a state that the file chooses, they read any
memory. So this module interprets the few instructions that files of images need. They build numbers, text, tuples,
lists, dicts and descriptions of arrays, which are checked before an array is made.
"""

from __future__ import annotations

import codecs
import pickle
import struct
from collections.abc import Callable
from typing import Any

from fastadv.data.array_pickle_values import (
    NAMES,
    Array,
    DType,
    Name,
    PickleContentError,
    object_of,
    text_of,
)

_MAX_NUMBER_LENGTH = 32  # bytes or digits
_MAX_REASON_LENGTH = 200  # characters: a file's text may be long


def read_arrays(content: bytes) -> Any:
    """Read a pickle of plain values and numeric arrays, of any protocol.

    Args:
        content: the pickle.

    Returns:
        Its value. Arrays that are values of an outermost dict are numpy arrays, read-only. Text that Python 2
        wrote is bytes.

    Raises:
        PickleContentError: if it is damaged, or holds another kind of value, which the message names.
    """
    try:
        value = _Machine(content).run()
        if isinstance(value, dict):
            return {k: v.array() if isinstance(v, Array) else v for k, v in value.items()}
        return value
    except PickleContentError as error:
        raise PickleContentError(str(error)[:_MAX_REASON_LENGTH]) from None
    except Exception as error:  # a damaged program can go wrong at any instruction
        reason = f"it is damaged: {type(error).__name__}: {error}"
        raise PickleContentError(reason[:_MAX_REASON_LENGTH]) from error


class _Machine:
    """Runs the instructions of one pickle.

    Args:
        content: the pickle.
    """

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks below the marks
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Return the value that the pickle ends with."""
        while True:
            at, code = self._at, self.take(1)
            if code == pickle.STOP:
                if len(self._stack) != 1 or self._below:
                    raise PickleContentError(f"it ends in the middle of a value, at byte {at}")
                return self._stack[0]
            step = _STEPS.get(code)
            if step is None:
                raise PickleContentError(
                    f"its instruction {code!r} at byte {at} is of no use in such a file"
                )
            step(self)

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        if count < 0 or count > len(self._content) - self._at:
            raise PickleContentError(f"it ends too early: {count} bytes are wanted at {self._at}")
        self._at += count
        return self._content[self._at - count : self._at]

    def skip(self, count: int) -> None:
        """Skip bytes that do not matter for the value."""
        self.take(count)

    def line(self) -> bytes:
        """Return the rest of a line without its end."""
        end = self._content.find(b"\n", self._at)
        if end < 0:
            raise PickleContentError("it ends in the middle of a line")
        start, self._at = self._at, end + 1
        return self._content[start:end]

    def number(self, form: str) -> int:
        """Return the next integer, in a form of `struct`."""
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        self._stack.append(value)

    def mark(self) -> None:
        """Begin a new stack for the parts of a value."""
        self._below.append(self._stack)
        self._stack = []

    def since_mark(self) -> list[Any]:
        """Return the values since the last mark, and go back to the stack below it."""
        values, self._stack = self._stack, self._below.pop()
        return values

    def last(self, count: int) -> tuple[Any, ...]:
        """Remove the last ``count`` values from the stack, and return them."""
        if count > len(self._stack):
            raise PickleContentError("it takes a value where there is no value")
        values = tuple(self._stack[-count:])
        del self._stack[-count:]
        return values

    def remember(self, place: int) -> None:
        """Keep the last value under a number."""
        self._memo[place] = self._stack[-1]

    def remember_next(self) -> None:
        """Keep the last value under the next number."""
        self.remember(len(self._memo))

    def recall(self, place: int) -> None:
        """Put a kept value on the stack."""
        if place not in self._memo:
            raise PickleContentError(f"it takes value {place}, which it has not kept")
        self.push(self._memo[place])

    def extend(self, values: list[Any]) -> None:
        """Append to the list on the stack."""
        target = self._stack[-1]
        if type(target) is not list:
            raise PickleContentError(f"it appends to a {type(target).__name__}")
        target.extend(values)

    def update(self, entries: list[Any]) -> None:
        """Put keys and values, one after the other, into the dict on the stack."""
        target = self._stack[-1]
        if type(target) is not dict:
            raise PickleContentError(f"it sets entries of a {type(target).__name__}")
        target.update(_dict_of(entries))

    def name(self, module: Any, name: Any) -> None:
        """Put a name on the stack, if it is one of those that arrays need."""
        full = (text_of(module), text_of(name))
        if full not in NAMES:
            raise PickleContentError(
                f"it refers to {'.'.join(full)}, which such a file has no need of"
            )
        self.push(Name(full))

    def reduce(self) -> None:
        """Replace a name and its arguments by the value that they stand for."""
        name, arguments = self.last(2)
        if not isinstance(name, Name) or type(arguments) is not tuple:
            raise PickleContentError("it calls an object that is no function")
        self.push(object_of(name.full, arguments))

    def build(self) -> None:
        """Give the last value its state."""
        value, state = self.last(2)
        if not isinstance(value, DType | Array) or type(state) is not tuple:
            raise PickleContentError(f"it gives a {type(value).__name__} a state")
        value.build(state)
        self.push(value)


def _dict_of(entries: list[Any]) -> dict[Any, Any]:
    keys, values = entries[::2], entries[1::2]
    # A tuple that holds itself many times over would take forever to hash.
    if any(type(key) not in (str, bytes, int) for key in keys):
        raise PickleContentError("it has a dict with keys that are neither text nor integers")
    return dict(zip(keys, values, strict=True))


def _integer(line: bytes) -> int | bool:
    """An integer in decimal digits, or a truth value, which the same instruction writes."""
    if line in (b"00", b"01"):
        return line == b"01"
    return int(_short(line.rstrip(b"L")))


def _quoted(line: bytes) -> bytes:
    """The bytes of a Python 2 string literal."""
    if len(line) < 2 or line[:1] not in (b"'", b'"') or line[-1:] != line[:1]:
        raise PickleContentError("it has text without quotation marks")
    return codecs.escape_decode(line[1:-1])[0]


def _long(data: bytes) -> int:
    return int.from_bytes(_short(data), "little", signed=True)


def _short(number: bytes) -> bytes:
    """The bytes of a number, if they are no more than `_MAX_NUMBER_LENGTH`."""
    if len(number) > _MAX_NUMBER_LENGTH:
        raise PickleContentError(f"it has a number of {len(number):,} bytes")
    return number


def _utf8(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


_Step = Callable[[_Machine], None]
_STEPS: dict[bytes, _Step] = {
    # The frame of the rest
    pickle.PROTO: lambda m: m.skip(1),
    pickle.FRAME: lambda m: m.skip(8),
    pickle.MARK: _Machine.mark,
    # Numbers
    pickle.NONE: lambda m: m.push(None),
    pickle.NEWTRUE: lambda m: m.push(True),
    pickle.NEWFALSE: lambda m: m.push(False),
    pickle.INT: lambda m: m.push(_integer(m.line())),
    pickle.LONG: lambda m: m.push(_integer(m.line())),
    pickle.BININT: lambda m: m.push(m.number("<i")),
    pickle.BININT1: lambda m: m.push(m.number("<B")),
    pickle.BININT2: lambda m: m.push(m.number("<H")),
    pickle.LONG1: lambda m: m.push(_long(m.take(m.number("<B")))),
    pickle.LONG4: lambda m: m.push(_long(m.take(m.number("<i")))),
    pickle.FLOAT: lambda m: m.push(float(_short(m.line()))),
    pickle.BINFLOAT: lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    # Text and bytes
    pickle.STRING: lambda m: m.push(_quoted(m.line())),
    pickle.BINSTRING: lambda m: m.push(m.take(m.number("<i"))),
    pickle.SHORT_BINSTRING: lambda m: m.push(m.take(m.number("<B"))),
    pickle.UNICODE: lambda m: m.push(m.line().decode("raw-unicode-escape")),
    pickle.BINUNICODE: lambda m: m.push(_utf8(m.take(m.number("<I")))),
    pickle.SHORT_BINUNICODE: lambda m: m.push(_utf8(m.take(m.number("<B")))),
    pickle.BINUNICODE8: lambda m: m.push(_utf8(m.take(m.number("<Q")))),
    pickle.BINBYTES: lambda m: m.push(m.take(m.number("<I"))),
    pickle.SHORT_BINBYTES: lambda m: m.push(m.take(m.number("<B"))),
    pickle.BINBYTES8: lambda m: m.push(m.take(m.number("<Q"))),
    pickle.BYTEARRAY8: lambda m: m.push(m.take(m.number("<Q"))),
    # Tuples, lists and dicts
    pickle.EMPTY_TUPLE: lambda m: m.push(()),
    pickle.TUPLE: lambda m: m.push(tuple(m.since_mark())),
    pickle.TUPLE1: lambda m: m.push(m.last(1)),
    pickle.TUPLE2: lambda m: m.push(m.last(2)),
    pickle.TUPLE3: lambda m: m.push(m.last(3)),
    pickle.EMPTY_LIST: lambda m: m.push([]),
    pickle.LIST: lambda m: m.push(m.since_mark()),
    pickle.APPEND: lambda m: m.extend(list(m.last(1))),
    pickle.APPENDS: lambda m: m.extend(m.since_mark()),
    pickle.EMPTY_DICT: lambda m: m.push({}),
    pickle.DICT: lambda m: m.push(_dict_of(m.since_mark())),
    pickle.SETITEM: lambda m: m.update(list(m.last(2))),
    pickle.SETITEMS: lambda m: m.update(m.since_mark()),
    # Values that occur several times
    pickle.PUT: lambda m: m.remember(_integer(m.line())),
    pickle.BINPUT: lambda m: m.remember(m.number("<B")),
    pickle.LONG_BINPUT: lambda m: m.remember(m.number("<I")),
    pickle.MEMOIZE: _Machine.remember_next,
    pickle.GET: lambda m: m.recall(_integer(m.line())),
    pickle.BINGET: lambda m: m.recall(m.number("<B")),
    pickle.LONG_BINGET: lambda m: m.recall(m.number("<I")),
    # Arrays
    pickle.GLOBAL: lambda m: m.name(m.line(), m.line()),
    pickle.STACK_GLOBAL: lambda m: m.name(*m.last(2)),
    pickle.REDUCE: _Machine.reduce,
    pickle.BUILD: _Machine.build,
}
