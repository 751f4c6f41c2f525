# SPDX-License-Identifier: Apache-2.0
"""Tests of many choices at once: what `make test` leaves to `make slow`.

Most faults show where two choices meet. So of a test that is marked `all_pairs`, each two values of
its parameters that can meet do so in `make test`, and the other combinations are in `make slow`. Of
one that is marked `each_value`, each value occurs in `make test`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations

import pytest

Combination = tuple[int, ...]
"""A value of each parameter, by a number that is its own."""

MARKS = {"all_pairs": 2, "each_value": 1}
"""How many values are looked at together."""


def leave_what_repeats(items: Sequence[pytest.Item]) -> None:
    """Mark as slow what adds no value, or pair of values, to the other items of its test."""
    tests = defaultdict(list)
    for item in items:
        for mark in MARKS:
            if isinstance(item, pytest.Function) and item.get_closest_marker(mark):
                # Every item has the very objects of the lists that the test is parametrized by.
                values = tuple(map(id, item.callspec.params.values()))
                tests[item.parent, item.originalname, mark].append((values, item))
    for (_, _, mark), cases in tests.items():
        kept = covering([combination for combination, _ in cases], MARKS[mark])
        for combination, item in cases:
            if combination not in kept:
                item.add_marker(pytest.mark.slow)


def covering(every: Sequence[Combination], together: int) -> set[Combination]:
    """Some of the combinations that have all values, alone or in pairs: greedily, the most new."""
    had = {one: set(combinations(enumerate(one), together)) for one in every}
    missing = set().union(*had.values())
    kept = set()
    while missing:
        best = max(had, key=lambda one: len(had[one] & missing))
        kept.add(best)
        missing -= had.pop(best)
    return kept
