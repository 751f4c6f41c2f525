# SPDX-License-Identifier: Apache-2.0
"""Faults of known loss-scaling paths, torch's own among them: a named test each.

What only a GPU can show is listed in docs/gpu_suite.md.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from cases import FULL
from torch import nn
from ways import optimizer_of, snapshot, ways

import pyupdate
from pyupdate import build, drain, last_update, update_model

ADAMW = next(case for case in FULL if case.name == "adamw")
MOMENTUM = next(case for case in FULL if case.name == "sgd_momentum")
SCALE = 2.0**7


def scaler_of(scale: float = SCALE) -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.zeros(()))  # torch makes its tensors at the first loss
    return scaler


def with_grad(values: Any, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    grad = torch.as_tensor(values, dtype=dtype)
    param = nn.Parameter(torch.ones_like(grad))
    param.grad = grad
    return param


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry a call of torch's own check-and-unscale pass, which reads and writes gradients."""
    seen: list[int] = []
    own = torch._amp_foreach_non_finite_check_and_unscale_

    def counted(grads, *args):
        seen.append(len(grads))
        return own(grads, *args)

    monkeypatch.setattr(torch, "_amp_foreach_non_finite_check_and_unscale_", counted)
    return seen


# ----- how often torch's own pass runs ------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", torch.optim.AdamW, torch.optim.SGD], ids=str)
def test_update_model_never_runs_torchs_pass(optimizer, backend, passes):
    models = [build(nn.Linear(4, 2), optimizer, model_name=f"net {i}") for i in range(2)]
    scaler = scaler_of()
    for turn in range(3):
        x = torch.full((3, 4), math.inf if turn == 1 else 1.0)
        deferred: dict = {}
        update_model(models[0], models[0](x), scaler=scaler, defer=True, deferred=deferred)
        update_model(models[1], models[1](x), scaler=scaler)
        drain(deferred)
        assert [last_update(model).skipped for model in models] == [turn == 1] * 2
        scaler.update()
    assert scaler.get_scale() == SCALE / 2
    assert passes == []


@ways
def test_a_bare_step_never_runs_torchs_pass(way, backend, passes):
    param = with_grad([SCALE, 2 * SCALE])
    optimizer = optimizer_of(way, ADAMW, [param])
    torch.optim.lr_scheduler.ConstantLR(optimizer)  # which wraps the step
    scaler_of().step(optimizer)
    assert optimizer.state
    assert passes == []


@ways
def test_unscale_is_torchs_pass_and_runs_once(way, backend, passes):
    param, twin = (with_grad([3 * SCALE, 4 * SCALE]) for _ in range(2))
    optimizer = optimizer_of(way, MOMENTUM, [param])
    other = MOMENTUM.truth([twin])
    for each, stepped in ((param, optimizer), (twin, other)):
        scaler = scaler_of()
        scaler.unscale_(stepped)
        assert torch.nn.utils.clip_grad_norm_([each], 1.0) == 5.0
        scaler.step(stepped)
        assert passes == [1]
        passes.clear()
    torch.testing.assert_close(param, twin, rtol=1e-6, atol=0.0)


# ----- flags and stages ---------------------------------------------------------------------------


@ways
@pytest.mark.parametrize("found", [1.0, 2.0, 5.0])
def test_found_inf_that_is_summed_over_devices(way, found, backend):
    # Fused kernels of torch look for 1: they apply a step of nan, and the counter goes to -1.
    param = with_grad([math.nan, 1.0])
    optimizer = optimizer_of(way, ADAMW, [param])
    before = snapshot(optimizer)
    optimizer.found_inf = torch.tensor(found)
    optimizer.grad_scale = torch.tensor(SCALE)
    optimizer.step()
    assert snapshot(optimizer) == before
    del optimizer.found_inf, optimizer.grad_scale
    # The same from a scaler that has looked on two devices, where 0 comes first.
    scaler = scaler_of()
    scaler.unscale_(optimizer)
    flags = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    flags.clear()
    flags[torch.device("cuda:0")] = torch.tensor(0.0)
    flags[torch.device("cuda:1")] = torch.tensor(found)
    before = snapshot(optimizer)
    scaler.step(optimizer)
    assert snapshot(optimizer) == before


