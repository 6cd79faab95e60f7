"""Few of many samples, in which each fact of theirs occurs.

A defect shows for one value, or for two values that meet, far more often than for three of them. So of the product
of three or more parameters, which repeats every pair many times, a part tells as much.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Hashable, Mapping, Sequence
from itertools import chain, combinations

Facts = Collection[Hashable]


def covering(facts: Sequence[Facts]) -> list[int]:
    """Choose samples until every fact that any of them has is there.

    It takes the sample with the most facts that are still missing, and of several the first. So the choice depends
    on the samples and their order alone.

    Args:
        facts: of each sample.

    Returns:
        The chosen places in the sequence, ascending.
    """
    missing = set(chain.from_iterable(facts))
    # How many facts a sample adds only falls while others are chosen. So the first whose number still holds
    # is the best.
    waiting = [(-len(set(found)), place) for place, found in enumerate(facts)]
    heapq.heapify(waiting)
    chosen = []
    while missing:
        promised, place = heapq.heappop(waiting)
        new = missing.intersection(facts[place])
        if len(new) == -promised:
            chosen.append(place)
            missing -= new
        elif new:
            heapq.heappush(waiting, (-len(new), place))
    return sorted(chosen)


def pairs(values: Mapping[str, Hashable]) -> Facts:
    """The facts of which every two values meet; the value itself where there is one alone."""
    named = sorted(values.items(), key=lambda item: item[0])
    return set(combinations(named, min(2, len(named))))
