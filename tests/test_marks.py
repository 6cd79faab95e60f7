"""The marks of tests: each selects tests, and `pytest --quick` keeps a part of every folder."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from paths import ROOT, TESTS, environment

# About half of what each mark selects now. A mark that is lost leaves fewer.
FEWEST = {
    "slow": 300,
    "processes": 50,
    "compiles": 150,
    "other_dtype": 300,
    "longest": 60,
    "whole": 300,
    "interpreter": 200,
    "emulator": 300,
    "other_order": 100,
    "refusals": 50,
    "every_op": 2,
}

pytestmark = [pytest.mark.slow, pytest.mark.processes]
COLLECTED = """
import sys
import pytest

class Marks:
    def pytest_collection_finish(self, session):
        for item in session.items:
            print("item", item.path, *{mark.name for mark in item.iter_markers()}, flush=True)

sys.exit(pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[Marks()]))
"""


def collected(*words: str) -> list[tuple[Path, list[str]]]:
    """The files and marks of the tests that pytest would run."""
    command = [sys.executable, "-c", COLLECTED, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("item ")]
    return [(Path(words[0]), words[1:]) for words in lines]


def registered() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^markers = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    return set(re.findall(r'^ *"(\w+)', block[1], re.MULTILINE))


def test_each_mark_selects_tests() -> None:
    counts = Counter(mark for _, marks in collected() for mark in marks)
    assert set(FEWEST) | {"gpu"} == registered()
    assert importlib.util.find_spec("torch") and counts["gpu"] > 0
    for mark, fewest in FEWEST.items():
        assert counts[mark] >= fewest, f"{mark} selects {counts[mark]} tests"


def test_quick_has_tests_of_every_folder() -> None:
    found = collected("--quick")
    folders = {path.relative_to(TESTS).parts[0] for path, _ in found}
    with_tests = {path.parent.name for path in TESTS.glob("*/test_*.py")}
    assert with_tests - folders <= {"fuzz"}
    assert not {mark for _, marks in found for mark in marks} & {"slow", "processes", "gpu"}
    assert 1000 < len(found) < 3000
