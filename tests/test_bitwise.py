# SPDX-License-Identifier: Apache-2.0
"""The same bits on every back end, instruction set, thread count and alignment: 20 steps long."""

from __future__ import annotations

import math
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from bits import (
    array_of,
    assert_same_bits,
    joined,
    oracle_steps,
    random_values,
    torch_steps,
)
from cases import DTYPES, FULL, FULL_OTHERS, Case, in_each, name_of

import pyupdate
from pyupdate.kernels import oracle
from pyupdate.kernels.reduction import halving_tree
from pyupdate.kernels.rules import multiplier
from pyupdate.pytorch.engines import last_step

STEPS = 20

# Vector remainders; then enough elements, beyond one chunk of 16,384, for seven threads.
SIZES = (*range(71), 1025, 16_384, 16_385, 100_003)

full_cases = pytest.mark.parametrize("case", FULL + FULL_OTHERS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


def parameter(values: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(values)


@cache
def data(dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Values of all sizes laid end to end, and gradients of every step."""
    rng = np.random.default_rng(20)
    total = sum(SIZES)
    return random_values(rng, total, dtype), [
        random_values(rng, total, dtype) for _ in range(STEPS)
    ]


@cache
def expectation(case: Case, dtype: torch.dtype) -> Any:
    """What numpy makes of them: the rules are elementwise, so one long array stands for all."""
    param, grads = data(dtype)
    return oracle_steps(case, array_of(param), [array_of(grad) for grad in grads])


def check_sizes(case: Case, dtype: torch.dtype, what: str, sizes: tuple[int, ...] = SIZES) -> None:
    param, grads = data(dtype)
    expected, expected_state = expectation(case, dtype)
    params = [parameter(piece) for piece in param.clone().split(sizes)]
    optimizer = case.ours(params)
    torch_steps(optimizer, params, [grad.split(sizes) for grad in grads])
    assert_same_bits(joined(params), expected, what)
    if case.step_is_counted:
        assert {optimizer.state[p]["step"].item() for p in params} == {STEPS}, what
    for name, values in expected_state.items():
        state = [optimizer.state[p][name] for p in params]
        if name in case.rule.scalars:
            assert {value.item() for value in state} == {values.item()}, f"{what}, {name}"
            continue
        assert_same_bits(joined(state), values, f"{what}, {name}")


def some_of(isas, threads):
    """Every number of threads under the best instruction set, one under the others."""
    return [*product(isas[:-1], threads[1:2]), *product(isas[-1:], threads)]


@in_each(DTYPES)
def test_compiled_gives_the_bits_of_numpy_at_every_size(case, dtype, isas, threads, compiled):
    # A rule's further options and storages have every number of threads under the best one alone.
    every = case.full and dtype is torch.float32
    for isa, n in product(isas, threads) if every else some_of(isas, threads):
        compiled.use_isa(isa)
        torch.set_num_threads(n)
        check_sizes(case, dtype, f"{isa}, {n} threads")


@in_each(DTYPES)
def test_reference_gives_the_bits_of_numpy(case, dtype, threads):
    torch.set_num_threads(threads[0])
    with pyupdate.use_backend("reference"):
        check_sizes(case, dtype, "reference", (1, 2, 1025, sum(SIZES) - 1028))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@full_cases
def test_reference_gives_the_bits_of_numpy_at_every_size(case, dtype, threads):
    torch.set_num_threads(threads[0])
    with pyupdate.use_backend("reference"):
        check_sizes(case, dtype, "reference")


# ----- special values -----------------------------------------------------------------------------


def specials(dtype: torch.dtype) -> torch.Tensor:
    """Zeros, subnormals, the edges of the range, values whose squares leave it, inf and nan."""
    info = torch.finfo(dtype)
    subnormal = info.smallest_normal * info.eps
    positive = [
        *(0.0, subnormal, 3.0 * subnormal, info.smallest_normal - subnormal, info.smallest_normal),
        *(1.5 * info.smallest_normal, math.sqrt(info.smallest_normal), info.eps, 1.0 - info.eps),
        *(1.0, 1.0 + info.eps, 3.0, math.sqrt(info.max), info.max / 2.0, info.max, math.inf),
    ]
    values = [*positive, *(-value for value in positive), math.nan]
    return torch.tensor(values, dtype=torch.float64).to(dtype)


@in_each(DTYPES)
def test_special_values_give_the_bits_of_numpy(case, dtype, backend):
    values = specials(dtype)
    n = len(values)
    # Every parameter meets every gradient; later gradients are others, so that state meets them.
    start = values.repeat_interleave(n)
    grads = [values.repeat(n).roll(shift) for shift in (0, 1, n + 7, 11)]
    expected, states = oracle_steps(case, array_of(start), [array_of(grad) for grad in grads])
    param = parameter(start.clone())
    optimizer = case.ours([param])
    torch_steps(optimizer, [param], [[grad] for grad in grads])
    assert_same_bits(param, expected, backend)
    for name, state in states.items():
        assert_same_bits(optimizer.state[param][name], state, f"{backend}, {name}")


# ----- alignment and splitting --------------------------------------------------------------------


def misaligned(values: torch.Tensor, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy that starts `offset` elements into a buffer, and the buffer, full of sevens."""
    buffer = torch.full((values.numel() + 32,), 7.0, dtype=values.dtype)
    view = buffer[offset : offset + values.numel()]
    view.copy_(values)
    return view, buffer


@every_dtype
@full_cases
def test_misaligned_views_give_the_same_bits_and_touch_nothing_else(case, dtype, isas, compiled):
    n, steps = 1025, 5
    rng = np.random.default_rng(21)
    offsets = range(1, 16)
    values = [random_values(rng, n, dtype) for _ in offsets]
    grads = [[random_values(rng, n, dtype) for _ in offsets] for _ in range(steps)]
    expected = [
        oracle_steps(case, array_of(value), [array_of(row[i]) for row in grads])
        for i, value in enumerate(values)
    ]
    for isa in isas:
        compiled.use_isa(isa)
        views, buffers = zip(*map(misaligned, values, offsets), strict=True)
        params = [parameter(view) for view in views]
        rows = [
            [misaligned(g, (o * 7) % 16)[0] for g, o in zip(row, offsets, strict=True)]
            for row in grads
        ]
        optimizer = case.ours(params)
        torch_steps(optimizer, params, rows[:1])
        states = []
        for param, offset in zip(params, offsets, strict=True):
            for k, name in enumerate(case.rule.state):
                state = optimizer.state[param]
                state[name], buffer = misaligned(state[name], (offset * 5 + k) % 16)
                states.append((buffer, (offset * 5 + k) % 16))
        torch_steps(optimizer, params, rows[1:])
        for param, offset, (value, state) in zip(params, offsets, expected, strict=True):
            assert_same_bits(param, value, f"{isa}, offset {offset}")
            for name in state:
                found = optimizer.state[param][name]
                assert_same_bits(found, state[name], f"{isa}, offset {offset}, {name}")
        for buffer, offset in [*zip(buffers, offsets, strict=True), *states]:
            outside = torch.cat([buffer[:offset], buffer[offset + n :]])
            assert (outside == 7.0).all(), f"{isa}: a neighbour was written"


@every_dtype
@full_cases
def test_a_tensor_split_in_sevens_gives_the_bits_of_the_whole(case, dtype, backend):
    n, steps = 100_003, 4
    rng = np.random.default_rng(22)
    start = random_values(rng, n, dtype)
    grads = [random_values(rng, n, dtype) for _ in range(steps)]
    whole = parameter(start.clone())
    of_whole = case.ours([whole])
    torch_steps(of_whole, [whole], [[grad] for grad in grads])
    cuts = (1, 16_384, 2_049, 50_000, 7, 31_337)
    sizes = (*cuts, n - sum(cuts))
    buffer = start.clone()
    pieces = [parameter(piece) for piece in buffer.split(sizes)]
    of_pieces = case.ours(pieces)
    torch_steps(of_pieces, pieces, [grad.split(sizes) for grad in grads])
    assert_same_bits(buffer, array_of(whole), backend)
    for name in case.rule.state:
        found = joined([of_pieces.state[piece][name] for piece in pieces])
        assert_same_bits(found, array_of(of_whole.state[whole][name]), f"{backend}, {name}")


# ----- with a norm --------------------------------------------------------------------------------

NORM_SIZES = (0, 1, 7, 2_047, 2_048, 2_049, 16_383, 16_384, 16_385, 100_003, 3)


def expected_clips(grads: list[list[torch.Tensor]], max_norm: float) -> list[tuple[float, float]]:
    """Norm and multiplier of every step, by the numpy oracle."""
    clips = []
    for row in grads:
        total = halving_tree([oracle.sum_of_squares(array_of(grad)) for grad in row])
        norm = math.sqrt(total)
        clips.append((norm, multiplier(norm, 1.0, max_norm)))
    return clips


def check_clipped(
    case: Case,
    start: list[torch.Tensor],
    grads: list[list[torch.Tensor]],
    max_norm: float,
    what: str,
) -> list[tuple[float, float]]:
    """Steps with `max_norm` against the oracle; the norms and multipliers that were taken."""
    clips = expected_clips(grads, max_norm)
    params = [parameter(values.clone()) for values in start]
    optimizer = case.ours(params, max_norm=max_norm)
    for i, row in enumerate(grads):
        torch_steps(optimizer, params, [row])
        last = last_step(optimizer)
        assert last is not None
        assert (last.norm, last.multiplier, last.skipped) == (*clips[i], False), f"{what}, step {i}"
    for i, (param, value) in enumerate(zip(params, start, strict=True)):
        of_param = [array_of(row[i]) for row in grads]
        expected, states = oracle_steps(case, array_of(value), of_param, [m for _, m in clips])
        assert_same_bits(param, expected, f"{what}, parameter {i}")
        for name, state in states.items():
            assert_same_bits(optimizer.state[param][name], state, f"{what}, parameter {i}, {name}")
    return clips


@full_cases
def test_a_clipped_step_has_the_same_norm_and_bits_everywhere(case, isas, threads, compiled):
    # Every storage in one model: parameter k is of dtype k mod 4.
    rng = np.random.default_rng(23)
    kinds = [DTYPES[k % len(DTYPES)] for k in range(2 * len(NORM_SIZES))]
    sizes = NORM_SIZES + NORM_SIZES[::-1]
    start = [random_values(rng, n, kind) for n, kind in zip(sizes, kinds, strict=True)]
    grads = [
        [random_values(rng, n, kind) for n, kind in zip(sizes, kinds, strict=True)]
        for _ in range(3)
    ]
    with pyupdate.use_backend("reference"):
        clips = check_clipped(case, start, grads, 1.0, "reference")
    assert all(0.0 < taken < 1.0 for _, taken in clips), "the test must clip"
    for isa, n in some_of(isas, threads):
        compiled.use_isa(isa)
        torch.set_num_threads(n)
        check_clipped(case, start, grads, 1.0, f"{isa}, {n} threads")


@every_dtype
def test_a_norm_beyond_fp32_is_infinite_and_stops_the_move(dtype, backend):
    # As in torch: the squares overflow, the clip is 0. In fp64 and fp16 the same values do not.
    case = FULL[0]
    big = torch.full((5,), 2.0**100 if dtype is not torch.float16 else 60_000.0).to(dtype)
    clips = check_clipped(case, [torch.ones(5, dtype=dtype)], [[big]], 1.0, backend)
    overflows = dtype in (torch.float32, torch.bfloat16)
    assert math.isinf(clips[0][0]) == overflows
    assert (clips[0][1] == 0.0) == overflows


@every_dtype
@pytest.mark.parametrize("scale", [2.0**16, 3.0, 2.0**-10])
def test_a_scaled_step_has_the_bits_of_numpy(dtype, scale, backend):
    case = next(case for case in FULL if case.name == "adamw")
    rng = np.random.default_rng(24)
    values, grad = random_values(rng, 2_500, dtype), random_values(rng, 2_500, dtype)
    unscale = float(np.float32(1.0 / np.float64(np.float32(scale))))
    param = parameter(values.clone())
    optimizer = case.ours([param], max_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.zeros(()))
    param.grad = grad
    optimizer.step(grad_scaler=scaler)
    last = last_step(optimizer)
    assert last is not None
    norm = math.sqrt(oracle.sum_of_squares(array_of(grad), unscale))
    taken = multiplier(norm, unscale, 1.0)
    assert (last.norm, last.multiplier) == (norm, taken)
    expected, _ = oracle_steps(case, array_of(values), [array_of(grad)], [taken])
    assert_same_bits(param, expected, backend)
