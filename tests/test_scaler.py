# SPDX-License-Identifier: Apache-2.0
"""Loss scaling and clipping: what torch's own non-fused path does, without its extra passes.

The truth is torch's ``scaler.unscale_``, ``clip_grad_norm_`` and ``scaler.step`` around
``torch.optim``'s ``foreach=False`` loop; or, to the bit, the numpy oracle with the one multiplier.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from bits import array_of, assert_same_bits, oracle_steps, random_values
from cases import FULL, Case
from torch import nn
from ways import optimizer_of, snapshot, ways

import pyupdate
from pyupdate.pytorch.engines import last_step

cases = pytest.mark.parametrize("case", FULL, ids=str)
ADAMW = next(case for case in FULL if case.name == "adamw")
MOMENTUM = next(case for case in FULL if case.name == "sgd_momentum")
SCALE = 2.0**7

Scaler = torch.amp.GradScaler


def scaler_of(scale: float = SCALE, **options: Any) -> Scaler:
    scaler = Scaler("cpu", init_scale=scale, **options)
    scaler.scale(torch.zeros(()))  # torch makes its tensors at the first loss
    return scaler


def params_of(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    rng = np.random.default_rng(seed)
    return [nn.Parameter(random_values(rng, n, dtype)) for n in (1, 70, 3000)]


def set_grads(params: Sequence[torch.Tensor], seed: int, factor: float) -> None:
    rng = np.random.default_rng(1000 + seed)
    for param in params:
        values = random_values(rng, param.numel(), torch.float64) * factor
        param.grad = values.to(param.dtype)


def by_argument(optimizer: torch.optim.Optimizer, scaler: Scaler) -> None:
    optimizer.step(grad_scaler=scaler)


def by_scaler(optimizer: torch.optim.Optimizer, scaler: Scaler) -> None:
    scaler.step(optimizer)


def by_attributes(optimizer: torch.optim.Optimizer, scaler: Scaler) -> None:
    """As torch does where a step does not take ``grad_scaler``."""
    grads = [param.grad for group in optimizer.param_groups for param in group["params"]]
    found = float(any(g is not None and not torch.isfinite(g).all() for g in grads))
    optimizer.grad_scale = scaler._get_scale_async()
    optimizer.found_inf = torch.full((), 2.0 * found)  # 2: found on two devices
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf
    state = scaler._per_optimizer_states[id(optimizer)]
    state["found_inf_per_device"] = {torch.device("cpu"): torch.full((), found)}


def by_unscale_first(optimizer: torch.optim.Optimizer, scaler: Scaler) -> None:
    scaler.unscale_(optimizer)
    scaler.step(optimizer)


CALLS = {call.__name__: call for call in (by_argument, by_scaler, by_attributes, by_unscale_first)}
calls = pytest.mark.parametrize("call", list(CALLS))


@pytest.fixture
def torchs_passes(monkeypatch):
    """How often torch's own unscale pass ran, and on which optimizers."""
    seen: list[Any] = []
    own = Scaler._unscale_grads_

    def counted(self, optimizer, *args, **kwargs):
        seen.append(optimizer)
        return own(self, optimizer, *args, **kwargs)

    monkeypatch.setattr(Scaler, "_unscale_grads_", counted)
    return seen


def assert_close(ours, truth, optimizer, other, what: str) -> None:
    for i, (param, expected) in enumerate(zip(ours, truth, strict=True)):
        said = f"{what}, parameter {i}: "
        close = {"rtol": 2e-5, "atol": 1e-6, "msg": lambda m, s=said: s + m}
        torch.testing.assert_close(param, expected, **close)
        state, expected_state = optimizer.state.get(param, {}), other.state.get(expected, {})
        assert state.keys() == expected_state.keys(), said
        for key, value in expected_state.items():
            torch.testing.assert_close(state[key], value, **close)


# ----- steps and skips ----------------------------------------------------------------------------


