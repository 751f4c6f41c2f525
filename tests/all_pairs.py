# SPDX-License-Identifier: Apache-2.0
"""Tests of many choices at once: what `make test` leaves to `make slow`.

Most faults show where two choices meet (all-pairs testing): so each two values that can meet do so
in `make test`, and every combination of them in `make slow`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations, product
from typing import Any

import pytest

Pairs = set[tuple[tuple[int, int], tuple[int, int]]]


def parametrize_by_pairs(**choices: Mapping[str, Any] | Iterable[Any]) -> pytest.MarkDecorator:
    """Every combination of these values; those that add no pair to the others are slow.

    Args:
        choices: the values of each argument, or ids -> values.
    """
    named = [
        dict(values) if isinstance(values, Mapping) else {str(value): value for value in values}
        for values in choices.values()
    ]
    sizes = [range(len(values)) for values in named]
    kept = covering([*product(*sizes)])
    cases = []
    for at in product(*sizes):
        ids, values = zip(
            *([*each.items()][k] for each, k in zip(named, at, strict=True)), strict=True
        )
        marks = () if at in kept else pytest.mark.slow
        cases.append(pytest.param(*values, id="-".join(ids), marks=marks))
    return pytest.mark.parametrize(tuple(choices), cases)


def pairs_of(combination: tuple[int, ...]) -> Pairs:
    """(argument, value) twice."""
    return set(combinations(enumerate(combination), 2))


def covering(every: list[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """Some of the combinations that have all pairs: each time one with the most that are new."""
    missing: Pairs = set().union(*map(pairs_of, every))
    kept = set()
    while missing:
        best = max(every, key=lambda combination: len(pairs_of(combination) & missing))
        kept.add(best)
        missing -= pairs_of(best)
    return kept
