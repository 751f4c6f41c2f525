# SPDX-License-Identifier: Apache-2.0
"""``max_norm``: the clip of ``torch.nn.utils.clip_grad_norm_``, in the reduce pass."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from bits import array_of, assert_same_bits, oracle_steps
from cases import FULL, Case
from test_scaler import ADAMW, SCALE, assert_close, params_of, scaler_of, set_grads
from torch import nn
from ways import optimizer_of, snapshot, ways

import pyupdate
from pyupdate.options import LastUpdate
from pyupdate.pytorch.engines import last_step

cases = pytest.mark.parametrize("case", FULL, ids=str)


def last(optimizer: torch.optim.Optimizer) -> LastUpdate:
    found = last_step(optimizer)
    assert found is not None
    return found


@pytest.mark.all_pairs
@cases
@ways
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("max_norm", [0.0, 0.1, 50.0, 1e6, math.inf], ids=str)
def test_the_clip_is_torchs(case: Case, way, scaled, max_norm, backend):
    params, truth = params_of(), params_of()
    optimizer, other = optimizer_of(way, case, params, max_norm=max_norm), case.truth(truth)
    for turn in range(4):
        scaler, expected = scaler_of(), scaler_of()
        factor = SCALE if scaled else 1.0
        set_grads(params, turn, factor)
        set_grads(truth, turn, factor)
        if turn == 2:
            params[1].grad = truth[1].grad = None
        if scaled:
            expected.unscale_(other)
        norm = torch.nn.utils.clip_grad_norm_(truth, max_norm)
        if scaled:
            scaler.step(optimizer)
            expected.step(other)
        else:
            optimizer.step()
            other.step()
        assert last(optimizer).norm == pytest.approx(float(norm), rel=1e-5)
        assert_close(params, truth, optimizer, other, f"step {turn}")


@pytest.mark.all_pairs
@cases
@ways
def test_torchs_own_sequence_steps_alike(case: Case, way, backend):
    # unscale_, clip_grad_norm_ and scaler.step around our optimizer, which then finds it unscaled.
    params, truth = params_of(), params_of()
    optimizer, other = optimizer_of(way, case, params), case.truth(truth)
    for turn in range(3):
        for each, stepped in ((params, optimizer), (truth, other)):
            scaler = scaler_of()
            set_grads(each, turn, SCALE)
            if turn == 1:
                each[0].grad[0] = math.nan
            scaler.unscale_(stepped)
            torch.nn.utils.clip_grad_norm_(each, 0.3)
            scaler.step(stepped)
            scaler.update()
            assert scaler.get_scale() == (SCALE / 2 if turn == 1 else SCALE)
        assert_close(params, truth, optimizer, other, f"step {turn}")


@pytest.mark.all_pairs
@cases
@ways
def test_the_one_multiplier_to_the_bit(case: Case, way, backend):
    # All values are powers of two, so the norm is exact: sqrt(256 * 0.25) = 8.
    start = torch.linspace(-1, 1, 256)
    param = nn.Parameter(start.clone())
    optimizer = optimizer_of(way, case, [param], max_norm=2.0)
    grad = torch.full((256,), 0.5) * torch.tensor([1.0, -1.0]).repeat(128)
    for _ in range(3):
        param.grad = grad * SCALE
        scaler_of().step(optimizer)
        assert last(optimizer).norm == 8.0
        assert last(optimizer).multiplier == (2.0 / (8.0 + 1e-6)) / SCALE
    multiplier = (2.0 / (8.0 + 1e-6)) / SCALE
    scaled = [array_of(grad * SCALE)] * 3
    truth, _ = oracle_steps(case, array_of(start), scaled, [multiplier] * 3)
    assert_same_bits(param, truth, backend)


@pytest.mark.all_pairs
@ways
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("max_norm", [0.0, 1.0, math.inf], ids=str)
def test_norms_that_are_not_finite_do_as_torch_does(way, bad, max_norm, backend):
    params, truth = params_of(), params_of()
    optimizer, other = optimizer_of(way, ADAMW, params, max_norm=max_norm), ADAMW.truth(truth)
    for each in (params, truth):
        set_grads(each, 0, 1.0)
        each[1].grad[13] = bad
    norm = torch.nn.utils.clip_grad_norm_(truth, max_norm)
    optimizer.step()
    other.step()
    found = last(optimizer)
    assert not found.skipped
    np.testing.assert_equal(found.norm, float(norm))
    for param, twin in zip(params, truth, strict=True):
        torch.testing.assert_close(param, twin, rtol=2e-5, atol=1e-6, equal_nan=True)


@ways
def test_no_gradient_at_all(way, backend):
    params = params_of()
    optimizer = optimizer_of(way, ADAMW, params, max_norm=1.0)
    before = snapshot(optimizer)
    optimizer.step()
    assert snapshot(optimizer) == before
    assert last(optimizer).norm == 0.0 == float(torch.nn.utils.clip_grad_norm_(params, 1.0))
    plain = optimizer_of(way, ADAMW, params)
    plain.step()
    assert last(plain) == LastUpdate(None, skipped=False, multiplier=1.0)


@ways
def test_zero_gradients_are_not_divided_by_their_norm(way, backend):
    param = nn.Parameter(torch.ones(3))
    optimizer = optimizer_of(way, ADAMW, [param], max_norm=1.0)
    param.grad = torch.zeros(3)
    optimizer.step()
    assert last(optimizer) == LastUpdate(0.0, skipped=False, multiplier=1.0)
    assert torch.isfinite(param).all()


def test_the_norm_goes_over_all_groups_and_dtypes(backend):
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    params = [nn.Parameter(torch.ones(4, dtype=dtype)) for dtype in dtypes]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.25, "maximize": True}]
    optimizer = pyupdate.optim.SGD(groups, lr=0.5, max_norm=1.0)
    for param in params:
        param.grad = torch.full_like(param, 0.5)
    optimizer.step()  # norm: sqrt(16 * 0.25) = 2
    assert last(optimizer).norm == 2.0
    clip = 1.0 / (2.0 + 1e-6)
    for param, lr in zip(params, (0.5, 0.5, -0.25, -0.25), strict=True):
        expected = torch.full_like(param, 1.0 - lr * clip * 0.5)
        torch.testing.assert_close(param.detach(), expected)


@pytest.mark.parametrize("max_norm", [-1.0, math.nan, "1", True, [1.0]], ids=str)
def test_what_is_no_max_norm_is_refused(max_norm):
    param = nn.Parameter(torch.ones(3))
    with pytest.raises((TypeError, ValueError), match="max_norm must"):
        pyupdate.optim.AdamW([param], max_norm=max_norm)
    stock = torch.optim.AdamW([param])
    with pytest.raises((TypeError, ValueError), match="max_norm must"):
        pyupdate.accelerate(stock, max_norm=max_norm)
    assert type(stock) is torch.optim.AdamW


def test_a_differentiable_step_does_not_clip_and_says_so(backend):
    params = params_of()
    with pytest.raises(ValueError, match=r"max_norm.*differentiable.*clip_grad_norm_"):
        pyupdate.optim.AdamW(params, differentiable=True, max_norm=1.0)
    optimizer = pyupdate.optim.AdamW(params, max_norm=1.0)
    optimizer.param_groups[0]["differentiable"] = True
    set_grads(params, 0, 1.0)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"max_norm.*differentiable.*clip_grad_norm_"):
        optimizer.step()
    assert snapshot(optimizer) == before
