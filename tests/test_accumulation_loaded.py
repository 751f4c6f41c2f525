# SPDX-License-Identifier: Apache-2.0
"""Windows of ``accumulation_steps`` through checkpoints: by optimizers that counted before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from training import loss_of, network, scaler_of

import pyupdate

K = 3


def accumulating(model: nn.Module) -> Any:
    model.current_optimizer = pyupdate.optim.AdamW(  # type: ignore[assignment]
        model.parameters(), lr=0.05, accumulation_steps=K
    )
    return model.current_optimizer


def count_one(by: str, model: Any, seed: int, scaler: torch.amp.GradScaler) -> None:
    if by == "update_model":
        pyupdate.update_model(model, loss_of(model, seed), scaler=scaler)
    else:
        scaler.scale(loss_of(model, seed).mean()).backward()
        scaler.step(model.current_optimizer)
        scaler.update()
        model.current_optimizer.zero_grad()


def torchs_step(twin: nn.Module, seeds: range) -> None:
    other = torch.optim.AdamW(twin.parameters(), lr=0.05, foreach=False)
    for seed in seeds:
        (loss_of(twin, seed).mean() / len(seeds)).backward()
    other.step()


def gradients_of(model: nn.Module) -> list[torch.Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


# ----- the scale of a loaded window ---------------------------------------------------------------


@pytest.mark.parametrize("by", ["update_model", "step"])
def test_a_loaded_window_has_its_own_scale(by, backend):
    model = network()
    twin = copy.deepcopy(model)
    start = copy.deepcopy(model.state_dict())
    saved_by = accumulating(model)
    scaler = scaler_of(2.0**6)
    for seed in range(2):
        count_one(by, model, seed, scaler)
    saved, grads = copy.deepcopy(saved_by.state_dict()), gradients_of(model)
    other = network(1)
    optimizer = accumulating(other)
    count_one(by, other, 7, scaler_of(2.0**10))  # of gradients that the loaded ones replace
    other.load_state_dict(start)
    for param, grad in zip(other.parameters(), grads, strict=True):
        param.grad = grad
    optimizer.load_state_dict(saved)
    count_one(by, other, 2, scaler)
    torchs_step(twin, range(K))
    for param, expected in zip(other.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("by", ["update_model", "step"])
def test_gradients_that_stay_while_a_state_is_loaded_keep_their_scale(by, backend):
    model = network()
    optimizer = accumulating(model)
    scaler = scaler_of(2.0**6)
    for seed in range(2):
        count_one(by, model, seed, scaler)
        if seed == 0:
            saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)  # says 1; two are in .grad
    with pytest.raises(ValueError, match=r"changed from 64\.0 to 1024\.0 inside a window"):
        count_one(by, model, 2, scaler_of(2.0**10))


# ----- what becomes of a window's gradients afterwards --------------------------------------------


def one_number(**options: Any) -> tuple[nn.Module, Any]:
    """A parameter of 1, stepped by its gradient's mean over three micro-batches."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = pyupdate.optim.SGD(model.parameters(), lr=1.0, accumulation_steps=K, **options)
    model.current_optimizer = optimizer  # type: ignore[assignment]
    return model, optimizer


def add(model: Any, gradient: float) -> None:
    (gradient * model.weight).sum().backward()
    model.current_optimizer.step()
    model.current_optimizer.zero_grad()


@pytest.mark.parametrize("by", ["the same", "another"])
@pytest.mark.parametrize("how", ["gone", "replaced"])
def test_gradients_that_are_lost_after_a_load_are_seen(how, by, backend):
    model, optimizer = one_number()
    add(model, 1.0)
    saved = copy.deepcopy(optimizer.state_dict())
    if by == "another":
        gradient = model.weight.grad
        model, optimizer = one_number()
        model.weight.grad = gradient.clone()
    optimizer.load_state_dict(saved)
    model.weight.grad = None if how == "gone" else torch.ones(1, 1)
    if how == "gone":
        (3.0 * model.weight).sum().backward()
    with pytest.raises(RuntimeError, match=r"1 of accumulation_steps=3 .* is another tensor"):
        optimizer.step()
    assert model.weight.item() == 1.0


def test_other_options_leave_an_open_window_as_it_is(backend):
    model, optimizer = one_number()
    add(model, 1.0)
    with pytest.raises(ValueError, match="to become 2 in an open window, when 1 of 3"):
        pyupdate.accelerate(optimizer, accumulation_steps=2)
    assert pyupdate.accelerate(optimizer, accumulation_steps=K, max_norm=1e9) is optimizer
    add(model, 3.0)
    assert model.weight.item() == 1.0
    add(model, 3.0)
    assert model.weight.item() == pytest.approx(1.0 - (1.0 + 3.0 + 3.0) / 3)


def test_a_group_of_another_optimizer_has_no_count_of_its_own(backend):
    model, optimizer = one_number()
    add(model, 1.0)
    param = nn.Parameter(torch.ones(1))
    group = {**optimizer.param_groups[0], "params": [param]}
    other = pyupdate.optim.SGD([group], lr=1.0, accumulation_steps=K)
    weights = []
    for _ in range(K):
        param.sum().backward()
        other.step()
        other.zero_grad()
        weights.append(param.item())
    assert weights == [1.0, 1.0, 0.0]
