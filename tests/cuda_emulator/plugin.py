"""A pytest plugin: on CPU tensors the ops of csrc/cuda run their CUDA kernels, emulated.

Of the tests it keeps those that run such an op on the backend "native". Those marked `other_order` run a second
time, with the threads of a block in another order.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from marks import parameters

import fastadv.ops  # noqa: F401  defines the ops
from cuda_emulator.build import ops

LAUNCHED = "emulated kernels: "
REORDERED = "tests in another order: "
FIRST, SECOND = 0, 1  # seeds of the order of threads
_reordered: list[str] = []
library: ctypes.CDLL | None = None  # the emulator, where it has taken the place of the C++ kernels


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--emulator-library", help="what cuda_emulator.build.build() returned")


def pytest_configure(config: pytest.Config) -> None:
    global library
    path = config.getoption("--emulator-library")
    torch.ops.load_library(path)
    library = ctypes.CDLL(path)
    library.cuda_emulator_launched.restype = ctypes.c_char_p
    _use_order(FIRST)


def _use_order(seed: int) -> None:
    assert library is not None
    library.cuda_emulator_seed(ctypes.c_uint(seed))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    emulated = ops()
    kept: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        given = parameters(item)
        native = (given.get("device"), given.get("name")) == ("cpu", "native")
        case = given.get("case")
        runs_a_kernel = native and (case is None or case.op in emulated)
        (kept if runs_a_kernel else others).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=others)


@pytest.hookimpl(trylast=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Runs after pytest's own, hence a second time."""
    if item.get_closest_marker("other_order"):
        _use_order(SECOND)
        try:
            item.runtest()
        finally:
            _use_order(FIRST)
        _reordered.append(item.name)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    assert library is not None
    terminalreporter.write_line(LAUNCHED + library.cuda_emulator_launched().decode())
    terminalreporter.write_line(f"{REORDERED}{len(_reordered)}")
