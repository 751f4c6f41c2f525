# SPDX-License-Identifier: Apache-2.0
"""Every rule, storage and option of the CUDA sources under sanitizers; `make gpu-emulate` runs it.

`make test` has three rules in fp32 of it, and faults of every kind (test_cuda_faults.py). Here the
bits must be the oracle's, too. AddressSanitizer sees a step of all storages in one plan in 1 s,
ThreadSanitizer in 5 to 15.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import cuda_cases
import pytest
from cuda_cases import (
    ADDRESS,
    FP32,
    OPTIONS,
    STORAGES,
    THREAD,
    Asked,
    Group,
    Parameter,
    Program,
    assert_same,
    expected,
    joint_plan,
    mixed_plan,
    run_steps,
)

from pyupdate.kernels.rules import RULES

pytestmark = pytest.mark.slow

ALL = range(len(STORAGES))
# One stage; three sums and a turn; scalars that prepare counts.
SOME = {name: RULES[name] for name in ("adamw", "lamb", "nadam")}
# Two passes and no norm; halves rounded by chance; the launch of a norm by others, and an average.
LAUNCHES = ("scaler", "chance", "all")
# Fewer than a bucket has chunks, so a block takes more than one; and 256 threads each, of which
# ThreadSanitizer holds some 8,000.
BLOCKS = 3


@pytest.fixture(scope="module")
def under_address(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return cuda_cases.build(tmp_path_factory.mktemp("address"), RULES, ADDRESS)


@pytest.fixture(scope="module")
def all_in_fp32(tmp_path_factory: pytest.TempPathFactory) -> Program:
    folder = tmp_path_factory.mktemp("thread")
    return cuda_cases.build(folder, RULES, THREAD, storages=(FP32,))


@pytest.fixture(scope="module")
def some_in_all(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return cuda_cases.build(tmp_path_factory.mktemp("thread-storages"), SOME, THREAD)


def plan(rule: str, asked: Asked, storages: Sequence[int]) -> tuple[list[Group], list[Parameter]]:
    """A step that follows others: a second one would run what the first has run."""
    groups, rows = mixed_plan(rule, asked, 61, storages)
    for row in rows:
        del row.grads[1:]
    return groups, rows


def check(program: Program, rule: str, options: str, storages: Sequence[int]) -> None:
    asked = OPTIONS[options]
    groups, rows = plan(rule, asked, storages)
    found = run_steps(program, groups, rows, asked, order=3, blocks=BLOCKS)
    assert_same(found, expected(groups, rows, asked), rows)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rule", RULES)
def test_no_address_and_no_undefined_behaviour_in_any_storage(under_address, rule, options):
    check(under_address, rule, options, ALL)


@pytest.mark.parametrize("rule", RULES)
def test_no_race_in_any_rule(all_in_fp32, rule):
    for options in LAUNCHES:
        check(all_in_fp32, rule, options, [FP32])


@pytest.mark.parametrize("options", LAUNCHES)
@pytest.mark.parametrize("rule", SOME)
def test_no_race_in_any_storage(some_in_all, rule, options):
    check(some_in_all, rule, options, ALL)


@pytest.mark.parametrize("build", ["under_address", "some_in_all"])
def test_several_plans_in_one_step(build, request):
    program = request.getfixturevalue(build)
    groups, rows, asked = joint_plan(tuple(SOME), 62)
    found = run_steps(program, groups, rows, asked, order=3, blocks=BLOCKS)
    assert_same(found, expected(groups, rows, asked), rows)


STATE = "state[s] = read<State, U>(state_[s] + from);"
FAULTS = {
    # Only where the state is wider than the parameter, so that a pack takes it in two parts.
    "address": (
        ADDRESS,
        STATE,
        STATE.replace("from", "from + (sizeof(State) > sizeof(Param) ? U : 0)"),
        "heap-buffer-overflow",
    ),
    "thread": (
        THREAD,
        "item));\n    __syncthreads();\n    const auto& step",
        "item));\n    const auto& step",
        "data race",
    ),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_of_one_storage_is_seen_in_its_plan(tmp_path: Path, what: str) -> None:
    flags, old, new, said = FAULTS[what]
    storage = STORAGES.index(("fp16, state fp32", *STORAGES[-1][1:]))
    rules = {"adan": RULES["adan"]}
    edits = {"apply.cuh": (old, new)}
    program = cuda_cases.build(tmp_path, rules, flags, edits=edits, storages=(storage,))
    asked = OPTIONS["plain"]
    groups, rows = plan("adan", asked, [storage])
    done = run_steps(program, groups, rows, asked, order=3, blocks=BLOCKS, check=False)
    assert isinstance(done, subprocess.CompletedProcess)
    assert done.returncode != 0
    assert said in done.stderr.decode()