@ways
def test_found_inf_without_a_scale(way, backend):
    # It was dropped where grad_scale was None (pytorch PR 95847).
    param = with_grad([math.inf])
    optimizer = optimizer_of(way, ADAMW, [param])
    before = snapshot(optimizer)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), None
    optimizer.step()
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("call", ["scaler.step", "grad_scaler="])
@ways
def test_gradients_are_not_unscaled_twice(way, call, backend):
    # Optimizers that ask for the scaler and do not look at its stage divide again (PR 94060).
    param = with_grad([SCALE])
    ours = pyupdate.optim.SGD([param], lr=1.0)
    optimizer = ours if way == "ours" else pyupdate.accelerate(torch.optim.SGD([param], lr=1.0))
    scaler = scaler_of()
    scaler.unscale_(optimizer)
    if call == "scaler.step":
        scaler.step(optimizer)
    else:
        optimizer.step(grad_scaler=scaler)
    assert param.item() == 0.0  # 1 - 1


@pytest.mark.parametrize("unscaled", [False, True])
@ways
def test_a_grad_scale_of_the_users(way, unscaled, backend):
    # Torch multiplies it into its own scale; where the gradients were unscaled, it alone divides.
    truth = nn.Parameter(torch.tensor([1.0, 2.0]))
    truth.grad = torch.tensor([0.25, -1.0])
    param = nn.Parameter(truth.detach().clone())
    param.grad = truth.grad * SCALE * 8.0
    optimizer, other = (
        optimizer_of(which, MOMENTUM, [each]) for which, each in ((way, param), ("ours", truth))
    )
    optimizer.grad_scale = torch.tensor(8.0)
    scaler = scaler_of()
    if unscaled:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    other.step()
    assert_same_bits(param, truth, "parameter")
    assert float(optimizer.grad_scale) == 8.0
    scaler.update()


def test_two_optimizers_on_one_scaler_with_one_unscaled(backend):
    models = [build(nn.Linear(2, 1), "sgd", model_name=f"net {i}") for i in range(2)]
    first, second = (model.current_optimizer for model in models)
    scaler = scaler_of()
    before = [param.detach().clone() for param in models[1].parameters()]
    scaler.scale(models[0](torch.ones(3, 2)).mean()).backward()
    scaler.unscale_(first)
    scaler.step(first)
    update_model(models[1], models[1](torch.full((3, 2), math.nan)), scaler=scaler)
    assert all(map(torch.equal, models[1].parameters(), before))
    with pytest.raises(RuntimeError, match="has already been called since the last update"):
        scaler.step(second)
    scaler.update()
    assert scaler.get_scale() == SCALE / 2  # for one inf, whoever found it


def test_whether_a_step_was_skipped_can_be_asked(backend):
    # scaler.step does not say so (pytorch issues 67590, 152279): a scheduler goes on by mistake.
    param = with_grad([SCALE])
    optimizer = pyupdate.optim.AdamW([param])
    for bad in (False, True, False):
        param.grad = torch.tensor([math.inf if bad else SCALE])
        scaler_of().step(optimizer)
        assert last_update(optimizer).skipped is bad


# ----- what a skipped step leaves -----------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(pyupdate.optim.CLASSES))
@pytest.mark.parametrize("at", [0, 1])
def test_a_skipped_step_leaves_nothing_behind(name, at, backend):
    # Torch's fused SGD reads uninitialised momentum after it; a Muon's was poisoned for good.
    def run(skips: bool) -> tuple[nn.Parameter, Any]:
        generator = torch.Generator().manual_seed(3)
        param = nn.Parameter(torch.randn(6, 5, generator=generator))
        kind: Any = pyupdate.optim.CLASSES[name]
        options = {"momentum": 0.9, "lr": 0.1} if name == "SGD" else {}
        optimizer = kind([param], **options)
        for turn in range(3):
            grad = torch.randn(6, 5, generator=generator) * SCALE
            if skips and turn == at:
                param.grad = torch.full_like(grad, math.inf)
                scaler_of().step(optimizer)
                assert bool(optimizer.state.get(param)) is (at > 0 or made_at_once)
            param.grad = grad
            scaler_of().step(optimizer)
        return param, optimizer.state[param]

    made_at_once = bool(pyupdate.optim.CLASSES[name]([nn.Parameter(torch.ones(2, 2))]).state)
    (param, state), (truth, expected) = run(True), run(False)
    assert_same_bits(param, truth, "parameter")
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert_same_bits(torch.as_tensor(state[key]), torch.as_tensor(value), key)