@pytest.mark.all_pairs
@cases
@ways
@calls
def test_twelve_iterations_are_torchs(case: Case, way, call, backend, torchs_passes):
    # The scale is halved after a skip and doubled after three good steps in a row.
    ours, truth = params_of(), params_of()
    optimizer, other = optimizer_of(way, case, ours), case.truth(truth)
    options = {"growth_interval": 3, "growth_factor": 2.0, "backoff_factor": 0.5}
    scaler, expected = scaler_of(**options), scaler_of(**options)
    scales = []
    for turn in range(12):
        for params, each in ((ours, scaler), (truth, expected)):
            set_grads(params, turn, each.get_scale())
            if turn in (4, 9, 10):
                params[turn % 3].grad[-1] = math.inf if turn % 2 else math.nan
        before = snapshot(optimizer)
        CALLS[call](optimizer, scaler)
        if turn in (4, 9, 10) and call != "by_unscale_first":  # which writes gradients
            assert snapshot(optimizer) == before
        scaler.update()
        expected.step(other)
        expected.update()
        assert scaler.get_scale() == expected.get_scale(), f"iteration {turn}"
        assert scaler._growth_tracker == expected._growth_tracker
        scales.append(scaler.get_scale())
        assert_close(ours, truth, optimizer, other, f"iteration {turn}")
    assert len(set(scales)) > 2  # it went up and down
    ran = sum(each is optimizer for each in torchs_passes)
    assert ran == (12 if call == "by_unscale_first" else 0)


@ways
def test_gradients_keep_their_scale(way, backend):
    params = params_of()
    optimizer = optimizer_of(way, ADAMW, params, max_norm=1.0)
    set_grads(params, 0, SCALE)
    before = [param.grad.clone() for param in params]
    scaler_of().step(optimizer)
    for param, grad in zip(params, before, strict=True):
        assert_same_bits(param.grad, grad, "gradient")


@pytest.mark.all_pairs
@cases
@ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_unscaling_is_one_rounding_of_the_gradient(case: Case, way, dtype, backend):
    # The truth to the bit: the oracle with 1 / scale, for a scale that is no power of two. Torch
    # rounds 1 / scale to fp32 whatever the gradients are.
    scale = 1000.0
    rng = np.random.default_rng(5)
    values = [random_values(rng, 5000, dtype) for _ in range(4)]
    param = nn.Parameter(values[0].clone())
    optimizer = optimizer_of(way, case, [param])
    scaler = scaler_of(scale)
    for grad in values[1:]:
        param.grad = grad * scale
        scaler.step(optimizer)
        scaler._per_optimizer_states.clear()
    grads = [array_of(grad * scale) for grad in values[1:]]
    unscale = float(np.float32(1.0 / np.float64(scale)))
    truth, state = oracle_steps(case, array_of(values[0]), grads, [unscale] * 3)
    assert_same_bits(param, truth, "parameter")
    for key, value in state.items():
        assert_same_bits(optimizer.state[param][key], value, key)


POSITIONS = (0, 1, 7, 8, 15, 16, 255, 2047, 2048, 16_383, 16_384, 32_767, 32_768, 40_000)


@pytest.mark.all_pairs
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", [ADAMW, MOMENTUM], ids=str)
@pytest.mark.parametrize("steps_before", [0, 1])
def test_one_bad_element_anywhere_skips_the_step(value, dtype, case: Case, steps_before, backend):
    sizes = (40_001, 17, 1)
    rng = np.random.default_rng(6)
    params = [nn.Parameter(random_values(rng, n, dtype)) for n in sizes]
    optimizer = case.ours(params)
    other = case.truth([nn.Parameter(param.detach().clone()) for param in params])
    for _ in range(steps_before):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    places = [(0, at) for at in POSITIONS] + [(1, 0), (1, 8), (1, 16), (2, 0)]
    for which, at in places:
        for param in params:
            param.grad = torch.full_like(param, 0.5)
        params[which].grad[at] = value
        scaler, expected = scaler_of(), scaler_of()
        before = snapshot(optimizer)
        optimizer.step(grad_scaler=scaler)
        assert snapshot(optimizer) == before, (which, at)
        last = last_step(optimizer)
        assert last is not None and last.skipped
        for param, twin in zip(params, other.param_groups[0]["params"], strict=True):
            twin.grad = param.grad.clone()
        expected.step(other)
        scaler.update()
        expected.update()
        assert scaler.get_scale() == expected.get_scale() < SCALE
    if steps_before == 0:
        assert not optimizer.state
    for param in params:  # and without any, it steps
        param.grad = torch.full_like(param, 0.5)
    before = snapshot(optimizer)
    optimizer.step(grad_scaler=scaler_of())
    assert snapshot(optimizer) != before


