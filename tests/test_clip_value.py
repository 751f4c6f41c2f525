# SPDX-License-Identifier: Apache-2.0
"""``clip_value``: torch's ``clip_grad_value_``, after unscaling and the clip by the norm."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from bits import array_of, assert_same_bits, oracle_steps, random_values
from cases import DTYPES, FULL, Case, name_of
from test_clip import last
from test_scaler import ADAMW, MOMENTUM, SCALE, assert_close, params_of, scaler_of, set_grads
from torch import nn
from ways import optimizer_of, ways

import pyupdate
from pyupdate.kernels.rules import clipped

cases = pytest.mark.parametrize("case", FULL, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


@pytest.mark.parametrize("bound", [0.0, 0.5, 3.0, math.inf])
def test_the_text_is_torchs_clamp(bound):
    values = [0.0, -0.0, 0.25, -0.5, 0.5, 2.0, -7.0, math.inf, -math.inf, math.nan]
    expected = torch.tensor(values, dtype=torch.float64).clamp(-bound, bound)
    np.testing.assert_array_equal([clipped(value, bound) for value in values], expected.numpy())
    if math.isinf(bound):  # no clip: the sign of a zero too
        assert [str(clipped(value, bound)) for value in values] == list(map(str, values))


@pytest.mark.all_pairs
@cases
@ways
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("max_norm", [None, 3.0], ids=["value", "norm and value"])
@pytest.mark.parametrize("clip_value", [0.0, 0.05, 1e6], ids=str)
def test_the_clip_is_torchs(case: Case, way, scaled, max_norm, clip_value, backend):
    params, truth = params_of(), params_of()
    options = {"max_norm": max_norm, "clip_value": clip_value}
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
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(truth, max_norm)
        torch.nn.utils.clip_grad_value_(truth, clip_value)
        if scaled:
            scaler.step(optimizer)
            expected.step(other)
        else:
            optimizer.step()
            other.step()
        assert_close(params, truth, optimizer, other, f"step {turn}")


@cases
@every_dtype
def test_the_whole_step_to_the_bit(case: Case, dtype, isas, threads, compiled):
    rng = np.random.default_rng(51)
    start, *grads = [random_values(rng, 20_001, dtype) for _ in range(3)]
    arrays = [array_of(grad) for grad in grads]
    halves = [0.5] * len(grads)
    truth, state = oracle_steps(case, array_of(start), arrays, halves, clip_value=0.3)
    plain, _ = oracle_steps(case, array_of(start), arrays, halves)
    if case in (ADAMW, MOMENTUM):  # Rprop looks at signs alone
        assert not np.array_equal(truth, plain)

    def check(what: str) -> None:
        param = nn.Parameter(start.clone())
        optimizer = case.ours([param], clip_value=0.3)
        for grad in grads:
            param.grad = grad
            scaler_of(2.0).step(optimizer)
        assert_same_bits(param, truth, what)
        for key, value in state.items():
            assert_same_bits(optimizer.state[param][key], value, f"{what}: {key}")

    with pyupdate.use_backend("reference"):
        check("reference")
    for isa, n in product(isas, threads):
        compiled.use_isa(isa)
        torch.set_num_threads(n)
        check(f"{isa}, {n} threads")


def test_an_infinite_bound_is_no_clip(backend):
    results = []
    for options in ({}, {"clip_value": math.inf}):
        params = params_of()
        optimizer = ADAMW.ours(params, **options)
        for turn in range(3):
            set_grads(params, turn, 1.0)
            params[2].grad[:3] = torch.tensor([math.inf, -0.0, math.nan])
            optimizer.step()
        results.append(params)
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other, "parameter")


def test_what_is_not_finite(backend):
    # As clamp does: inf becomes the bound, a nan stays; the norm and the finite check look before.
    param = nn.Parameter(torch.zeros(4))
    optimizer = pyupdate.optim.SGD([param], lr=1.0, clip_value=0.5)
    param.grad = torch.tensor([math.inf, -math.inf, math.nan, 0.25])
    optimizer.step()
    np.testing.assert_array_equal(param.detach().numpy(), [-0.5, 0.5, math.nan, -0.25])
    skips = pyupdate.optim.SGD([param], lr=1.0, clip_value=0.5, skip_nonfinite=True)
    skips.step()
    assert last(skips).skipped
    assert last(skips).norm is not None
    assert math.isnan(last(skips).norm or 0.0)


@pytest.mark.parametrize("case", [ADAMW, MOMENTUM], ids=str)
def test_strided_and_mixed_groups(case: Case, backend):
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    rng = np.random.default_rng(52)
    values = [random_values(rng, 600, dtype).reshape(20, 30) for dtype in dtypes]
    grads = [random_values(rng, 600, dtype).reshape(20, 30) for dtype in dtypes]
    params = [nn.Parameter(value.clone()) for value in values]
    optimizer = case.ours([{"params": params[:2]}, {"params": params[2:]}], clip_value=0.125)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.t().contiguous().t()  # strided
    optimizer.step()
    for param, value, grad in zip(params, values, grads, strict=True):
        truth, _ = oracle_steps(case, array_of(value), [array_of(grad)], clip_value=0.125)
        assert_same_bits(param, truth, str(param.dtype))
