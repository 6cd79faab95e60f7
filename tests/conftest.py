"""Fixtures that several test files share."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kept_parsers import keep_parsers
from thinning import Thinning

_UNPACK = Path(__file__).resolve().parents[2] / "shared" / "data" / "unpack_cifar10.py"

# Collecting makes millions of objects that live to the end. The garbage collector need not look at them again and
# again, neither while they are made nor while the tests run.
gc.disable()

QUICK_LEAVES_OUT = ("gpu", "slow", "processes", "compiles", "other_dtype")


def pytest_addoption(parser: pytest.Parser) -> None:
    left_out = ", ".join(QUICK_LEAVES_OUT)
    text = f"leave out the tests marked {left_out}; the others run with their first and last parameters"
    parser.addoption("--quick", action="store_true", help=text)
    text = "run the tests marked `covering` with all combinations of their parameters"
    parser.addoption("--thorough", action="store_true", help=text)


def pytest_configure(config: pytest.Config) -> None:
    """Make workers of pytest-xdist share the cores, and signals reach the tests that send them."""
    config.pluginmanager.register(Thinning())
    if _is_worker(config) and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"  # for processes that tests start
        torch.set_num_threads(1)
    # A shell starts its background jobs with Ctrl-C ignored, and nohup with SIGHUP ignored. They hand that on.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)  # a test makes thousands of objects that live as long as it
    gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Choose the quick tests; have workers begin with the files that take longest, to end together."""
    if config.getoption("--quick"):
        chosen = quick(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = [item for item in items if item in chosen]
    if _is_worker(config):
        longest = {item.path for item in items if item.get_closest_marker("longest")}
        items.sort(key=lambda item: item.path not in longest)  # the order is kept otherwise


def quick(items: list[pytest.Item]) -> set[pytest.Item]:
    """The tests that `--quick` keeps."""
    chosen = set()
    by_function: dict[str, list[pytest.Item]] = {}
    for item in items:
        if not any(item.get_closest_marker(mark) for mark in QUICK_LEAVES_OUT):
            by_function.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for alike in by_function.values():
        whole = alike[0].get_closest_marker("whole")
        chosen.update(alike if whole else (alike[0], alike[-1]))
    return chosen


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def pytest_runtest_setup() -> None:
    """Let the first engine that is right run, however busy the machine is; tests of the choice bring a clock.

    The parsers of commands are kept. Each module is there from the first test that imports it. A fixture costs
    more than many tests do.
    """
    proof = sys.modules.get("fastadv.engine.proof")
    if proof is not None:
        proof.seconds = _no_time  # type: ignore[attr-defined]
    commands = sys.modules.get("fastadv.cli.train")
    if commands is not None:
        keep_parsers(commands)


def _no_time() -> float:
    return 0.0


@pytest.fixture(scope="session")
def cifar10_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the real CIFAR-10 in the official binary layout, where the data are at hand."""
    if not _UNPACK.is_file():
        pytest.skip("the CIFAR-10 sheets are not beside this repository")
    if importlib.util.find_spec("PIL") is None:
        pytest.skip("unpacking the CIFAR-10 sheets needs Pillow")
    root = tmp_path_factory.mktemp("cifar10")
    subprocess.run([sys.executable, str(_UNPACK), str(root)], check=True, capture_output=True)
    yield root
    shutil.rmtree(root)  # 180 MB that pytest would otherwise keep for three sessions


@pytest.fixture(scope="session", autouse=True)
def fresh_compiler_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What torch.compile keeps on disk outlives a change of an op's signature, which it does not see."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """What is written can be read at once; only after a loss of power does it matter what was on the disk.

    Runs and their tables write thousands of small files, each of which would wait some milliseconds.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # which refuses what is no open file, too
        yield


@pytest.fixture(scope="session", autouse=True)
def no_stacks_of_seeds() -> Iterator[None]:
    """Without a GPU, `torch.manual_seed` writes the stack down three times, for a device that never starts.

    The stack of a test is deep, and a training sets a seed in each step.
    """
    with pytest.MonkeyPatch.context() as patch:
        for module in (torch.cuda, torch.xpu, torch.mtia):
            patch.setattr(module, "traceback", SimpleNamespace(format_stack=list))
        yield


@pytest.fixture(scope="session")
def shared_runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs of training that many tests compare with, see `run_helpers.SharedRuns`."""
    from run_helpers import SharedRuns  # which imports fastadv

    return SharedRuns(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill the memory that torch hands out with NaN, so that an element left unwritten shows.

    `torch.use_deterministic_algorithms` does the same, and imports torch's compiler for its settings.
    """
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.fixture
def seeded() -> None:
    """What a test draws from torch's generator does not depend on the tests that ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread, as networks this small run slower on more, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
