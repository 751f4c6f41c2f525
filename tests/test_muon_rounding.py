# SPDX-License-Identifier: Apache-2.0
"""Muon with stochastic rounding: the draws are numpy's, small moves are made on average."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import name_of
from test_muon import STEP, give, params_of, values
from torch import nn

from pyupdate.kernels import rounding
from pyupdate.optim import Muon


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_a_move_is_rounded_by_the_draws_of_seed_step_and_element(dtype, backend):
    """A twin in float32, of the same numbers and the same buffer, says what is rounded."""
    seed, shapes = 5, ((24, 8), (3, 4, 2), (24, 8))
    options: dict[str, Any] = {"flatten_trailing": True, "state_dtype": torch.float32}
    params = params_of(dtype, shapes)
    params[2] = nn.Parameter(params[2].detach().t().contiguous().t())  # columns lie together
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    ours = Muon(groups, lr=1e-3, stochastic_rounding=True, seed=seed, **options)
    wide = [nn.Parameter(param.detach().float()) for param in params]
    theirs = Muon(wide, lr=1e-3, flatten_trailing=True)
    convert = rounding.to_bf16 if dtype is torch.bfloat16 else rounding.to_fp16
    for step in (1, 2, 3):
        grads = values(step, dtype, shapes)
        give(params, grads)
        give(wide, [grad.float() for grad in grads])
        ours.step()
        theirs.step()
        for i, (param, exact) in enumerate(zip(params, wide, strict=True)):
            flat = exact.detach().t() if i == 2 else exact.detach()
            bits = flat.contiguous().numpy().reshape(-1).view(np.int32).astype(np.int64)
            place = 0 if i == 0 else 1 << 32 | (i - 1)
            key = rounding.key_of(seed, step, place, 1, 0)
            drawn = rounding.draws(key, np.arange(bits.size, dtype=np.int64))
            expected = convert(bits & 0xFFFF_FFFF, drawn)
            stored = param.detach().t() if i == 2 else param.detach()
            found = stored.contiguous().view(torch.int16).numpy().reshape(-1)
            assert (found.astype(np.int64) & 0xFFFF == expected).all(), f"{shapes[i]}, step {step}"
        with torch.no_grad():
            for param, exact in zip(params, wide, strict=True):
                exact.copy_(param)


def test_small_moves_are_made_on_average(backend):
    """Each is 1/40 of a place of bfloat16 below 1; to nearest none would be made."""
    grad = values(3, torch.float32, [(64, 64)])[0]
    moved = {}
    for kind, options in {
        "chance": {"stochastic_rounding": True, "seed": 3},
        "nearest": {},
        "exact": {},
    }.items():
        dtype = torch.float32 if kind == "exact" else torch.bfloat16
        param = nn.Parameter(torch.ones(64, 64, dtype=dtype))
        optimizer = Muon([param], lr=1e-3, weight_decay=0.0, **options)
        for _ in range(100):
            param.grad = grad.to(dtype)
            optimizer.step()
        moved[kind] = param.detach().double() - 1.0
    assert not moved["nearest"].any()
    # The sum of a rounding's errors over 100 steps has a variance of less than 100 x step^2 / 4.
    error = (moved["chance"] - moved["exact"]).mean().abs()
    assert error < 4.0 * (100 * STEP**2 / 4 / 64**2) ** 0.5
    slope = (moved["chance"] * moved["exact"]).sum() / moved["exact"].square().sum()
    assert abs(slope - 1.0) < 0.1


def test_what_is_drawn_repeats_and_counts_skipped_steps_not(backend):
    def train(skip: bool) -> torch.Tensor:
        param = nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
        options: dict[str, Any] = {"stochastic_rounding": True, "skip_nonfinite": True}
        optimizer = Muon([param], lr=1e-2, **options)
        for step in range(6):
            param.grad = values(step, torch.bfloat16, [(8, 8)])[0]
            if skip and step == 0:
                param.grad = torch.full((8, 8), float("inf"), dtype=torch.bfloat16)
                optimizer.step()
                param.grad = values(step, torch.bfloat16, [(8, 8)])[0]
            optimizer.step()
        return param.detach()

    assert torch.equal(train(False), train(False))
    assert torch.equal(train(False), train(True))
