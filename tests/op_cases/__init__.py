"""Samples of every op, from which the op tests and the op benchmark are driven.

A new op adds a file here that has its name and holds its `OpCase` records.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from fastadv.ops import REGISTRY
from op_cases.case import OpCase

_HERE = Path(__file__).parent
_NAMES = sorted({op.rstrip("_") for op in REGISTRY})  # an op that works in place shares its file
_FILES = [import_module(f"op_cases.{name}") for name in _NAMES if (_HERE / f"{name}.py").is_file()]

CASES: dict[str, OpCase] = {case.name: case for file in _FILES for case in file.CASES}
