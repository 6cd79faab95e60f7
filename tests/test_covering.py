"""Samples that are left out because others have their facts."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from itertools import chain, product

import pytest
from covering import covering, pairs
from thinning import redundant

FACTORS = {"dtype": "abcd", "norm": "xyz", "layout": "12", "way": "PQR"}
PRODUCT: list[Mapping[str, Hashable]] = [
    dict(zip(FACTORS, values, strict=True)) for values in product(*FACTORS.values())
]


def _facts(found: list[Mapping[str, Hashable]]) -> set[Hashable]:
    return set(chain.from_iterable(map(pairs, found)))


def test_every_pair_meets_in_few_samples() -> None:
    chosen = [PRODUCT[place] for place in covering([pairs(one) for one in PRODUCT])]
    assert _facts(chosen) == _facts(PRODUCT)
    assert 12 <= len(chosen) <= 15  # of 72; the two longest lists have 12 pairs


def test_pairs_that_never_meet_are_not_asked_for() -> None:
    possible = [one for one in PRODUCT if (one["dtype"], one["norm"]) != ("a", "x")]
    chosen = [possible[place] for place in covering([pairs(one) for one in possible])]
    assert _facts(chosen) == _facts(possible)


def test_products_of_two_and_lists_stay_whole() -> None:
    two = [pairs({"dtype": one, "norm": other}) for one in "abc" for other in "xy"]
    assert covering(two) == list(range(6))
    assert covering([pairs({"dtype": one}) for one in "abc"]) == [0, 1, 2]
    assert covering([]) == []


def test_of_samples_with_equal_facts_the_first_is_taken() -> None:
    assert covering([{1}, {1, 2}, {2, 1}, {3}]) == [1, 3]


@pytest.mark.covering
@pytest.mark.parametrize("first", ["a", "b"])
@pytest.mark.parametrize("second", [[1], [2]])
@pytest.mark.parametrize("third", [True, False])
def test_a_marked_test_runs_in_part(
    first: str, second: list[int], third: bool, request: pytest.FixtureRequest
) -> None:
    stem = request.node.nodeid.partition("[")[0]
    mine = [item for item in request.session.items if item.nodeid.partition("[")[0] == stem]
    if request.config.option.thorough:
        assert len(mine) - len(redundant(mine)) <= 4
    else:
        assert len(mine) <= 4 and not redundant(mine)
