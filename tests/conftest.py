"""Fixtures that several test files share."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

_UNPACK = Path(__file__).resolve().parents[2] / "shared" / "data" / "unpack_cifar10.py"


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


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill the memory that torch hands out with NaN, so that an element left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread, as networks this small run slower on more, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
