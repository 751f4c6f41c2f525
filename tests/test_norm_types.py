# SPDX-License-Identifier: Apache-2.0
"""The inf norm, ``error_if_nonfinite`` and ``skip_nonfinite``: torch's, to the bit where it can be.

The largest magnitude is exact, so torch's ``clip_grad_norm_`` and the step agree to the last bit of
the norm itself.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from bits import array_of, assert_same_bits, compute_type, oracle_steps, random_values
from cases import DTYPES, FULL, Case, name_of
from test_clip import last
from test_reduction import SIZES
from test_scaler import ADAMW, MOMENTUM, SCALE, assert_close, params_of, scaler_of, set_grads
from torch import nn
from ways import optimizer_of, snapshot, ways

import pyupdate
from pyupdate.kernels import oracle
from pyupdate.kernels.reduction import largest, largest_of_row
from pyupdate.kernels.rules import larger, magnitude, multiplier

cases = pytest.mark.parametrize("case", FULL, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)

# ----- the largest of some numbers ----------------------------------------------------------------


def test_a_nan_wins_wherever_it_stands():
    assert [magnitude(x) for x in (2.0, -3.0, 0.0, -math.inf)] == [2.0, 3.0, 0.0, math.inf]
    assert math.copysign(1.0, magnitude(-0.0)) == 1.0
    assert math.isnan(magnitude(math.nan))
    for a, b in ((math.nan, 1.0), (1.0, math.nan), (math.nan, math.inf), (math.inf, math.nan)):
        assert math.isnan(larger(a, b))
    assert largest([]) == largest_of_row(np.zeros(0)) == 0.0
    assert largest([0.5, 3.0, 2.0]) == 3.0
    assert math.isnan(largest([1.0, math.nan, math.inf, 2.0]))


def norm_of(grads: list[torch.Tensor]) -> float | None:
    params = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    optimizer = pyupdate.optim.SGD(params, lr=0.0, max_norm=1.0, norm_type=math.inf)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer.step()
    return last(optimizer).norm


@every_dtype
def test_a_row_of_every_size_on_every_instruction_set(dtype, isas, threads, compiled):
    rng = np.random.default_rng(41)
    for size in SIZES:
        grad = random_values(rng, size, dtype)
        if size:  # the largest somewhere, below zero
            grad[int(rng.integers(size))] = -300.0
        expected = 300.0 if size else 0.0
        assert oracle.largest_magnitude(array_of(grad)) == expected
        with pyupdate.use_backend("reference"):
            assert norm_of([grad]) == expected, size
        for isa, n in product(isas, threads):
            compiled.use_isa(isa)
            torch.set_num_threads(n)
            assert norm_of([grad]) == expected, (size, isa, n)


@every_dtype
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_bad_element_anywhere_is_the_norm(dtype, bad, backend):
    size = 2 * 16_384 + 5
    for edge in (0, 1, 2_047, 2_048, 16_383, 16_384, 18_432, 32_768, size - 1):
        grad = torch.ones(size, dtype=dtype)
        grad[edge] = bad
        others = [torch.ones(3, dtype=dtype) for _ in range(2)]
        np.testing.assert_equal(norm_of([others[0], grad, others[1]]), abs(bad))


# ----- the clip -----------------------------------------------------------------------------------


@pytest.mark.all_pairs
@cases
@ways
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("max_norm", [0.0, 0.1, 50.0, math.inf], ids=str)
def test_the_clip_by_the_inf_norm_is_torchs(case: Case, way, scaled, max_norm, backend):
    params, truth = params_of(), params_of()
    options = {"max_norm": max_norm, "norm_type": math.inf}
    optimizer, other = optimizer_of(way, case, params, **options), case.truth(truth)
    for turn in range(4):
        scaler, expected = scaler_of(), scaler_of()
        factor = SCALE if scaled else 1.0
        set_grads(params, turn, factor)
        set_grads(truth, turn, factor)
        if turn == 2:
            params[1].grad = truth[1].grad = None
        if scaled:
            expected.unscale_(other)
        norm = torch.nn.utils.clip_grad_norm_(truth, max_norm, norm_type=math.inf)
        if scaled:
            scaler.step(optimizer)
            expected.step(other)
        else:
            optimizer.step()
            other.step()
        assert last(optimizer).norm == float(norm)
        assert_close(params, truth, optimizer, other, f"step {turn}")


@pytest.mark.parametrize("case", [ADAMW, MOMENTUM], ids=str)
@every_dtype
def test_the_whole_step_to_the_bit(case: Case, dtype, backend):
    rng = np.random.default_rng(42)
    start, *grads = [random_values(rng, 40_001, dtype) for _ in range(4)]
    param = nn.Parameter(start.clone())
    optimizer = case.ours([param], max_norm=1.5, norm_type=math.inf)
    clips = []
    for grad in grads:
        param.grad = grad * 0.5
        scaler_of(0.5).step(optimizer)
        norm = float(grad.to(compute_type(dtype)).abs().max())
        assert last(optimizer).norm == norm
        clips.append(multiplier(norm, 2.0, 1.5))
        assert last(optimizer).multiplier == clips[-1]
    halves = [array_of(grad * 0.5) for grad in grads]
    truth, state = oracle_steps(case, array_of(start), halves, clips)
    assert_same_bits(param, truth, "parameter")
    for key, value in state.items():
        assert_same_bits(optimizer.state[param][key], value, key)


def test_finite_gradients_cannot_overflow_the_inf_norm(backend):
    param = nn.Parameter(torch.ones(20_000))
    optimizer = pyupdate.optim.SGD([param], lr=1.0, max_norm=1.0, norm_type=math.inf)
    param.grad = torch.full_like(param, 1e38)
    optimizer.step()
    assert last(optimizer).norm == float(torch.tensor(1e38))
    torch.testing.assert_close(param.detach(), torch.zeros(20_000), rtol=0, atol=1e-6)


# ----- error_if_nonfinite -------------------------------------------------------------------------


@pytest.mark.all_pairs
@ways
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("norm_type", [2.0, math.inf], ids=str)
@pytest.mark.parametrize("bad", [math.inf, math.nan], ids=str)
@pytest.mark.parametrize("steps_before", [0, 1])
def test_torchs_error_before_anything_is_written(
    way, scaled, norm_type, bad, steps_before, backend
):
    params, truth = params_of(), params_of()
    options = {"max_norm": 1.0, "norm_type": norm_type, "error_if_nonfinite": True}
    optimizer = optimizer_of(way, ADAMW, params, **options)
    for turn in range(steps_before):
        set_grads(params, turn, 1.0)
        optimizer.step()
    for each in (params, truth):
        set_grads(each, 5, 1.0)
        each[1].grad[13] = bad
    with pytest.raises(RuntimeError) as expected:
        torch.nn.utils.clip_grad_norm_(truth, 1.0, norm_type, error_if_nonfinite=True)
    before = snapshot(optimizer)
    scaler = scaler_of() if scaled else None
    with pytest.raises(RuntimeError) as found:
        optimizer.step(grad_scaler=scaler)
    assert str(found.value) == str(expected.value)
    assert snapshot(optimizer) == before
    params[1].grad[13] = 0.0
    optimizer.step(grad_scaler=scaler)  # neither the scaler nor the plan thinks it has stepped
    assert not last(optimizer).skipped


def test_a_norm_of_finite_gradients_that_overflows_is_an_error_too(backend):
    param = nn.Parameter(torch.ones(9))
    optimizer = pyupdate.optim.SGD([param], lr=1.0, max_norm=1.0, error_if_nonfinite=True)
    param.grad = torch.full_like(param, 1e38)
    with pytest.raises(RuntimeError, match=r"total norm of order 2\.0"):
        optimizer.step()
    assert (param == 1.0).all()


def test_update_model_puts_everything_back(backend):
    model = pyupdate.build(nn.Linear(3, 2), "adamw", max_norm=1.0, error_if_nonfinite=True)
    start = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(RuntimeError, match="non-finite"):
        pyupdate.update_model(model, model(torch.full((1, 3), math.inf)))
    for param, before in zip(model.parameters(), start, strict=True):
        assert torch.equal(param, before)
        assert param.grad is None
    pyupdate.update_model(model, model(torch.ones(1, 3)))


# ----- skip_nonfinite -----------------------------------------------------------------------------


@pytest.mark.all_pairs
@cases
@ways
@pytest.mark.parametrize("max_norm", [None, 0.5], ids=["plain", "max_norm"])
def test_bad_gradients_skip_the_step_without_a_scaler(case: Case, way, max_norm, backend):
    params, truth = params_of(), params_of()
    optimizer = optimizer_of(way, case, params, max_norm=max_norm, skip_nonfinite=True)
    other = case.truth(truth)
    for turn in range(6):
        set_grads(params, turn, 1.0)
        set_grads(truth, turn, 1.0)
        bad = turn in (0, 3)
        if bad:
            params[turn % 3].grad[-1] = math.nan if turn else math.inf
        before = snapshot(optimizer)
        optimizer.step()
        assert last(optimizer).skipped == bad
        if bad:
            assert snapshot(optimizer) == before
            continue
        norm = torch.nn.utils.clip_grad_norm_(truth, math.inf if max_norm is None else max_norm)
        other.step()
        assert last(optimizer).norm == pytest.approx(float(norm), rel=1e-5)
        assert_close(params, truth, optimizer, other, f"step {turn}")


def test_finite_gradients_whose_norm_overflows_skip_nothing(backend):
    param = nn.Parameter(torch.ones(9))
    optimizer = pyupdate.optim.AdamW([param], skip_nonfinite=True)
    param.grad = torch.full_like(param, 1e38)
    optimizer.step()
    assert not last(optimizer).skipped
    assert last(optimizer).norm == math.inf
    assert optimizer.state


def test_a_scaler_is_told_of_a_skip_beside_it(backend):
    params = params_of()
    optimizer = pyupdate.optim.AdamW(params, skip_nonfinite=True)
    set_grads(params, 0, SCALE)
    params[0].grad[0] = math.inf
    scaler = scaler_of()
    scaler.step(optimizer)
    scaler.update()
    assert last(optimizer).skipped
    assert scaler.get_scale() == SCALE / 2


@pytest.mark.parametrize("bad", [math.inf, 1e30], ids=["inf", "overflow"])
def test_the_scale_falls_as_torchs_does_when_the_norm_is_refused(bad, backend):
    scales = []
    for kind in (pyupdate.optim.SGD, torch.optim.SGD):
        param = nn.Parameter(torch.ones(2))
        ours: Any = {"max_norm": 1.0, "error_if_nonfinite": True}
        optimizer = kind([param], **(ours if kind is pyupdate.optim.SGD else {}))
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(torch.ones(()))
        param.grad = torch.tensor([1.0, bad])

        def refused(optimizer: Any = optimizer, scaler: Any = scaler, param: Any = param) -> None:
            if isinstance(optimizer, pyupdate.optim.SGD):
                scaler.step(optimizer)
                return
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_([param], 1.0, error_if_nonfinite=True)

        with pytest.raises(RuntimeError, match="non-finite"):
            refused()
        scaler.update()
        scales.append(scaler.get_scale())
        assert param.tolist() == [1.0, 1.0]
    assert scales[0] == scales[1] == (8.0 if math.isfinite(bad) else 4.0)
