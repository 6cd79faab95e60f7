"""A pytest plugin: the tests of a process run with the pretended GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gpu_rehearsal.start import start

start()
from gpu_rehearsal import torch_cuda  # noqa: E402  imports torch


@pytest.fixture(autouse=True)
def no_faults() -> Iterator[None]:
    """A fault fails the test in which it occurs, also where the code under test has caught its exception."""
    torch_cuda.faults()
    yield
    found = torch_cuda.faults()
    assert not found, found
