# SPDX-License-Identifier: Apache-2.0
"""The CUDA sources, compiled as host C++ and run thread by thread, give the oracle's bits.

The kernels are those of csrc/cuda, unchanged; tests/device/cuda_on_cpu.h stands in for the GPU.
What a real one adds (its compiler's last step, blocks that run at once, streams) is not shown here.
"""

from __future__ import annotations

import math
from typing import Any

import cuda_cases
import numpy as np
import pytest
from bits import assert_same_bits
from cases import CASES, OTHERS
from cuda_cases import FP32, STORAGES, Asked, Group, Parameter, Program, expected, run_steps

from pyupdate.kernels import oracle
from pyupdate.kernels.rules import RULES

# A row of no element, rows that end within a pack of 16 bytes, of more than one block of lanes, of
# more than one chunk.
SIZES = (*range(20), 33, 63, 64, 65, 70, 1025, 2049)
CHUNKS = (16_383, 16_384, 16_385, 100_003)
OPTIONS = {
    "plain": Asked(),
    "scaler": Asked(reduce=True, skip_nonfinite=True, unscale=0.5, scale=1024.0),
    "clip": Asked(reduce=True, max_norm=0.3),
    "inf norm": Asked(reduce=True, max_norm=0.01, inf_norm=True),
    "value": Asked(clip_value=0.1),
    "average": Asked(ema_weight=0.125),
    "chance": Asked(seed=7),
    "all": Asked(reduce=True, max_norm=0.7, clip_value=0.2, ema_weight=0.01, seed=-3, apart=True),
}


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return cuda_cases.build(tmp_path_factory.mktemp("cuda"), RULES)


def group_of(name: str, storage: int = FP32, **more: Any) -> Group:
    for case in (*CASES, *OTHERS):
        if case.name == name and (case.full or name.startswith("sgd")):
            sign, numbers = case.numbers()
            return Group(case.rule, numbers, storage, sign, **more)
    rule = RULES[name]  # of a composite, whose other half is the framework's
    return Group(rule, [0.1 + 0.05 * k for k in range(len(rule.numbers))], storage, **more)


def row_of(
    rng: np.random.Generator, groups: list[Group], index: int, size: int, **more: Any
) -> Any:
    """A row with state as some steps leave it, and gradients for two steps."""
    group = groups[index]
    _, kind, state_kind, compute = STORAGES[group.storage]

    def values(kind: type, scale: float = 1.0) -> Any:
        wide = (rng.standard_normal(size) * scale).astype(compute)
        return oracle.store(wide, np.zeros(size, kind))

    state: dict[str, Any] = {
        name: oracle.store(oracle.load(values(state_kind)) ** 2, np.zeros(size, state_kind))
        for name in group.rule.state
    }
    state |= {name: np.asarray(0.75, np.float32) for name in group.rule.scalars}
    return Parameter(index, values(kind), state, [values(kind, 0.5) for _ in range(2)], **more)


def with_averages(rng: np.random.Generator, groups: list[Group], rows: list[Parameter]) -> None:
    for row in rows:
        compute = STORAGES[groups[row.group].storage][3]
        row.average = rng.standard_normal(row.param.size).astype(compute)


def compare(
    program: Program, groups: list[Group], rows: list[Parameter], asked: Asked, **more: int
) -> Any:
    found = run_steps(program, groups, rows, asked, **more)
    wanted = expected(groups, rows, asked)
    for step, (a, b) in enumerate(zip(found.outcomes, wanted.outcomes, strict=True)):
        assert a == b or any(math.isnan(x) for x in b), f"outcome of step {step}: {a}, not {b}"
    assert found.counts == wanted.counts
    for r, (a, b) in enumerate(zip(found.arrays, wanted.arrays, strict=True)):
        assert a.keys() == b.keys()
        for name in b:
            assert_same_bits(a[name], b[name], f"row {r} of {rows[r].param.size}, {name}")
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


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("rule", ["adamw", "lamb", "nadam", "novograd"])
def test_no_order_of_threads_and_no_grid_changes_a_bit(program, rule, order):
    rng = np.random.default_rng(43)
    groups = [group_of(rule, count=1)]
    rows = [row_of(rng, groups, 0, size, shift=shift) for size in CHUNKS for shift in (0, 1)]
    compare(program, groups, rows, OPTIONS["clip"], order=order, blocks=1 + 5 * order)


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
