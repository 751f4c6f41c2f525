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
    kept = covering(every)
    assert kept <= {*every}
    for i, j in combinations(range(len(SIZES)), 2):
        met = {(one[i], one[j]) for one in kept}
        assert met == {*product(range(SIZES[i]), range(SIZES[j]))}
    assert 21 <= len(kept) <= 25  # 7 * 3 at least


def test_a_pair_that_cannot_meet_is_not_asked_for() -> None:
    assert covering([(0, 0, 0), (1, 1, 1)]) == {(0, 0, 0), (1, 1, 1)}
    assert covering([(0,)]) == set()


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

@pytest.mark.parametrize("way", ["ours", "theirs", "built"])
@pytest.mark.parametrize("case", ["adam", "sgd", "lion"])
def test_other(case, way, backend):
    pass
"""
HOOK = """
import pytest
from all_pairs import leave_what_repeats_pairs

@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items):
    leave_what_repeats_pairs(items)
    return (yield)
"""
INI = """
[pytest]
markers =
    slow
    all_pairs
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
    assert len(slow) == 27 - len(marked)
    assert {name for name, _ in slow} == {"test_marked"}
    for i, j in combinations(range(3), 2):
        met = {(one[i], one[j]) for one in marked}
        assert met == {*product({a for a, _ in met}, {b for _, b in met})}
