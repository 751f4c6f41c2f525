# SPDX-License-Identifier: Apache-2.0
"""Adafactor in a training loop: scaler, micro-batches, state to torch and back, update_model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adafactor_cases import assert_close, give, params_of, values
from bits import assert_same_bits
from cases import DTYPES, name_of
from torch import nn

import pyupdate
from pyupdate.optim import Adafactor
from pyupdate.pytorch.engines import engine_of, last_step


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_scaler_unscales_and_a_skipped_step_leaves_all_bits(dtype, backend):
    shapes = ((), (7,), (8, 3))
    params, twins = params_of(dtype, shapes), params_of(dtype, shapes)
    optimizer, truth = Adafactor(params, lr=0.125), Adafactor(twins, lr=0.125)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    grads = values(3, dtype, shapes)
    give(twins, grads)
    truth.step()
    give(params, [torch.full_like(grad, float("inf")) for grad in grads])
    scaler.step(optimizer)  # a skipped first step leaves no state
    scaler.update()
    assert not optimizer.state
    give(params, [grad * 2.0 for grad in grads])
    scaler.step(optimizer)
    scaler.update()
    for param, twin in zip(params, twins, strict=True):
        assert_same_bits(param.detach(), twin.detach(), "unscaled")
    give(params, grads)
    assert params[2].grad is not None
    params[2].grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    for param, twin in zip(params, twins, strict=True):
        assert_same_bits(param.detach(), twin.detach(), "skipped")
        for key, value in truth.state[twin].items():
            assert_same_bits(optimizer.state[param][key], value, f"skipped, {key}")
    assert scaler.get_scale() == 1.0


def test_state_goes_to_torch_and_back_in_the_middle(backend):
    shapes = ((), (7,), (8, 3), (2, 3, 4))
    params, twins = params_of(torch.float64, shapes), params_of(torch.float64, shapes)
    truth = torch.optim.Adafactor(twins, lr=0.125)
    kinds = (Adafactor, torch.optim.Adafactor, Adafactor, torch.optim.Adafactor)
    saved: Any = None
    for seed, kind in enumerate(kinds, 2):
        optimizer = kind(params, lr=0.5)
        if saved is not None:
            optimizer.load_state_dict(saved)
        optimizer.param_groups[0]["lr"] = 0.125
        give(params, values(seed, torch.float64, shapes))
        give(twins, values(seed, torch.float64, shapes))
        optimizer.step()
        truth.step()
        saved = copy.deepcopy(optimizer.state_dict())
    for param, twin in zip(params, twins, strict=True):
        assert_close(param, twin, len(kinds) * twin.detach().abs(), "moved to and fro")
    assert saved["param_groups"][0].keys() == truth.state_dict()["param_groups"][0].keys()


def test_accumulated_micro_batches_are_their_mean():
    param, twin = (nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    optimizer = Adafactor([param], eps=(0.5, 1e-3), accumulation_steps=2)
    first, second = values(2, torch.float32, [(4, 3)])[0], values(3, torch.float32, [(4, 3)])[0]
    param.grad = first.clone()
    optimizer.step()
    assert param.tolist() == twin.tolist()
    param.grad += second
    optimizer.step()
    twin.grad = (first + second) / 2
    torch.optim.Adafactor([twin], eps=(0.5, 1e-3)).step()
    assert_close(param, twin, twin.detach().abs(), "accumulated")


def test_a_stock_adafactor_is_accelerated_and_its_state_goes_on():
    param, twin = (nn.Parameter(torch.ones(5, 3)) for _ in range(2))
    stock, theirs = torch.optim.Adafactor([param]), torch.optim.Adafactor([twin])
    for seed in (2, 3):
        grad = values(seed, torch.float32, [(5, 3)])[0]
        param.grad, twin.grad = grad, grad.clone()
        stock.step()
        theirs.step()
        pyupdate.accelerate(stock)
    assert type(stock) is Adafactor
    assert_close(param, twin, twin.detach().abs(), "accelerated")


def test_update_model_steps_it_and_what_has_no_gradient_stays():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    twin = copy.deepcopy(model)
    pyupdate.build(model, "adafactor", lr=0.25)
    truth = torch.optim.Adafactor(twin.parameters(), lr=0.25)
    x = values(2, torch.float32, [(2, 4)])[0]
    for _ in range(2):
        pyupdate.update_model(model, (model[0](x) ** 2).mean())
        truth.zero_grad()
        (twin[0](x) ** 2).mean().backward()
        truth.step()
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-6)
    assert list(model.current_optimizer.state) == [model[0].weight, model[0].bias]
    assert model[0].weight.grad is None


def test_the_pass_runs_compiled(compiled):
    param = nn.Parameter(torch.ones(4, 4))
    param.grad = torch.ones(4, 4)
    optimizer = Adafactor([param])
    optimizer.step()
    (plan,) = engine_of(optimizer).plans.values()
    assert plan.backends == ("cpu",)


def test_update_model_steps_a_stock_one_unasked(backend):
    model = pyupdate.build(nn.Linear(3, 2), lambda p: torch.optim.Adafactor(p))
    optimizer: Any = model.current_optimizer
    twin = copy.deepcopy(nn.Sequential(model))[0]
    truth = Adafactor(twin.parameters())
    x = values(2, torch.float32, [(4, 3)])[0]
    for _ in range(2):
        pyupdate.update_model(model, model(x) ** 2)
        truth.zero_grad()
        (twin(x) ** 2).mean().backward()
        truth.step()
    assert type(optimizer) is torch.optim.Adafactor
    assert last_step(optimizer) is not None
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same_bits(param.detach(), other.detach(), "stock")
        for key, value in truth.state[other].items():
            assert_same_bits(optimizer.state[param][key], value, key)
    assert isinstance(pyupdate.accelerate(optimizer), Adafactor)
