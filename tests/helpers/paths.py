"""Where the tests are, and how a process that a test starts finds their helpers."""

from __future__ import annotations

import os
from pathlib import Path

HELPERS = Path(__file__).resolve().parent
TESTS = HELPERS.parent
ROOT = TESTS.parent


def environment(**variables: str) -> dict[str, str]:
    """This process's environment, with the helpers importable, and with more variables."""
    found = (str(TESTS), str(HELPERS), os.environ.get("PYTHONPATH", ""))
    whole = {**os.environ, "PYTHONPATH": os.pathsep.join(found), **variables}
    # pytest-benchmark would take a process of its own for a worker of pytest-xdist, and not measure in it.
    whole.pop("PYTEST_XDIST_WORKER", None)
    return whole
