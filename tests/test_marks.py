"""The marks of tests: each selects tests, and `pytest --quick` keeps a part of every folder.

Both are looked up among the tests that this run has collected, hence only in a run of the whole suite.
"""

from __future__ import annotations

import re
from collections import Counter

import pytest
from conftest import QUICK_LEAVES_OUT, quick
from paths import TESTS

# About half of the tests that each mark selects now, so that a mark that is lost shows.
FEWEST = {
    "gpu": 0,  # without a device most of them are not even made
    "slow": 500,
    "processes": 50,
    "compiles": 180,
    "other_dtype": 300,
    "longest": 35,
    "covering": 250,
    "whole": 300,
    "interpreter": 500,
    "other_order": 75,
    "refusals": 150,
    "every_op": 2,
}


@pytest.fixture
def everything(request: pytest.FixtureRequest) -> list[pytest.Item]:
    """All tests, if they have been collected."""
    option, items = request.config.option, request.session.items
    files = len(list(TESTS.rglob("test_*.py")))
    whole = len({item.path for item in items}) > 0.9 * files  # packages that are absent cost some
    if option.quick or option.markexpr or option.keyword or not whole:
        pytest.skip("a part of the tests was chosen")
    return items


def test_each_mark_selects_tests(everything: list[pytest.Item]) -> None:
    names = [{mark.name for mark in item.iter_markers()} for item in everything]
    counts = Counter(mark for marks in names for mark in marks)
    for mark, fewest in FEWEST.items():
        assert counts[mark] >= fewest, f"{mark} selects {counts[mark]} tests"


def test_quick_has_tests_of_every_folder(everything: list[pytest.Item]) -> None:
    chosen = quick(everything)
    folders = {path.parent for path in TESTS.glob("*/test_*.py")}
    assert folders - {item.path.parent for item in chosen} == {TESTS / "fuzz"}
    assert len(everything) / 10 < len(chosen) < len(everything) / 3
    for item in chosen:
        assert not any(item.get_closest_marker(mark) for mark in QUICK_LEAVES_OUT)


def test_every_mark_is_counted() -> None:
    text = (TESTS.parent / "pyproject.toml").read_text()
    block = re.search(r"^markers = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    assert set(re.findall(r'^ *"(\w+)', block[1], re.MULTILINE)) == set(FEWEST)
