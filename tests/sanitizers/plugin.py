"""A pytest plugin: the package takes its compiled part from another file than the installed one."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

_NAME = "fastadv._C"


class _Finder:
    """Finds the compiled part at one path, and nothing else."""

    def __init__(self, path: str) -> None:
        self._path = path

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return importlib.util.spec_from_file_location(name, self._path) if name == _NAME else None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--native-library", help="the compiled part to be used")


def pytest_configure(config: pytest.Config) -> None:
    assert _NAME not in sys.modules, "the package has been imported before"
    sys.meta_path.insert(0, _Finder(config.getoption("--native-library")))  # type: ignore[arg-type]


def pytest_report_header() -> str:
    import fastadv._C

    return f"compiled part: {fastadv._C.__file__}"
