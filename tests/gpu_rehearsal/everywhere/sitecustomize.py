"""With this folder in PYTHONPATH each process that imports torch, and its children, have the pretended GPU."""

from __future__ import annotations

import atexit
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from gpu_rehearsal import start
from gpu_rehearsal.build import build


class Finder:
    """Finds torch once, and starts the pretended GPU around its import.

    Args:
        library: the compiled library. A finder must not compile it: Python lets no other thread import meanwhile.
    """

    def __init__(self, library: Path) -> None:
        self._library = library

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        library = start.load(self._library)
        spec = importlib.util.find_spec("torch")
        assert spec is not None and spec.loader is not None
        execute: Any = spec.loader.exec_module

        def started(module: ModuleType) -> None:
            execute(module)
            start.finish(library)
            atexit.register(tell)

        spec.loader.exec_module = started  # type: ignore[method-assign]
        return spec


def tell() -> None:
    """Tell of the faults that nothing else has asked for."""
    from gpu_rehearsal import torch_cuda

    for fault in torch_cuda.faults():
        print(f"GPU rehearsal: {fault}", file=sys.stderr)


start.with_torch = True
sys.meta_path.insert(0, Finder(build()))
