"""A pytest plugin: on CPU tensors the ops of csrc/cuda run their CUDA kernels, emulated.

Of the tests it keeps those that run such an op on the backend "native".
"""

from __future__ import annotations

import pytest
import torch

import fastadv.ops  # noqa: F401  defines the ops
from cuda_emulator.build import ops

LAUNCHED = "emulated kernels: "


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--emulator-library", help="what cuda_emulator.build.build() returned")
    parser.addoption("--emulator-seed", type=int, default=0, help="of the order of threads")


def pytest_configure(config: pytest.Config) -> None:
    torch.ops.load_library(config.getoption("--emulator-library"))
    torch.ops.cuda_emulator.seed(config.getoption("--emulator-seed"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    emulated = ops()
    kept: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        native = (parameters.get("device"), parameters.get("name")) == ("cpu", "native")
        case = parameters.get("case")
        runs_a_kernel = native and (case is None or case.op in emulated)
        (kept if runs_a_kernel else others).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=others)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    launched = torch.ops.cuda_emulator.launched_kernels()
    terminalreporter.write_line(LAUNCHED + ", ".join(launched))
