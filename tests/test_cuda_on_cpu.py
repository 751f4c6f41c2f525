# SPDX-License-Identifier: Apache-2.0
"""The CUDA sources, compiled as host C++ and run thread by thread, give the oracle's bits.

The kernels are those of csrc/cuda, unchanged; tests/device/cuda_on_cpu.h stands in for the GPU.
What a real one adds (its compiler's last step, blocks that run at once, streams) is not shown here.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from bits import assert_same_bits
from compiling import device_program
from cuda_cases import (
    OPTIONS,
    STORAGES,
    Asked,
    Group,
    Parameter,
    Program,
    assert_same,
    expected,
    group_of,
    joint_plan,
    row_of,
    run_steps,
    with_averages,
)

from pyupdate.kernels import oracle
from pyupdate.kernels.rules import RULES

# A row of no element, rows that end within a pack of 16 bytes, of more than one block of lanes, of
# more than one chunk.
SIZES = (*range(20), 33, 63, 64, 65, 70, 1025, 2049)
CHUNKS = (16_383, 16_384, 16_385, 100_003)


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return Program(device_program("cuda_steps", tmp_path_factory.mktemp("cuda")), tuple(RULES))


def compare(
    program: Program, groups: list[Group], rows: list[Parameter], asked: Asked, **more: int
) -> Any:
    found = run_steps(program, groups, rows, asked, **more)
    assert_same(found, expected(groups, rows, asked), rows)
    return found


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_gives_the_oracles_bits(program, rule):
    rng = np.random.default_rng(41)
    groups = [group_of(rule), group_of(rule, count=6, in_tensor=0)]
    rows = [row_of(rng, groups, k % 2, n, shift=k % 4) for k, n in enumerate(SIZES)]
    rows += [row_of(rng, groups, 0, 40_000, identity=3), row_of(rng, groups, 1, 33_001, shift=1)]
    compare(program, groups, rows, Asked(reduce=True, max_norm=1.0, clip_value=0.4), order=1)


SOME = ("adamw", "sgd_momentum", "lamb")
OTHER_RULES = [pytest.param(rule, marks=pytest.mark.slow) for rule in RULES if rule not in SOME]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rule", [*SOME, *OTHER_RULES])
def test_options_on_every_storage_in_one_plan(program, rule, options):
    rng = np.random.default_rng(42)
    groups = [group_of(rule, storage, count=2) for storage in range(len(STORAGES))]
    rows = [
        row_of(rng, groups, storage, size, shift=shift, identity=(1 << 32) + size, step_bytes=wide)
        for storage in range(len(STORAGES))
        for size, shift, wide in ((0, 0, 4), (13, 1, 8), (1_003, 0, 0), (16_401, 0, 4))
    ]
    rows += [row_of(rng, groups, 2 + k, 5_001, shift=3) for k in range(4)]
    for group in range(
        len(groups)
    ):  # where there is no counter, another row of the hyper row has it
        assert next(row for row in rows if row.group == group).step_bytes
    if OPTIONS[options].ema_weight:
        with_averages(rng, groups, rows)
    compare(program, groups, rows, OPTIONS[options], order=5, blocks=7)


IN_ORDERS = ("adamw", "lamb", "nadam", "novograd")
REST = [pytest.param(rule, marks=pytest.mark.slow) for rule in RULES if rule not in IN_ORDERS]


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("rule", [*IN_ORDERS, *REST])
def test_no_order_of_threads_and_no_grid_changes_a_bit(program, rule, order):
    rng = np.random.default_rng(43)
    groups = [group_of(rule, count=1)]
    rows = [row_of(rng, groups, 0, size, shift=shift) for size in CHUNKS for shift in (0, 1)]
    compare(program, groups, rows, OPTIONS["clip"], order=order, blocks=1 + 5 * order)


@pytest.mark.all_pairs
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("rule", ["adamw", "lamb", "nadam"])
@pytest.mark.parametrize("storage", range(len(STORAGES)))
def test_a_skipped_step_changes_no_bit_and_a_later_one_counts_on(program, rule, storage, bad):
    rng = np.random.default_rng(44)
    groups = [group_of(rule, storage, count=3)]
    rows = [row_of(rng, groups, 0, size) for size in (70, 3_000, 20_001)]
    spoiled = oracle.load(rows[2].grads[0])
    spoiled[20_000] = bad
    rows[2].grads[0] = oracle.store(spoiled, rows[2].grads[0])
    found = compare(program, groups, rows, Asked(reduce=True, skip_nonfinite=True))
    assert [skipped for *_, skipped in found.outcomes] == [True, False]
    assert found.counts == [4]
    once = [Parameter(0, row.param, row.state, row.grads[:1]) for row in rows]
    kept = run_steps(program, groups, once, Asked(reduce=True, skip_nonfinite=True))
    for row, after in zip(once, kept.arrays, strict=True):
        assert_same_bits(after["param"], row.param, "parameter")
        for name, before in row.state.items():
            assert_same_bits(after[name], before, name)
        assert after["step"] == 3


@pytest.mark.all_pairs
@pytest.mark.parametrize("by_chance", [False, True])
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("rules_of", [("adamw", "sgd_momentum", "lamb"), ("novograd", "nadam")])
def test_several_plans_in_one_step(program, rules_of, order, by_chance):
    groups, rows, asked = joint_plan(rules_of, 48)
    if by_chance:
        seeds = iter(range(-2, 10))
        others = tuple(replace(one, seed=next(seeds)) for one in asked.others)
        asked = replace(asked, seed=next(seeds), others=others)
    found = compare(program, groups, rows, asked, order=order, blocks=1 + 5 * order)
    skipped = [skipped for *_, skipped in found.outcomes]
    assert skipped[:6] == [False, False, False, True, False, False]
    assert skipped[6:] == [False, False, True, True, False, False]


@pytest.mark.parametrize("found_inf", [1.0, 2.0, math.inf])
def test_whatever_others_found_skips(program, found_inf):
    rng = np.random.default_rng(45)
    groups = [group_of("adamw")]
    rows = [row_of(rng, groups, 0, 100)]
    found = compare(program, groups, rows, Asked(found_inf=found_inf))
    assert found.outcomes[0][3]


def test_squares_that_overflow_are_no_inf_in_the_gradients(program):
    rng = np.random.default_rng(46)
    groups = [group_of("adamw")]
    rows = [row_of(rng, groups, 0, 100)]
    rows[0].grads = [np.full(100, 2e25, np.float32), rows[0].grads[1]]
    found = compare(program, groups, rows, Asked(reduce=True, skip_nonfinite=True, max_norm=1.0))
    assert found.outcomes[0] == (math.inf, 0.0, False, False)
    found = compare(program, groups, rows, Asked(reduce=True, finite_norm=True))
    assert found.outcomes[0][3]
