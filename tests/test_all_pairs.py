# SPDX-License-Identifier: Apache-2.0
"""all_pairs.py: nothing is lost, and each two values meet where nothing is slow."""

from __future__ import annotations

from itertools import combinations, product

import pytest
from all_pairs import parametrize_by_pairs

CHOICES = {
    "case": ["adam", "sgd", "lion", "lamb", "nadam"],
    "way": ["ours", "theirs"],
    "scaled": {"plain": False, "scaled": True},
    "max_norm": [0.0, 0.5, 2.0],
}


def test_every_two_values_meet_in_the_quick_ones_and_every_combination_is_there() -> None:
    decorated = parametrize_by_pairs(**CHOICES)
    names, cases = decorated.args
    assert names == tuple(CHOICES)
    values = [list(v.values()) if isinstance(v, dict) else v for v in CHOICES.values()]
    assert [tuple(case.values) for case in cases] == [*product(*values)]
    quick = [case.values for case in cases if case.marks == ()]
    slow = [case for case in cases if case.marks]
    assert all(mark.name == "slow" for case in slow for mark in case.marks)
    for i, j in combinations(range(len(values)), 2):
        met = {(row[i], row[j]) for row in quick}
        assert met == {*product(values[i], values[j])}
    assert 15 <= len(quick) <= 20  # no fewer can be: each case meets each norm


def test_ids_say_what_is_chosen() -> None:
    _, cases = parametrize_by_pairs(**CHOICES).args
    assert cases[0].id == "adam-ours-plain-0.0"
    assert isinstance(parametrize_by_pairs(a=[1]), pytest.MarkDecorator)
