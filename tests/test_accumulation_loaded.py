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
