# SPDX-License-Identifier: Apache-2.0
"""One model on several CUDA devices: two parts whose device is this machine's CPU.

The truth is the back end ``cpu``, which steps all rows in one plan, bit for bit. What two parts on
one memory cannot show is torch's copies between devices, and their order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from bits import assert_same_bits
from device_on_cpu import cuda_on_cpu
from test_cuda_backend import ADAMW, MOMENTUM, Scenario, assert_same_state, give_gradients
from test_cuda_backend import parameters as parameters_of
from ways import plan_of

import pyupdate
from pyupdate.backends import cuda


@pytest.fixture
def on_devices(cuda_module: Any) -> Any:
    """A context in which every third row is on one device and the others on another."""

    @contextmanager
    def inside() -> Iterator[None]:
        def part(rows: Any, rules: Any, home: Any, averages: bool) -> cuda.Part:
            return cuda.Part(rows, rules, torch.device("cpu"), averages, cuda_module)

        with (
            cuda_on_cpu(cuda_module),
            mock.patch.object(cuda, "home", lambda row, rule, chosen: row.position % 3 == 0),
            mock.patch.object(cuda, "part", part),
        ):
            yield

    return inside


def assert_same_run(scenario: Scenario, on_devices: Any) -> None:
    expected_rest, expected = scenario()
    with on_devices():
        found_rest, found = scenario()
        assert [type(part) for part in plan_of(found).parts] == [cuda.Part, cuda.Part]
    assert_same_state(found, expected)
    for k, (a, b) in enumerate(zip(found_rest, expected_rest, strict=True)):
        assert_same_bits(a, b, f"result {k}")


def facts(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    last = pyupdate.last_update(optimizer)
    norm = math.nan if last.norm is None else last.norm
    return [torch.tensor([norm, last.multiplier], dtype=torch.float64)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_norm": 0.5},
        {"max_norm": 0.5, "norm_type": math.inf, "ema_decay": 0.9},
        {"skip_nonfinite": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("case", [ADAMW, MOMENTUM], ids=str)
def test_a_step_has_the_bits_of_one_plan(case, options, on_devices, compiled):
    def run() -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
        params = parameters_of()
        optimizer = case.ours(params, **options)
        said = []
        for turn in range(4):
            give_gradients(params, turn, bad=turn == 2 and "skip_nonfinite" in options)
            if turn == 1:
                params[2].grad = params[3].grad = None  # late, and one of each device
            optimizer.step()
            said += facts(optimizer)
        return said, optimizer

    assert_same_run(run, on_devices)


def test_the_rows_are_added_in_the_order_of_the_plan(on_devices, compiled):
    # 6.25 beside 2**54 is rounded in fp64, one otherwise than several together: an order shows.
    def run() -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
        params = [torch.nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(11)]
        optimizer = ADAMW.ours(params, max_norm=0.5)
        said = []
        for turn in range(11):
            for k, param in enumerate(params):
                param.grad = torch.full_like(param, 2.0**27 if k == turn else 2.5)
            optimizer.step()
            said += facts(optimizer)
        return said, optimizer

    assert_same_run(run, on_devices)


@pytest.mark.parametrize("where", [3, 4], ids=["one device", "the other"])
@pytest.mark.parametrize("bad", [(), (1, 2)], ids=str)
def test_a_scaler_is_read_on_each_device(bad, where, on_devices, compiled):
    def run() -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
        params = parameters_of((torch.float32,))
        optimizer = ADAMW.ours(params, max_norm=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=3.0, growth_interval=2)
        scaler.scale(torch.zeros(()))
        scales = []
        for turn in range(5):
            give_gradients(params, turn)
            if turn in bad:
                params[where].grad[-1] = math.inf
            scaler.step(optimizer)
            scaler.update()
            scales.append(torch.tensor(scaler.get_scale()))
        return scales, optimizer

    assert_same_run(run, on_devices)


def test_nothing_waits(on_devices, monkeypatch, compiled):
    def read(self: torch.Tensor) -> Any:
        pytest.fail("the step waits for the device")

    params = parameters_of()
    optimizer = ADAMW.ours(params, max_norm=0.5)
    with on_devices():
        for turn in range(3):
            give_gradients(params, turn)
            optimizer.step()
            for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
                monkeypatch.setattr(torch.Tensor, name, read)
        monkeypatch.undo()


def test_an_error_is_raised_with_nothing_written(on_devices, compiled):
    params = parameters_of((torch.float32,))
    with on_devices():
        optimizer = ADAMW.ours(params, max_norm=1.0, error_if_nonfinite=True)
        give_gradients(params, 0)
        optimizer.step()
        before = [param.detach().clone() for param in params]
        give_gradients(params, 1, bad=True)
        with pytest.raises(RuntimeError, match="non-finite"):
            optimizer.step()
        give_gradients(params, 2)
        params[4].grad = optimizer.state[params[4]]["exp_avg"]
        with pytest.raises(ValueError, match="lies in the memory of state"):
            optimizer.step()
    for k, (param, value) in enumerate(zip(params, before, strict=True)):
        assert_same_bits(param.detach(), value, f"parameter {k}")
