"""Pickles of CIFAR's python layout that somebody has written by hand, or that a disk has damaged."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import ran

from fastadv.data import DataFormatError
from fastadv.data.array_pickle import PickleContentError, read_arrays
from fastadv.data.cifar_layout import CIFAR10, PIXEL_BYTES, SplitLayout
from fastadv.data.cifar_python import read_python

RECORDS = 100
SPLIT = SplitLayout((), (), RECORDS)  # as many as make too long a message
ADDRESS = struct.pack("<Q", 0x4141414141414141)


class Call:
    """Pickles as a call of a function, with a state to be given to its result."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.parts = (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts


def empty_array(*state: Any) -> Call:
    """An array as numpy begins it, then with a state."""
    rebuild = np.empty(0).__reduce__()[0]
    return Call(rebuild, np.ndarray, (0,), b"b", state=state)


def dtype_with(*state: Any) -> Call:
    return Call(np.dtype, "V8", False, True, state=state)


def in_labels(value: Any, protocol: int = 2) -> bytes:
    pixels = np.zeros((RECORDS, PIXEL_BYTES), np.uint8)
    return pickle.dumps({b"data": pixels, b"labels": value}, protocol)


FROM_BUFFER = np.empty(1, np.uint8).__reduce_ex__(5)[0]
HOSTILE = {
    "objects over bytes": Call(np.ndarray, (RECORDS,), "O", ADDRESS * RECORDS),
    "objects at an offset": Call(np.ndarray, (4,), "O", ADDRESS * 8, 3),
    "strides beyond the buffer": Call(np.ndarray, (RECORDS,), "u1", b"a", 0, (1 << 40,)),
    "negative strides": Call(np.ndarray, (RECORDS,), "u1", b"a" * RECORDS, 0, (-4096,)),
    "an array that is not initialised": Call(np.ndarray, (RECORDS,), "u1"),
    "objects in a state": empty_array(1, (RECORDS,), np.dtype("O"), False, ADDRESS * RECORDS),
    "a list of objects": empty_array(1, (RECORDS,), np.dtype("O"), False, [0] * RECORDS),
    "more elements than bytes": empty_array(1, (RECORDS,), np.dtype("i8"), False, b"a"),
    "a shape below zero": empty_array(1, (-RECORDS,), np.dtype("u1"), False, b""),
    "a shape of no integers": empty_array(1, ("a",), np.dtype("u1"), False, b""),
    "a shape of too many elements": empty_array(1, (1 << 62, 4), np.dtype("u1"), False, b"abcd"),
    "text for bytes": empty_array(1, (RECORDS,), np.dtype("u1"), False, "a" * RECORDS),
    "structures with objects": Call(np.ndarray, (RECORDS,), [("a", "O")], ADDRESS * RECORDS),
    "a dtype with fields": empty_array(
        1,
        (RECORDS,),
        dtype_with(3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0),
        False,
        ADDRESS * RECORDS,
    ),
    "a dtype that says it holds objects": empty_array(
        1, (RECORDS,), dtype_with(3, "|", None, None, None, 8, 1, 63), False, ADDRESS * RECORDS
    ),
    "a dtype of another size": empty_array(
        1, (RECORDS,), dtype_with(3, "|", None, None, None, 1 << 40, 1, 0), False, ADDRESS * RECORDS
    ),
    "a dtype with a subarray": empty_array(
        1, (RECORDS,), dtype_with(3, "|", (np.dtype("O"), (1,)), None, None, 8, 1, 0), False, b"a"
    ),
    "objects from a buffer": Call(FROM_BUFFER, ADDRESS * RECORDS, np.dtype("O"), (RECORDS,), "C"),
    "a buffer too short": Call(FROM_BUFFER, b"a", np.dtype("u1"), (RECORDS,), "C"),
    "an order of its own": Call(FROM_BUFFER, b"a" * RECORDS, np.dtype("u1"), (RECORDS,), "K"),
    "a buffer that is a number": Call(FROM_BUFFER, 1 << 20, np.dtype("u1"), (RECORDS,), "C"),
    "a state for an array that has one": Call(
        FROM_BUFFER, b"", np.dtype("u1"), (0,), "C", state=(1, (RECORDS,), np.dtype("O"), 0, b"a")
    ),
    "dates": np.zeros(RECORDS, "M8[s]"),
    "bytes of any length": [Call(bytes, 1 << 40)],
    "numbers of numpy": [np.int64(0)] * RECORDS,
    "a long number": [1 << 10_000] * RECORDS,
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_no_file_chooses_what_memory_is_read(name: str, protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "data_batch_1"
    path.write_bytes(in_labels(HOSTILE[name], protocol))
    with pytest.raises(DataFormatError, match=str(path)) as caught:
        read_python(path, CIFAR10, SPLIT)
    assert len(str(caught.value)) < 1000


# Instructions that pickle.dumps does not write.
BY_HAND = {
    "an object made without its function": b"cnumpy\nndarray\n(I4\nS'O'\n\x81.",
    "a state of a name": b"cnumpy\ndtype\n}S'a'\nI1\nsb.",
    "an attribute of a name": b"cnumpy\nndarray\nN}S'__init__'\nI1\ns\x86b.",
    "a name in a name": b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.tolist.x\x93.",
    "an instance": b"(inumpy\nndarray\n.",
    "a class and its arguments": b"(cnumpy\nndarray\nI4\no.",
    "something kept elsewhere": b"Pelsewhere\n.",
    "an extension": b"\x82\x01.",
    "a value that was not kept": b"h\x05.",
    "entries of a list": b"]I1\nI2\ns.",
    "a key that takes forever to hash": b")" + b"2\x86" * 60 + b"}" + b"h\x00I1\ns.",
    "a mark alone": b"(.",
    "nothing at all": b".",
    "two values": b"NN.",
    "a length beyond the file": b"\x8e" + struct.pack("<Q", 1 << 62) + b".",
    "a length below zero": b"T" + struct.pack("<i", -1) + b".",
    "a number below zero for a length": b"\x8b" + struct.pack("<i", -5) + b".",
    "no end": b"\x80\x02}q\x00",
}


@pytest.mark.parametrize("name", BY_HAND)
def test_instructions_that_no_honest_file_has_are_refused(name: str) -> None:
    with pytest.raises(PickleContentError):
        read_arrays(BY_HAND[name])


def test_a_place_far_away_costs_no_memory() -> None:
    assert read_arrays(b"]r" + struct.pack("<I", 0xFFFFFFFF) + b".") == []


def test_what_python_2_wrote_in_protocol_0_is_read() -> None:
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\nI2\nt"
    array += b"cnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\n"
    array += b"S'\\x00\\xff\\n\\''\ntb"
    found = read_arrays(b"(dS'data'\n" + array + b"sS'labels'\n(lI3\naL4L\naI01\nas.")
    assert found[b"data"].tolist() == [[0, 255], [10, 39]]
    assert found[b"labels"] == [3, 4, True]


@pytest.mark.parametrize("dtype", ["u1", "i8", ">i4", "f4", ">f8", "bool"])
@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_numbers_are_read_in_any_layout(dtype: str, protocol: int) -> None:
    whole = np.arange(24).reshape(2, 3, 4).astype(dtype)
    arrays = {"C": whole, "F": np.asfortranarray(whole), "cut": whole[:, ::2], "none": whole[:0]}
    found = read_arrays(pickle.dumps(arrays, protocol))
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)


FUZZ = """
import pickle, random, sys
import numpy as np
from pathlib import Path
from fastadv.data import DataFormatError
from fastadv.data.cifar_layout import CIFAR10, PIXEL_BYTES, SplitLayout
from fastadv.data.cifar_python import read_python

path, protocol = Path(sys.argv[1]), int(sys.argv[2])
split = SplitLayout((), (), records=2)
pixels = np.zeros((2, PIXEL_BYTES), np.uint8)
content = {b"batch_label": b"a batch", b"labels": [3, 9], b"data": pixels, b"filenames": [b"a", b"b"]}
whole = pickle.dumps(content, protocol)
zeros = whole.find(bytes(1000))
places = [i for i in range(len(whole)) if not zeros < i < zeros + 6000] if zeros > 0 else range(400)
random.seed(protocol)
refused = 0
for _ in range(1500):
    damaged = bytearray(whole)
    for _ in range(random.choice((1, 1, 2, 4))):
        damaged[random.choice(places)] = random.randrange(256)
    if random.random() < 0.1:
        del damaged[random.randrange(len(damaged)):]
    path.write_bytes(damaged)
    try:
        records = read_python(path, CIFAR10, split)
        assert records.pixels.shape == (2, PIXEL_BYTES) and records.labels.shape == (2,)
        records.pixels.sum()
    except DataFormatError as error:
        assert str(path) in str(error)
        refused += 1
print(refused)
"""


@pytest.mark.processes
@pytest.mark.parametrize("protocol", range(6))
def test_damage_of_any_kind_is_named_and_ends_no_process(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "data_batch_1"
    done = ran(["-c", FUZZ, str(path), str(protocol)])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 500