def test_large_but_finite_gradients_do_not_skip(backend):
    # Their squares overflow fp32: the norm is infinite, the gradients are not.
    param = nn.Parameter(torch.zeros(100))
    optimizer = pyupdate.optim.SGD([param], lr=1.0)
    param.grad = torch.full((100,), 1e30)
    optimizer.step(grad_scaler=scaler_of(1.0))
    assert last_step(optimizer).skipped is False
    assert torch.equal(param, torch.full((100,), -1e30))
    # Infinite only after unscaling: torch looks after it.
    param.grad = torch.full((100,), 1e30)
    before = snapshot(optimizer)
    optimizer.step(grad_scaler=scaler_of(1e-20))
    assert last_step(optimizer).skipped is True
    assert snapshot(optimizer) == before


@ways
def test_late_gradients_and_a_skipped_first_step_with_momentum(way, backend):
    # The first step that is made sets the buffer to the gradient, undampened.
    params = params_of()
    optimizer = optimizer_of(way, MOMENTUM, params)
    truth = params_of()
    other = MOMENTUM.truth(truth)
    for turn in range(6):
        scaler, expected = scaler_of(), scaler_of()
        for each in (params, truth):
            set_grads(each, turn, SCALE)
            if turn < 3:
                each[1].grad = None  # arrives late
            if turn in (0, 3):
                each[2].grad[5] = math.nan
        scaler.step(optimizer)
        expected.step(other)
        if turn == 0:
            assert not optimizer.state
        if turn == 3:
            assert params[1] not in optimizer.state
        assert_close(params, truth, optimizer, other, f"step {turn}")


@calls
def test_a_second_step_raises_torchs_error(call, backend):
    params = params_of()
    optimizer = pyupdate.optim.AdamW(params)
    set_grads(params, 0, SCALE)
    scaler = scaler_of()
    CALLS["by_argument" if call == "by_attributes" else call](optimizer, scaler)
    before = snapshot(optimizer)
    for again in (by_argument, by_scaler):
        with pytest.raises(RuntimeError, match=r"step\(\) has already been called since the last"):
            again(optimizer, scaler)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) is being called after step\(\)"):
        scaler.unscale_(optimizer)
    assert snapshot(optimizer) == before
    scaler.update()
    by_argument(optimizer, scaler)
    assert snapshot(optimizer) != before


def test_two_optimizers_share_a_scaler(backend):
    first, second = params_of(seed=1), params_of(seed=2)
    optimizers = pyupdate.optim.AdamW(first), pyupdate.optim.SGD(second, lr=0.1, momentum=0.9)
    scaler = scaler_of()
    set_grads(first, 0, SCALE)
    set_grads(second, 1, SCALE)
    second[0].grad[0] = math.inf
    before = snapshot(optimizers[1])
    for optimizer in optimizers:
        scaler.step(optimizer)
    assert snapshot(optimizers[1]) == before
    assert optimizers[0].state
    scaler.update()
    assert scaler.get_scale() == SCALE / 2


@ways
@pytest.mark.parametrize("call", ["by_argument", "by_scaler"])
def test_a_disabled_scaler_acts_as_none(way, call, backend):
    params, plain = params_of(), params_of()
    optimizer, other = (optimizer_of(way, ADAMW, each) for each in (params, plain))
    for turn in range(3):
        set_grads(params, turn, 1.0)
        set_grads(plain, turn, 1.0)
        if turn == 1:  # nobody looks
            params[0].grad[0] = plain[0].grad[0] = math.inf
        CALLS[call](optimizer, Scaler("cpu", enabled=False))
        other.step()
    for param, twin in zip(params, plain, strict=True):
        assert_same_bits(param, twin, "parameter")
    assert torch.isnan(params[0]).any()


