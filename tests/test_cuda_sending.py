# SPDX-License-Identifier: Apache-2.0
"""The back end ``cuda``: what is sent to the device and when it may be, failures, whole updates."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from device_on_cpu import cuda_on_cpu
from test_cuda_backend import (
    ADAMW,
    assert_same_state,
    give_gradients,
    parameters,
)
from torch import nn
from ways import plan_of

import pyupdate
from pyupdate.backends.cuda_memory import Memory

Sent = list[tuple[int, int]]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    """The range of bytes of every sending."""
    found: Sent = []
    send = Memory.send

    def noted(self: Memory, *given: Any) -> tuple[int, int]:
        found.append(given[2:4])
        return send(self, *given)

    monkeypatch.setattr(Memory, "send", noted)
    return found


@pytest.fixture
def stepping(cuda_module: Any) -> Iterator[None]:
    with cuda_on_cpu(cuda_module):
        yield


def stepped(**options: Any) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    """An optimizer that has made two steps on gradients that stay where they are."""
    params = parameters((torch.float32,))
    optimizer = ADAMW.ours(params, **options)
    give_gradients(params, 0)
    optimizer.step()
    optimizer.step()
    return params, optimizer


# ----- what is sent -------------------------------------------------------------------------------


def test_where_nothing_moved_nothing_is_sent(stepping, sent):
    _, optimizer = stepped(max_norm=0.5, ema_decay=0.9)
    assert len(sent) == 1
    for _ in range(3):
        optimizer.step()
    assert len(sent) == 1


def test_another_number_sends_the_numbers_alone(stepping, sent):
    _, optimizer = stepped()
    del sent[:]
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    ((begin, end),) = sent
    assert begin == 0
    assert end <= 64  # lr, two betas, eps and weight_decay are 40 bytes


def test_gradients_that_moved_send_addresses(stepping, sent):
    params, optimizer = stepped()
    whole = sent[0]
    del sent[:]
    kept = [param.grad for param in params]
    give_gradients(params, 1)
    optimizer.step()
    ((begin, end),) = sent
    assert end - begin < whole[1] - whole[0]
    assert len(kept) == len(params)


# ----- while a graph is captured ------------------------------------------------------------------


def refused(optimizer: torch.optim.Optimizer) -> str:
    before = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    after = [p for g in optimizer.param_groups for p in g["params"]]
    for a, b in zip(after, before, strict=True):
        assert_same_bits(a, b, "a parameter")
    return str(error.value)


def test_a_capture_takes_a_step_that_sends_nothing(stepping, monkeypatch):
    params, optimizer = stepped()
    _, expected = stepped()
    monkeypatch.setenv("PYUPDATE_TEST_CAPTURING", "1")
    optimizer.step()
    monkeypatch.delenv("PYUPDATE_TEST_CAPTURING")
    expected.step()
    assert_same_state(optimizer, expected)
    assert plan_of(optimizer).backends == ("cuda",)
    assert params


def test_a_capture_says_what_moved(stepping, monkeypatch):
    params, optimizer = stepped()
    monkeypatch.setenv("PYUPDATE_TEST_CAPTURING", "1")
    params[3].grad = params[3].grad.clone()
    assert "the memory of the gradient of 'group 0, parameter 3' is another one" in refused(
        optimizer
    )
    optimizer.param_groups[0]["lr"] = 0.5
    assert "a number of a group (lr, betas, weight_decay ...) is another one" in refused(optimizer)
    monkeypatch.delenv("PYUPDATE_TEST_CAPTURING")
    # What was refused is sent by the next step outside.
    expected_params, expected = stepped()
    expected_params[3].grad = expected_params[3].grad.clone()
    expected.param_groups[0]["lr"] = 0.5
    optimizer.step()
    expected.step()
    assert_same_state(optimizer, expected)


def test_a_capture_of_a_first_step_is_refused_before_state_is_made(stepping, monkeypatch):
    params = parameters((torch.float32,))
    optimizer = ADAMW.ours(params)
    give_gradients(params, 0)
    monkeypatch.setenv("PYUPDATE_TEST_CAPTURING", "1")
    assert "the state of 'group 0, parameter 0' is not made yet" in refused(optimizer)
    assert not optimizer.state
    monkeypatch.delenv("PYUPDATE_TEST_CAPTURING")
    optimizer.step()
    assert float(optimizer.state[params[1]]["step"]) == 1.0


# ----- failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [1, 209, 701, 720])
def test_a_launch_that_fails_names_its_kernel(code, recorded_module, monkeypatch):
    with cuda_on_cpu(recorded_module):
        _, optimizer = stepped()
        monkeypatch.setenv("PYUPDATE_TEST_NO_LAUNCH", str(code))
        said = refused(optimizer)
    assert said == (f"CUDA kernel 'reduce' could not be launched: CUDA's own words (error {code})")


# ECC, NVLink, an address, a timeout, an assertion, an alignment, "unspecified launch failure"
@pytest.mark.parametrize("code", [214, 220, 700, 702, 710, 716, 719])
def test_a_fault_of_earlier_work_is_not_blamed_on_the_kernel(code, recorded_module, monkeypatch):
    with cuda_on_cpu(recorded_module):
        _, optimizer = stepped()
        monkeypatch.setenv("PYUPDATE_TEST_NO_LAUNCH", str(code))
        said = refused(optimizer)
    assert said.startswith("CUDA kernel 'reduce' could not be launched: CUDA's own words ")
    assert f"(error {code}). The fault is of work that was launched before, by pyupdate or" in said
    assert "CUDA_LAUNCH_BLOCKING=1" in said


def test_what_is_refused_names_the_parameter(stepping):
    params, optimizer = stepped()
    optimizer.state[params[2]]["exp_avg"] = torch.zeros(5)
    with pytest.raises(ValueError, match="state 'exp_avg' of 'group 0, parameter 2' has shape"):
        optimizer.step()


def test_tied_memory_is_refused(stepping):
    whole = torch.ones(8)
    params = [nn.Parameter(whole[:5]), nn.Parameter(whole[3:])]
    optimizer = ADAMW.ours(params)
    for param in params:
        param.grad = torch.ones(5)
    with pytest.raises(ValueError, match="shares memory with"):
        optimizer.step()


def test_autograd_notices_what_was_written(stepping):
    params, optimizer = stepped(ema_decay=0.9)
    tensors = [params[1], *optimizer.state[params[1]].values()]
    before = [t._version for t in tensors]
    optimizer.step()
    assert all(t._version > b for t, b in zip(tensors, before, strict=True))


def test_a_plan_is_collected_with_its_model(stepping):
    params, optimizer = stepped()
    kept = weakref.ref(params[0])
    optimizer.cycle = optimizer  # type: ignore[attr-defined]
    del params, optimizer
    gc.collect()
    assert kept() is None


# ----- whole updates ------------------------------------------------------------------------------


def model(in_backward: bool = False, **options: Any) -> nn.Module:
    torch.manual_seed(3)
    made = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    more = {"in_backward": True} if in_backward else {}
    return pyupdate.build(made, "adamw", lr=0.01, **options, **more)


def losses() -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    while True:
        yield torch.randn(12, 8, generator=generator)


UPDATES: list[dict[str, Any]] = [
    {"max_norm": 0.1, "ema_decay": 0.9},
    {"accumulation_steps": 2, "max_norm": 0.1},
    {"accumulation_steps": 3},
    {"in_backward": True},
]


@pytest.mark.parametrize("options", UPDATES, ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("defer", [False, True], ids=["", "deferred"])
def test_update_model(options, scaled, defer, cuda_module, compiled):
    if options.get("in_backward") and (scaled or defer):
        return  # refused there

    def run() -> nn.Module:
        trained = model(**options)
        scaler = torch.amp.GradScaler("cpu", init_scale=3.0) if scaled else None
        deferred: dict[str, list[Any]] = {}
        for _, batch in zip(range(6), losses(), strict=False):
            loss = (trained(batch) ** 2).mean()
            more: dict[str, Any] = {"defer": True, "deferred": deferred} if defer else {}
            if options.get("in_backward"):
                more["retain_graph"] = False
            pyupdate.update_model(trained, loss, scaler=scaler, **more)
            for calls in deferred.values():
                for call in calls:
                    call()
            deferred.clear()
            if scaler is not None:
                scaler.update()
        return trained

    expected = run()
    with cuda_on_cpu(cuda_module):
        found = run()
        engine = found.current_optimizer.__dict__["_pyupdate_engine"]
        names = {name for made in engine.plans.values() for name in made.backends}
        assert names == {"cuda"}
    assert_same_state(found.current_optimizer, expected.current_optimizer)
