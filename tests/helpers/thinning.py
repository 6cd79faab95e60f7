"""A pytest plugin: of a test marked `covering` runs a part in which every pair of its parameters' values meets.

`facts` of the mark makes other facts of the parameters, each of which then occurs. `--thorough` runs all.
"""

from __future__ import annotations

from collections.abc import Hashable

import pytest
from covering import Facts, covering, pairs
from marks import parameters


class Thinning:
    @pytest.hookimpl(trylast=True)  # after the choice by name, by mark, and by other plugins
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        if config.getoption("--thorough"):
            return
        left_out = redundant(items)
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def redundant(items: list[pytest.Item]) -> set[pytest.Item]:
    """The tests marked `covering` that others of the same function make up for."""
    found = set()
    by_function: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("covering"):
            by_function.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for alike in by_function.values():
        chosen = set(covering([_facts(item) for item in alike]))
        found.update(item for place, item in enumerate(alike) if place not in chosen)
    return found


def _facts(item: pytest.Item) -> Facts:
    mark = item.get_closest_marker("covering")
    assert mark is not None
    if "facts" in mark.kwargs:
        return mark.kwargs["facts"](parameters(item))  # type: ignore[no-any-return]
    return pairs({name: _comparable(value) for name, value in parameters(item).items()})


def _comparable(value: object) -> Hashable:
    """A value of a list of parameters is one object in all tests, hence it may stand for itself."""
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value
