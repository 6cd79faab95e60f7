"""Reading published files of weights without running any code that they name."""

from __future__ import annotations

import os
import pickle
import pickletools
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fastadv.fields import arguments_checked
from fastadv.files import check_archive
from fastadv.models.sealed_safetensors import check_seal

# torch before 1.6 wrote four pickles, of which the last is the saved object.
_PICKLES_OF_OLD_FILES = 4
_ZIP = b"PK\x03\x04"
# The functions by which numpy's arrays and numbers are made again from a file.
_NUMPY_ARRAY = re.compile(r"numpy\._?core\.multiarray\._reconstruct")
_NUMPY_NUMBER = re.compile(r"numpy\._?core\.multiarray\.scalar")
_NUMPY_DTYPE = re.compile(r"[fiu][1248]")


class StateFileError(ValueError):
    """A file of weights is damaged, or holds no weights; the message names it."""


class Foreign:
    """Stands in for an object of a class or function that a file names, which is neither looked up nor called.

    Attributes:
        kind: the full name in the file.
        arguments: the values from which the file makes the object.
        state: the value that the file then gives it; None without such a value.
    """

    kind = ""
    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *arguments: Any) -> Foreign:
        """Make an object, whatever arguments the file has."""
        return super().__new__(cls)

    def __init__(self, *arguments: Any) -> None:
        """Keep the arguments, of which the first is the class of an object in an old protocol."""
        self.arguments = arguments
        first = arguments[0] if arguments else None
        if isinstance(first, type) and issubclass(first, Foreign) and not self.is_array:
            self.kind = first.kind

    def __setstate__(self, state: Any) -> None:
        """Keep the state."""
        self.state = state

    @property
    def is_array(self) -> bool:
        """Whether it is an array of numpy's."""
        return _NUMPY_ARRAY.fullmatch(self.kind) is not None

    @property
    def numbers(self) -> list[float]:
        """The values of a plain array or number of numpy's, in the order of the file; empty for another object."""
        try:
            if self.is_array:
                _, _, dtype, _, raw = self.state
            elif _NUMPY_NUMBER.fullmatch(self.kind):
                dtype, raw = self.arguments
            else:
                return []
            code, order = dtype.arguments[0], dtype.state[1]
            if not _NUMPY_DTYPE.fullmatch(code):
                return []
            return [float(value) for value in np.frombuffer(raw, order.replace("|", "") + code)]
        except (AttributeError, IndexError, TypeError, ValueError):
            return []  # it is not written as numpy writes it


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor has values (it is not on "meta") and a dense layout."""
    return tensor.layout == torch.strided and not tensor.is_nested and tensor.device.type != "meta"


@arguments_checked
def read_state_file(path: str | os.PathLike[str]) -> Any:
    """Read a file with any suffix that `torch.save` or safetensors wrote.

    Tensors, numbers, text and the dicts, lists and tuples of them are read. An object of any other class, such as
    the training script's options or a number of numpy's, becomes a `Foreign`.

    Args:
        path: the file.

    Returns:
        The saved object, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        StateFileError: if it is damaged or another kind of file; the message names it.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {_why_no_file(path)}; it must be a state dict")
    try:
        if path.suffix == ".safetensors" or _is_safetensors(path):
            from safetensors.torch import load_file

            tensors = load_file(path)
            check_seal(path)
            return tensors
        with torch.serialization.safe_globals([_stand_in(name) for name in _names_in(path)]):
            state = torch.load(path, map_location="cpu", weights_only=True)
        check_archive(path)
        return state
    except Exception as error:  # both readers raise many types for foreign files
        # torch's message advises to let the file run any code. Only its reason is repeated here.
        refused = isinstance(error, pickle.UnpicklingError) and error.__context__ is not None
        reason = str(error.__context__ if refused else error).strip().partition("\n")[0]
        reason = _mistaken_download(path) or reason
        raise StateFileError(
            f"{path}: cannot be read as a file of weights ({reason[:200] or type(error).__name__}); it must "
            "be a state dict that torch.save or safetensors wrote"
        ) from error


def _why_no_file(path: Path) -> str:
    """The reason why a path is no file."""
    if path.is_dir():
        some = sorted(one.name for one in path.iterdir() if one.is_file())[:3]
        return f"a folder; name a file in it, such as {', '.join(some)}" if some else "a folder"
    return "a link to a file that does not exist" if path.is_symlink() else "no such file"


def _mistaken_download(path: Path) -> str | None:
    """The kind of a file that is commonly found in place of weights; None for any other file."""
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, and `git lfs pull` fetches the weights"
    if not start:
        return "it is empty"
    if start.startswith(b"\x1f\x8b"):
        return "it is compressed by gzip; decompress it"
    if start.lstrip()[:1] == b"<":
        return "it is a web page"
    if start.lstrip()[:1] == b"{":
        return "it is JSON, such as the index of several files, each with a part of the weights"
    return None


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins with the length of a JSON header and the header."""
    with path.open("rb") as file:
        length, brace = int.from_bytes(file.read(8), "little"), file.read(1)
    return brace == b"{" and 2 <= length <= path.stat().st_size - 8


def _stand_in(name: str) -> Any:
    """What `torch.serialization.safe_globals` takes for a name: the class that records it, and the name."""
    if name == "collections.defaultdict":  # in which a state dict may be kept
        return lambda *_: {}, name
    return type("Foreign", (Foreign,), {"kind": name}), name


def _names_in(path: Path) -> list[str]:
    """The names of classes and functions in a file that ``weights_only=True`` would refuse."""
    with path.open("rb") as file:
        if file.read(len(_ZIP)) == _ZIP:
            return torch.serialization.get_unsafe_globals_in_checkpoint(path)
        file.seek(0)
        return _names_in_old_form(file)


def _names_in_old_form(file: BinaryIO) -> list[str]:
    names: set[str] = set()
    for _ in range(_PICKLES_OF_OLD_FILES):
        for code, argument, _ in pickletools.genops(file):
            if code.name == "GLOBAL":
                # torch looks them up under the names of Python 3.
                names.add(str(argument).replace(" ", ".").replace("__builtin__.", "builtins."))
    # Names that torch knows keep their meaning.
    return [name for name in names if not name.startswith(("torch.", "collections.OrderedDict"))]