def test_a_closure_with_a_scaler_is_torchs_error(backend):
    params = params_of()
    optimizer = pyupdate.optim.AdamW(params)
    set_grads(params, 0, SCALE)
    for call in (
        lambda: optimizer.step(lambda: 1.0, grad_scaler=scaler_of()),
        lambda: scaler_of().step(optimizer, lambda: 1.0),
    ):
        with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
            call()
    assert not optimizer.state
    optimizer.step(lambda: 1.0, grad_scaler=Scaler("cpu", enabled=False))
    assert optimizer.state


def test_a_scaler_that_has_scaled_nothing_raises_torchs_error(backend):
    params = params_of()
    optimizer = pyupdate.optim.AdamW(params)
    set_grads(params, 0, SCALE)
    with pytest.raises((RuntimeError, AssertionError), match="scale") as ours:
        optimizer.step(grad_scaler=Scaler("cpu"))
    with pytest.raises((RuntimeError, AssertionError), match="scale") as torchs:
        Scaler("cpu").step(torch.optim.AdamW(params))
    assert type(ours.value) is type(torchs.value)
    assert not optimizer.state


def test_skips_are_not_counted_where_fp32_cannot_count(compiled):
    # Torch's counter of one fp32 stands still at 2^24; the plan's own goes on, and skips do not.
    param = nn.Parameter(torch.ones(3))
    with pyupdate.use_backend("cpu"):
        optimizer = pyupdate.optim.AdamW([param])
        param.grad = torch.ones(3)
        optimizer.step()
        optimizer.state[param]["step"].fill_(2.0**24 - 2)
        count = 2**24 - 2
        for turn in range(8):
            bad = turn in (3, 5)
            param.grad = torch.full((3,), math.nan if bad else 1.0)
            optimizer.step(grad_scaler=scaler_of(1.0))
            count += not bad
            assert float(optimizer.state[param]["step"]) == float(np.float32(count))
    assert count == 2**24 + 4


def test_fp16_gradients_are_unscaled(backend):
    # Torch's own path refuses them; its fused one takes them, and so do we.
    param = nn.Parameter(torch.zeros(20, dtype=torch.float16))
    optimizer = pyupdate.optim.SGD([param], lr=0.5)
    param.grad = torch.full_like(param, 4.0)
    optimizer.step(grad_scaler=scaler_of(8.0))
    assert torch.equal(param, torch.full_like(param, -0.25))
    param.grad[19] = math.inf
    optimizer.step(grad_scaler=scaler_of(8.0))
    assert torch.equal(param, torch.full_like(param, -0.25))


@pytest.mark.parametrize("call", ["by_argument", "by_scaler", "by_unscale_first"])
def test_differentiable_steps_are_unscaled_and_skipped_too(call, backend):
    # As in meta-learning: the parameters come out of a graph.
    params, truth = ([param.clone() for param in params_of()] for _ in range(2))
    optimizer = pyupdate.optim.AdamW(params, **ADAMW.options, differentiable=True)
    other = torch.optim.AdamW(truth, **ADAMW.options, differentiable=True)
    for turn in range(3):
        scaler, expected = scaler_of(), scaler_of()
        for each in (params, truth):
            set_grads(each, turn, SCALE)
            if turn == 1:
                each[1].grad[3] = math.inf
        before = [param.detach().clone() for param in params]
        CALLS[call](optimizer, scaler)
        expected.step(other)
        assert all(map(torch.equal, params, before)) == (turn == 1)
        with pytest.raises(RuntimeError, match="has already been called"):
            CALLS["by_argument"](optimizer, scaler)
        scaler.update()
        expected.update()
        assert scaler.get_scale() == expected.get_scale()
        assert_close(params, truth, optimizer, other, f"step {turn}")


@pytest.mark.parametrize("scale", [3.0, 65536.1, 1e-39, 3e38, 1e-45, 0.0, -0.0, math.inf, math.nan])
def test_the_reciprocal_of_a_scale_is_torchs(scale):
    param = nn.Parameter(torch.ones(1))
    optimizer = pyupdate.optim.SGD([param])
    optimizer.grad_scale = stated = torch.tensor(scale)
    param.grad = torch.zeros(1)
    optimizer.step()
    expected = stated.double().reciprocal().float().item()
    assert np.array_equal(last_step(optimizer).multiplier, expected, equal_nan=True)