@ways
def test_a_gradient_that_arrives_late(way, backend):
    # Torch's fused SGD with momentum raises TypeError: its list of buffers has a None.
    params, truth = ([with_grad([SCALE]), nn.Parameter(torch.ones(1))] for _ in range(2))
    optimizer, other = optimizer_of(way, MOMENTUM, params), MOMENTUM.truth(truth)
    for late in (False, True):
        for each, stepped in ((params, optimizer), (truth, other)):
            each[0].grad = torch.tensor([2 * SCALE])
            each[1].grad = torch.tensor([3 * SCALE]) if late else None
            scaler_of().step(stepped)
    for param, twin in zip(params, truth, strict=True):
        torch.testing.assert_close(param, twin, rtol=1e-6, atol=0.0)


# ----- norms of half gradients --------------------------------------------------------------------


def test_an_inf_is_skipped_and_not_clipped_to_nan(backend):
    # clip_grad_norm_ makes nan of the inf and 0 of all others.
    params = [with_grad([math.inf, SCALE]), with_grad([SCALE])]
    optimizer = pyupdate.optim.SGD(params, lr=1.0, max_norm=1.0)
    before = snapshot(optimizer)
    scaler_of().step(optimizer)
    assert snapshot(optimizer) == before


def test_the_norm_of_half_gradients_does_not_overflow(backend):
    # 4 x 65,536 gradients of 300: torch's norm is inf, and every gradient becomes 0.
    params = [with_grad(torch.full((65_536,), 300.0), torch.float16) for _ in range(4)]
    optimizer = pyupdate.optim.SGD(params, lr=1.0, max_norm=512.0)
    optimizer.step()
    assert last_update(optimizer).norm == 300.0 * 512.0
    assert all(torch.equal(param, torch.zeros_like(param)) for param in params)  # 1 - 300 / 300


def test_a_small_clip_factor_does_not_vanish_in_half_precision(backend):
    # 2.6e-9 is 0 in float16; times 60,000 it is not.
    param = with_grad(torch.full((4096,), 60_000.0), torch.float16)
    with torch.no_grad():
        param.zero_()
    optimizer = pyupdate.optim.SGD([param], lr=1.0, max_norm=0.01)
    optimizer.step()
    expected = torch.full_like(param, -0.01 / 64.0)
    torch.testing.assert_close(param, expected, rtol=2.0**-10, atol=0.0)


def test_the_norm_of_many_elements_is_exact_to_seven_digits(backend):
    # One running sum in float32 is off by 3e-5.
    generator = torch.Generator().manual_seed(0)
    params = [with_grad(torch.randn(512, generator=generator)) for _ in range(2000)]
    optimizer = pyupdate.optim.SGD(params, lr=0.1, max_norm=1.0)
    optimizer.step()
    exact = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in params))
    assert last_update(optimizer).norm == pytest.approx(exact, rel=2e-7)


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_an_empty_gradient_is_no_part_of_the_norm(norm_type, backend):
    params = [with_grad(torch.zeros(0, 3)), with_grad([3 * SCALE, 4 * SCALE])]
    optimizer = pyupdate.optim.SGD(params, lr=0.0, max_norm=1.0, norm_type=norm_type)
    scaler_of().step(optimizer)
    assert last_update(optimizer).norm == (5.0 if norm_type == 2.0 else 4.0)


def test_state_in_fp32_keeps_its_bits_beside_half_parameters(backend):
    # Apex's capturable kernel writes it through the parameter's type.
    param = with_grad([SCALE], torch.float16)
    optimizer = pyupdate.optim.AdamW([param], state_dtype=torch.float32)
    scaler_of().step(optimizer)
    exp_avg = optimizer.state[param]["exp_avg"]
    assert exp_avg.dtype is torch.float32
    assert exp_avg.item() != exp_avg.half().item()
    assert exp_avg.item() == pytest.approx(0.1, rel=1e-6)
