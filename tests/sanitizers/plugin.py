"""A pytest plugin: the package takes its compiled part from another file than the installed one."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch

_PACKAGE = "fastadv"


class _Finder:
    """Finds the package as usual, with one more folder, looked through first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _PACKAGE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.submodule_search_locations is not None
        spec.submodule_search_locations.insert(0, str(self._folder))
        return spec


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--native-library", type=Path, help="the compiled part to be used")
    parser.addoption(
        "--emulated",
        action="store_true",
        help="the compiled part emulates AVX512-BF16 and AMX: take the processor to have both",
    )


def pytest_configure(config: pytest.Config) -> None:
    assert _PACKAGE not in sys.modules, "the package has been imported before"
    sys.meta_path.insert(0, _Finder(config.getoption("--native-library").parent))  # type: ignore[arg-type]
    if config.getoption("--emulated"):
        for feature in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            setattr(torch.cpu, feature, lambda: True)


def pytest_report_header(config: pytest.Config) -> str:
    from fastadv.ops import NATIVE

    assert NATIVE.path == config.getoption("--native-library"), NATIVE
    return f"compiled part: {NATIVE.path}"
