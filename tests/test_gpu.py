# SPDX-License-Identifier: Apache-2.0
"""On a GPU: every rule, storage and option by ``cuda`` and ``triton`` has the bits of ``cpu``.

Skipped without one. Layouts and small numbers are test_gpu_layouts.py, streams, graphs and sizes
test_gpu_streams.py, whole training steps test_gpu_training.py; how all of them run without a GPU
is said in gpu_runs.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from cases import CASES, OTHERS, WHOLE_TENSOR
from gpu_runs import (
    ADAMW,
    DEVICE,
    FP32,
    LAMB,
    MOMENTUM,
    ONE_A_RULE,
    assert_same,
    assert_same_run,
    both,
    crossed,
    inside,
    on_each,
    parameters,
    put_gradients,
)
from torch import nn

import pyupdate

EVERY = (*CASES, *OTHERS, *WHOLE_TENSOR)


@crossed(EVERY, EVERY)
def test_every_rule(on, case):
    assert_same_run(on, case, max_norm=0.7)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_norm": 0.7, "norm_type": math.inf, "skip_nonfinite": True, "bad": (2,)},
        {"clip_value": 0.3, "ema_decay": 0.9},
        {"state_dtype": torch.float32},
        {"stochastic_rounding": True, "seed": 5},
    ],
    ids=str,
)
@crossed(ONE_A_RULE, (ADAMW, MOMENTUM, LAMB))
def test_every_option(on, case, options):
    assert_same_run(on, case, **options)


@crossed((ADAMW,), (ADAMW,))
def test_a_small_run_for_the_sanitizer(on, case):
    # What `make gpu` runs under compute-sanitizer: every pass, storage and option, few elements.
    options = {"max_norm": 0.7, "clip_value": 0.5, "ema_decay": 0.9, "skip_nonfinite": True}
    assert_same_run(on, case, bad=(1,), **options)
    assert_same_run(on, LAMB, max_norm=0.7)


# ----- what finishes by torch's operations --------------------------------------------------------


def composite(name: str, device: str, dtype: torch.dtype) -> tuple[Any, list[torch.Tensor]]:
    """Three steps of Adafactor or Muon, and where their parameters were."""
    generator = torch.Generator().manual_seed(7)
    shapes = [(40, 64), (64, 64), (90, 33), (40, 64)]
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    params = [nn.Parameter(value.to(device, dtype, copy=True)) for value in values]
    optimizer = getattr(pyupdate.optim, name)(params, lr=0.01, max_norm=0.5)
    for _ in range(3):
        for param in params:
            grad = torch.randn(param.shape, generator=generator)
            param.grad = grad.to(device, dtype)
        optimizer.step()
    return optimizer, [value.to(dtype) for value in values]


@on_each
def test_adafactor(on):
    # Its means are torch's sums, whose order is each device's own: here they are of fp64.
    with pyupdate.use_backend("cpu"):
        expected, _ = composite("Adafactor", "cpu", torch.float64)
    with inside(on):
        found, _ = composite("Adafactor", DEVICE, torch.float64)
    assert pyupdate.last_update(found) == pyupdate.last_update(expected)
    for param, twin in zip(
        found.param_groups[0]["params"], expected.param_groups[0]["params"], strict=True
    ):
        torch.testing.assert_close(param.detach().cpu(), twin.detach(), rtol=1e-12, atol=1e-14)
        assert found.state[param].keys() == expected.state[twin].keys()
        for key, value in expected.state[twin].items():
            torch.testing.assert_close(found.state[param][key].cpu(), value, rtol=1e-12, atol=0.0)


@on_each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_muon(on, dtype):
    # The momentum is a planned pass, to the bit; products of bfloat16 are rounded to 2**-8 each.
    with pyupdate.use_backend("cpu"):
        expected, before = composite("Muon", "cpu", dtype)
    with inside(on):
        found, _ = composite("Muon", DEVICE, dtype)
    assert pyupdate.last_update(found) == pyupdate.last_update(expected)
    pairs = zip(found.param_groups[0]["params"], expected.param_groups[0]["params"], strict=True)
    for i, (param, twin) in enumerate(pairs):
        momentum = found.state[param]["momentum_buffer"].cpu()
        assert_same_bits(momentum, expected.state[twin]["momentum_buffer"], f"momentum of {i}")
        moved = twin.detach().double() - before[i].double()
        off = param.detach().cpu().double() - twin.detach().double()
        assert float(off.norm()) < 0.05 * float(moved.norm())


# ----- what is there, and where -------------------------------------------------------------------


@crossed(ONE_A_RULE, (ADAMW, MOMENTUM, LAMB))
def test_gradients_that_are_late(on, case):
    def run(device: str) -> Any:
        params = parameters(device, FP32)
        optimizer = case.ours(params, skip_nonfinite=True)
        for turn in range(6):
            put_gradients(params, turn, bad=turn == 1)
            for late in (1, 2):
                if turn == late:
                    params[late].grad = None
            if turn < 3:
                params[5].grad = None
            optimizer.step()
        return optimizer, str(pyupdate.last_update(optimizer))

    both(on, run)


@crossed((ADAMW, MOMENTUM, LAMB), (ADAMW, MOMENTUM, LAMB))
def test_memory_that_moved(on, case):
    def run(device: str) -> Any:
        params = parameters(device, FP32)
        optimizer = case.ours(params, max_norm=0.9, ema_decay=0.9)
        held = []  # or the allocator would give the same memory again
        for turn in range(6):
            put_gradients(params, turn)
            optimizer.step()
            param = params[3 + turn % 3]
            if turn < 3:
                held.append(param.data)
                param.data = param.data.clone()
            else:
                inner = optimizer.state[param]
                for key, value in inner.items():
                    held.append(value)
                    inner[key] = value.clone()
            held += [other.grad for other in params]
            for other in params[turn % 2 :: 2]:
                other.grad = None
        return optimizer, str(pyupdate.last_update(optimizer))

    both(on, run)


@crossed((ADAMW, MOMENTUM, LAMB), (ADAMW, LAMB))
def test_a_skipped_first_step_leaves_zeros_and_no_count(on, case):
    def run(turns: range, device: str) -> torch.optim.Optimizer:
        params = parameters(device, FP32)
        optimizer = case.ours(params, skip_nonfinite=True)
        for turn in turns:
            put_gradients(params, turn, bad=turn == 0)
            optimizer.step()
            if turn == 0:
                for param, before in zip(params, parameters("cpu", FP32), strict=True):
                    assert_same_bits(param.detach().cpu(), before, "a parameter")
                    for key, value in optimizer.state[param].items():
                        assert not value.any(), key
        return optimizer

    with pyupdate.use_backend("cpu"):
        expected = run(range(1, 4), "cpu")
    with inside(on):
        found = run(range(4), DEVICE)
    assert_same(found, expected)
