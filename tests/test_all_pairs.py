# SPDX-License-Identifier: Apache-2.0
"""all_pairs.py: each two values meet where nothing is slow, and nothing is lost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path

from all_pairs import covering

SIZES = (7, 2, 2, 3)


def test_every_two_values_meet_in_few_combinations() -> None:
    every = [*product(*map(range, SIZES))]
    kept = covering(every, 2)
    assert kept <= {*every}
    for i, j in combinations(range(len(SIZES)), 2):
        met = {(one[i], one[j]) for one in kept}
        assert met == {*product(range(SIZES[i]), range(SIZES[j]))}
    assert 21 <= len(kept) <= 25  # 7 * 3 at least


def test_every_value_occurs_in_as_many_combinations_as_the_longest_list_has() -> None:
    kept = covering([*product(*map(range, SIZES))], 1)
    assert [{one[i] for one in kept} for i in range(len(SIZES))] == [{*range(n)} for n in SIZES]
    assert len(kept) == max(SIZES)


def test_a_pair_that_cannot_meet_is_not_asked_for() -> None:
    assert covering([(0, 0, 0), (1, 1, 1)], 2) == {(0, 0, 0), (1, 1, 1)}
    assert covering([(0,)], 2) == set()


TESTS = """
import pytest

@pytest.fixture(params=["cpu", "reference", "cuda"])
def backend(request):
    return request.param

@pytest.mark.all_pairs
@pytest.mark.parametrize("way", ["ours", "theirs", "built"])
@pytest.mark.parametrize("case", ["adam", "sgd", "lion"])
def test_marked(case, way, backend):
    pass

@pytest.mark.each_value
@pytest.mark.parametrize("way", ["ours", "theirs", "built"])
@pytest.mark.parametrize("case", ["adam", "sgd", "lion"])
def test_of_values(case, way, backend):
    pass

@pytest.mark.parametrize("way", ["ours", "theirs", "built"])
@pytest.mark.parametrize("case", ["adam", "sgd", "lion"])
def test_other(case, way, backend):
    pass
"""
HOOK = """
import pytest
from all_pairs import leave_what_repeats

@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items):
    leave_what_repeats(items)
    return (yield)
"""
INI = """
[pytest]
markers =
    slow
    all_pairs
    each_value
"""


def test_make_test_runs_some_of_a_marked_test_and_make_slow_the_others(tmp_path: Path) -> None:
    for name, text in {"test_some.py": TESTS, "conftest.py": HOOK, "pytest.ini": INI}.items():
        (tmp_path / name).write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PYTEST_ADDOPTS": ""}

    def chosen(marks: str) -> list[tuple[str, list[str]]]:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", marks],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        found = re.findall(r"^test_some.py::(\w+)\[(.*)\]$", done.stdout, flags=re.MULTILINE)
        return [(name, values.split("-")) for name, values in found]

    quick, slow = chosen("not slow"), chosen("slow")
    assert [name for name, _ in quick].count("test_other") == 27
    marked = [values for name, values in quick if name == "test_marked"]
    assert 9 <= len(marked) <= 12  # three times three at least
    assert [name for name, _ in slow].count("test_marked") == 27 - len(marked)
    of_values = [values for name, values in quick if name == "test_of_values"]
    assert len(of_values) == len({*zip(*of_values, strict=True)}) == 3
    assert all(len({*values}) == 3 for values in zip(*of_values, strict=True))
    assert {name for name, _ in slow} == {"test_marked", "test_of_values"}
    for i, j in combinations(range(3), 2):
        met = {(one[i], one[j]) for one in marked}
        assert met == {*product({a for a, _ in met}, {b for _, b in met})}
