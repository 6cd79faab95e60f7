"""The compiled part of the package: which one fits the torch in use, and what it was built with.

It is a shared library. Its name says the minor version of torch that it was built against, since torch's C++
interface changes from one to the next. Where no library fits, or the one that fits cannot be loaded, every op runs
its reference in plain torch, and one warning says so.
"""

from __future__ import annotations

import ctypes
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_NAME = re.compile(r"libfastadv_torch(\d+\.\d+)\.so")
_BUILD = "build it against this torch with `pip install --no-build-isolation .` in the source"


@dataclass(frozen=True)
class Native:
    """The compiled part as it was found.

    Attributes:
        library: the loaded library, or None.
        path: the file that it was loaded from, or None.
        problem: why there is no library; empty where there is one.
    """

    library: ctypes.CDLL | None
    path: Path | None = None
    problem: str = ""

    def build_info(self) -> dict[str, Any]:
        """The build of the library: ``torch``, ``compiler``, ``simd`` and ``cuda``; empty without one."""
        if self.library is None:
            return {}
        facts: dict[str, Any] = {}
        for name in ("torch", "compiler", "simd"):
            function = getattr(self.library, f"fastadv_{name}")
            function.restype = ctypes.c_char_p
            facts[name] = function().decode()
        return {**facts, "cuda": bool(self.library.fastadv_cuda())}


def load(folders: Iterable[str], torch_version: str = torch.__version__) -> Native:
    """Load the compiled part, which registers its kernels with torch; warn where that cannot be done.

    Args:
        folders: where to look, in this order.
        torch_version: the torch to look for.
    """
    found = _loaded(_libraries(folders), torch_version)
    if found.problem:
        warnings.warn(
            f"fastadv runs without its compiled part, slowly: {found.problem}. To have it, {_BUILD}.",
            RuntimeWarning,
            stacklevel=2,
        )
    return found


def _libraries(folders: Iterable[str]) -> dict[str, Path]:
    """The compiled parts by the minor version of the torch that they were built against."""
    files: dict[str, Path] = {}
    for folder in folders:
        for file in sorted(Path(folder).glob("libfastadv_torch*.so")):
            match = _NAME.fullmatch(file.name)
            if match is not None:
                files.setdefault(match[1], file)
    return files


def _loaded(files: dict[str, Path], torch_version: str) -> Native:
    match = re.match(r"\d+\.\d+", torch_version)
    file = files.get(match[0]) if match is not None else None
    if not files:
        return Native(None, problem="this installation has none")
    if file is None:
        built = ", ".join(sorted(files))
        return Native(
            None, problem=f"it was built against torch {built}, and this is torch {torch_version}"
        )
    try:
        torch.ops.load_library(str(file))
    except OSError as error:
        return Native(None, problem=f"it could not be loaded ({error})")
    return Native(ctypes.CDLL(str(file)), file)
