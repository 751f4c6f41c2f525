# SPDX-License-Identifier: Apache-2.0
"""Tests of many choices at once: what `make test` leaves to `make slow`.

Most faults show where two choices meet. So of a test that is marked `all_pairs`, each two values of
its parameters that can meet do so in `make test`, and the other combinations are in `make slow`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations

import pytest

Combination = tuple[int, ...]
"""A value of each parameter, by a number that is its own."""


def leave_what_repeats_pairs(items: Sequence[pytest.Item]) -> None:
    """Mark as slow what adds no pair of values to the other items of its test."""
    tests = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("all_pairs"):
            # Every item has the very objects of the lists that the test is parametrized by.
            values = tuple(map(id, item.callspec.params.values()))
            tests[item.parent, item.originalname].append((values, item))
    for cases in tests.values():
        kept = covering([combination for combination, _ in cases])
        for combination, item in cases:
            if combination not in kept:
                item.add_marker(pytest.mark.slow)


def covering(every: Sequence[Combination]) -> set[Combination]:
    """Some of the combinations that have all pairs: each time one with the most that are new."""
    pairs = {one: set(combinations(enumerate(one), 2)) for one in every}
    missing = set().union(*pairs.values())
    kept = set()
    while missing:
        best = max(pairs, key=lambda one: len(pairs[one] & missing))
        kept.add(best)
        missing -= pairs.pop(best)
    return kept
