# SPDX-License-Identifier: Apache-2.0
"""The CUDA sources under sanitizers, and faults that are planted in copies of them: each is seen.

A fault is a text that is replaced in a copy of csrc/cuda; the sources themselves know of none. What
must find it is a sanitizer, the emulator, or a comparison with the oracle.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import cuda_cases
import numpy as np
import pytest
from cuda_cases import (
    ADDRESS,
    FP32,
    THREAD,
    Asked,
    Group,
    Parameter,
    Program,
    expected,
    group_of,
    row_of,
    run_steps,
)

from pyupdate.kernels.rules import RULES

SOME = ("sgd", "adamw", "lamb")
JOINING = "lamb"
"""It has everything that joins threads and blocks."""


def small(rule: str, sizes: tuple[int, ...]) -> tuple[list[Group], list[Parameter]]:
    rng = np.random.default_rng(51)
    groups = [group_of(rule)]
    rows = [row_of(rng, groups, 0, size, shift=k % 2) for k, size in enumerate(sizes)]
    for row in rows:
        row.grads = row.grads[:1]
    return groups, rows


def build(
    folder: Path,
    flags: tuple[str, ...] = (),
    *,
    file: str = "",
    old: str = "",
    new: str = "",
    rules: tuple[str, ...] = (JOINING,),
    main: str = "cuda_steps.cpp",
) -> Program:
    """A build of some rules in fp32, faulty where a text is to be replaced."""
    entries = {name: RULES[name] for name in rules}
    edits = {file: (old, new)} if file else None
    return cuda_cases.build(folder, entries, flags, edits=edits, storages=(FP32,), main=main)


def outcome(program: Program, sizes: tuple[int, ...] = (5, 70, 40_001)) -> tuple[int, str]:
    """The exit status and stderr of a clipped step."""
    groups, rows = small(JOINING, sizes)
    asked = Asked(reduce=True, max_norm=0.5)
    done = run_steps(program, groups, rows, asked, order=3, check=False)
    assert isinstance(done, subprocess.CompletedProcess)
    return done.returncode, done.stderr.decode()


# ----- clean --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "rules"),
    [
        pytest.param(ADDRESS, SOME, id="address"),
        pytest.param(THREAD, (JOINING,), marks=pytest.mark.slow, id="thread"),
    ],
)
def test_sanitizers_find_nothing_and_the_bits_are_the_oracles(tmp_path, flags, rules):
    program = build(tmp_path, flags, rules=rules)
    for rule in rules:
        for sizes in ((0, 1, 7, 70, 1_025, 40_001), (40_001, 5, 70)):
            groups, rows = small(rule, sizes)
            asked = Asked(reduce=True, max_norm=0.5, clip_value=1.0)
            found = run_steps(program, groups, rows, asked, order=3)
            for a, b in zip(found.arrays, expected(groups, rows, asked).arrays, strict=True):
                for name, wanted in b.items():
                    assert np.array_equal(a[name], wanted), name


# ----- planted ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_element_too_far_is_seen_by_address_sanitizer(tmp_path):
    old = "for (int i = packs * V; i < count; ++i) single(i);"
    program = build(tmp_path, ADDRESS, file="device.h", old=old, new=old.replace("<", "<=", 1))
    code, said = outcome(program)
    assert code != 0
    assert "heap-buffer-overflow" in said


@pytest.mark.slow
def test_a_shared_index_off_by_one_is_seen_by_undefined_behaviour_sanitizer(tmp_path):
    old = "tree[threadIdx.x] = x;"
    new = "tree[threadIdx.x + 1] = x;"
    code, said = outcome(build(tmp_path, ADDRESS, file="sums.cuh", old=old, new=new))
    assert code != 0
    assert "index 256 out of bounds" in said


@pytest.mark.slow  # a build under ThreadSanitizer each
def test_a_missing_barrier_is_seen_by_thread_sanitizer(tmp_path):
    old = "tree[threadIdx.x] = x;\n  __syncthreads();"
    new = "tree[threadIdx.x] = x;"
    code, said = outcome(build(tmp_path, THREAD, file="sums.cuh", old=old, new=new))
    assert code != 0
    assert "data race" in said


@pytest.mark.slow  # a build under ThreadSanitizer each
def test_a_missing_fence_before_the_ticket_is_seen_by_thread_sanitizer(tmp_path):
    old = "__threadfence();\n    before = atomicAdd"
    code, said = outcome(
        build(tmp_path, THREAD, file="sums.cuh", old=old, new="before = atomicAdd")
    )
    assert code != 0
    assert "data race" in said


BEFORE = ("__threadfence();\n    last = atomicAdd", "last = atomicAdd")
BEHIND = ("== gridDim.x;\n    __threadfence();", "== gridDim.x;")


@pytest.mark.slow  # a build under ThreadSanitizer each
@pytest.mark.parametrize(("old", "new"), [BEFORE, BEHIND], ids=["before", "behind"])
def test_a_missing_fence_at_the_last_blocks_ticket_is_seen_by_thread_sanitizer(tmp_path, old, new):
    program = build(tmp_path, THREAD, file="reduce.cu", old=old, new=new)
    # The first block fences for its part of the long row, then sums a short one.
    for sizes in ((40_001, 5, 70), (5, 70, 1_000, 3_000)):
        code, said = outcome(program, sizes)
        assert code != 0, sizes
        assert "data race" in said


@pytest.mark.slow  # a build under ThreadSanitizer each
def test_a_missing_barrier_before_the_last_blocks_ticket_is_seen_by_thread_sanitizer(tmp_path):
    old = "reduce_items(work, tree);\n  __syncthreads();"
    new = "reduce_items(work, tree);"
    program = build(tmp_path, THREAD, file="reduce.cu", old=old, new=new, rules=("adamw",))
    # Thread 175 of the first block finds an inf: it sets the flag, which thread 0 is to publish.
    # (The first warp meets at the row's ticket, behind the flag.)
    # Two blocks and one inf: ThreadSanitizer remembers four accesses of 8 bytes, and the ticket is
    # in the same 8.
    groups, rows = small("adamw", (1_000, 1_000, 1_000))
    rows[2].grads[0][4 * 175] = np.inf
    asked = Asked(reduce=True, max_norm=0.5)
    done = run_steps(program, groups, rows, asked, order=1, blocks=2, check=False)
    assert isinstance(done, subprocess.CompletedProcess)
    assert done.returncode != 0
    assert "data race" in done.stderr.decode()


@pytest.mark.slow
def test_a_barrier_in_a_divergent_branch_ends_the_launch(tmp_path):
    old = "  __syncthreads();\n  double own[kTurns];"
    new = f"  if (threadIdx.x < kWarp) {old.lstrip()}"
    code, said = outcome(build(tmp_path, file="sums.cuh", old=old, new=new))
    assert code == 3
    assert "barrier" in said


@pytest.mark.slow
def test_found_inf_compared_with_one_is_seen_with_two(tmp_path):
    old = "*request.found_inf != 0.0f"
    new = "*request.found_inf == 1.0f"
    program = build(tmp_path, file="finish.cuh", old=old, new=new, rules=("sgd",))
    groups, rows = small("sgd", (70,))
    for found_inf, is_skipped in ((1.0, True), (2.0, False)):
        asked = Asked(found_inf=found_inf)
        found = run_steps(program, groups, rows, asked)
        assert found.outcomes[0][3] is is_skipped  # the fault shows with 2 alone
        assert expected(groups, rows, asked).outcomes[0][3]


def far(program: Program) -> int:
    done = subprocess.run([program.path], capture_output=True, check=False, env=dict(os.environ))
    if done.returncode == 77:
        pytest.skip("this machine reserves no 17 GB of memory")
    return done.returncode


@pytest.mark.slow
def test_a_row_of_more_than_2_31_elements_is_stepped_to_its_end(tmp_path):
    assert far(build(tmp_path, rules=("sgd",), main="cuda_far.cpp")) == 0


@pytest.mark.slow
def test_a_32_bit_index_is_seen_by_it(tmp_path):
    old = "chunk.begin = chunk.index * kChunk;"
    new = "chunk.begin = static_cast<int32_t>(chunk.index * kChunk);"
    faulty = build(tmp_path, rules=("sgd",), main="cuda_far.cpp", file="device.h", old=old, new=new)
    assert far(faulty) != 0
