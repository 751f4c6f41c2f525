# SPDX-License-Identifier: Apache-2.0
"""Averages of parameters that are moved behind the passes: under Muon and Adafactor."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import pyupdate
from pyupdate.optim import Adafactor, Muon

SHAPES = [(6, 4), (3, 5), (6, 4)]
DECAY = 0.875
KINDS = {"muon": Muon, "adafactor": Adafactor}


def params_of(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def give(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def moved(average: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """An average a step on, in its own precision: no two of these roundings are made at once."""
    return average + (param.detach().to(average.dtype) - average) * (1.0 - DECAY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_averages_of_what_was_stored(kind, dtype, backend):
    ours, plain = params_of(dtype), params_of(dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    true = [param.detach().to(wide).clone() for param in ours]
    optimizer = KINDS[kind](ours, ema_decay=DECAY, max_norm=5.0, skip_nonfinite=True)
    other = KINDS[kind](plain, max_norm=5.0, skip_nonfinite=True)
    for step in range(5):
        give(ours, step)
        give(plain, step)
        if step == 2:  # skipped
            ours[1].grad[2, 3] = plain[1].grad[2, 3] = math.inf
        if step == 3:  # not reached
            ours[0].grad = plain[0].grad = None
        optimizer.step()
        other.step()
        for i, param in enumerate(ours):
            assert torch.equal(param, plain[i])  # an average changes nothing else
            if step != 2 and param.grad is not None:
                true[i] = moved(true[i], param)
            found = optimizer.state[param]["ema"]
            assert found.dtype is wide
            assert torch.equal(found, true[i])
    before = [param.detach().clone() for param in ours]
    with pyupdate.averaged_weights(optimizer):
        for param, average in zip(ours, true, strict=True):
            assert torch.equal(param, average.to(dtype))
    assert all(map(torch.equal, ours, before))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_from_a_checkpoint(kind, backend):
    whole, first = params_of(torch.float32), params_of(torch.float32)
    one, two = (KINDS[kind](params, ema_decay=DECAY) for params in (whole, first))
    for step in range(2):
        for params, optimizer in ((whole, one), (first, two)):
            give(params, step)
            optimizer.step()
    rest = [nn.Parameter(param.detach().clone()) for param in first]
    three = KINDS[kind](rest, ema_decay=DECAY)
    three.load_state_dict(copy.deepcopy(two.state_dict()))
    for step in range(2, 4):
        for params, optimizer in ((whole, one), (rest, three)):
            give(params, step)
            optimizer.step()
    for param, other in zip(whole, rest, strict=True):
        assert torch.equal(param, other)
        assert torch.equal(one.state[param]["ema"], three.state[other]["ema"])


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_that_comes_in_mid_training(kind, backend):
    params = params_of(torch.float32)
    stock = {"muon": torch.optim.Muon, "adafactor": torch.optim.Adafactor}[kind](params)
    give(params, 0)
    stock.step()
    true = [param.detach().clone() for param in params]
    pyupdate.accelerate(stock, ema_decay=DECAY)
    for step in range(1, 3):
        give(params, step)
        stock.step()
        for i, param in enumerate(params):
            true[i] = moved(true[i], param)
            assert torch.equal(stock.state[param]["ema"], true[i])


@pytest.mark.parametrize("options", [{}, {"in_backward": True}, {"accumulation_steps": 2}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_update_model_moves_them(kind, options, backend):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 2, bias=False))
    pyupdate.build(model, kind, ema_decay=DECAY, **options)
    true = [param.detach().clone() for param in model.parameters()]
    data = torch.randn(8, 4)
    for micro in range(4):
        pyupdate.update_model(model, (model(data) ** 2).mean(), retain_graph=False)
        if micro % options.get("accumulation_steps", 1) != options.get("accumulation_steps", 1) - 1:
            continue
        for i, param in enumerate(model.parameters()):
            true[i] = moved(true[i], param)
            assert torch.equal(model.current_optimizer.state[param]["ema"], true[i])
