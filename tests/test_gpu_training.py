# SPDX-License-Identifier: Apache-2.0
"""On a GPU: whole training steps by ``cuda`` and ``triton`` have the bits of ``cpu``.

Losses are sums of products, whose gradients every device rounds alike. Skipped without a GPU.
"""

from __future__ import annotations

import io
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from gpu_runs import (
    ADAMW,
    DEVICE,
    FP32,
    LAMB,
    MOMENTUM,
    assert_same,
    both,
    crossed,
    debug_mode_is_new,
    inside,
    on_each,
    parameters,
    put_gradients,
)
from torch import nn

import pyupdate


class Products(nn.Module):
    """Parameters whose gradients are the weights that a turn gives them."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.params = nn.ParameterList(parameters(device, FP32))

    def loss(self, turn: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(300 + turn)
        terms = []
        for param in self.params:
            weights = torch.randn(param.shape, generator=generator).to(param.device)
            terms.append((param * weights).sum())
        return torch.stack(terms).sum()


# ----- scalers ------------------------------------------------------------------------------------


@debug_mode_is_new
@crossed((ADAMW, MOMENTUM, LAMB), (ADAMW, LAMB))
def test_a_whole_step_with_a_scaler_never_waits(on, case):
    def run(device: str) -> Any:
        params = parameters(device)
        optimizer = case.ours(params, max_norm=0.9, clip_value=0.4, ema_decay=0.9)
        scaler = torch.amp.GradScaler(device, init_scale=3.0, growth_interval=2)
        scaler.scale(torch.zeros((), device=device))
        for turn in range(8):
            put_gradients(params, turn, bad=turn == 5)
            # In the first turn state is made and tables are sent.
            watched = device == "cuda" and turn > 0
            if watched:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            try:
                scaler.step(optimizer)
                scaler.update()
            finally:
                if watched:
                    torch.cuda.set_sync_debug_mode("default")
        last = pyupdate.last_update(optimizer)
        assert last is not None and not last.skipped
        return optimizer, scaler.get_scale()

    both(on, run)


@on_each
def test_a_scaler_on_the_cpu_of_gradients_on_the_device(on):
    def run(device: str) -> Any:
        params = parameters(device)
        optimizer = ADAMW.ours(params, max_norm=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
        scaler.scale(torch.zeros(()))
        skipped = []
        for turn in range(5):
            put_gradients(params, turn, bad=turn == 2)
            scaler.step(optimizer)
            scaler.update()
            last = pyupdate.last_update(optimizer)
            assert last is not None
            skipped.append(last.skipped)
        return optimizer, (skipped, scaler.get_scale())

    both(on, run)


# ----- the front end ------------------------------------------------------------------------------


@on_each
@pytest.mark.parametrize("window", [1, 2], ids=["plain", "accumulated"])
def test_update_model(on, window):
    def run(device: str) -> Any:
        model = pyupdate.build(
            Products(device),
            lambda params: pyupdate.optim.AdamW(
                params, lr=0.01, max_norm=0.5, ema_decay=0.9, accumulation_steps=window
            ),
        )
        for turn in range(6):
            pyupdate.update_model(model, model.loss(turn))
        return model.current_optimizer, str(pyupdate.last_update(model))

    both(on, run)


@on_each
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_in_backward(on, name):
    def run(device: str) -> Any:
        model = pyupdate.build(Products(device), name, lr=0.01, in_backward=device == DEVICE)
        for turn in range(4):
            pyupdate.update_model(model, model.loss(turn), retain_graph=False)
            assert all(param.grad is None for param in model.parameters())
        return model.current_optimizer, None

    both(on, run)


@crossed((ADAMW, MOMENTUM, LAMB), (ADAMW, LAMB))
def test_a_checkpoint_goes_there_and_back(on, case):
    def run(*there: bool) -> torch.optim.Optimizer:
        saved: dict[str, Any] | None = None
        values: list[torch.Tensor] = []
        for part, device in enumerate(DEVICE if each else "cpu" for each in there):
            params = parameters(device)
            for param, value in zip(params, values, strict=bool(values)):
                param.data.copy_(value)
            optimizer = case.ours(params, max_norm=0.8)
            if saved is not None:
                optimizer.load_state_dict(saved)
            with inside(on) if there[part] else nullcontext():
                for turn in range(2 * part, 2 * part + 2):
                    put_gradients(params, turn)
                    optimizer.step()
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            values = [param.detach().cpu().clone() for param in params]
        return optimizer

    with pyupdate.use_backend("cpu"):
        expected = run(False, False, False, False)
    assert_same(run(True, True, False, True), expected)
