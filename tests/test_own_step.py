# SPDX-License-Identifier: Apache-2.0
"""A user's subclass of an optimizer of ours with a ``step`` of its own, which must be called.

The truth is the same subclass of torch's optimizer in torch's plain loop.
"""

from __future__ import annotations

import copy

import pytest
import torch
from bits import assert_same_bits
from torch import nn

import pyupdate

BOUND = 0.25


class Bounded:
    """Parameters stay within a bound: what the step of its own adds."""

    calls = 0

    def step(self, closure=None):
        self.calls += 1
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        param.clamp_(-BOUND, BOUND)
        return loss


class Ours(Bounded, pyupdate.optim.SGD):
    pass


class Theirs(Bounded, torch.optim.SGD):
    pass


class WithScaler(pyupdate.optim.SGD):
    """One that takes the scaler and hands it on."""

    calls = 0

    def step(self, closure=None, *, grad_scaler=None):
        self.calls += 1
        done = super().step(closure, grad_scaler=grad_scaler)
        with torch.no_grad():
            for param in self.param_groups[0]["params"]:
                if param.grad is not None:
                    param.clamp_(-BOUND, BOUND)
        return done


def _model():
    torch.manual_seed(0)
    return nn.Linear(6, 4)


def _loss(model, seed):
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(seed))
    return (4.0 * model(x) ** 2).mean()


def _plain(model, steps, batches=1):
    """What torch's loop makes of a model."""
    optimizer = Theirs(model.parameters(), lr=0.5, momentum=0.5)
    for step in range(steps):
        optimizer.zero_grad()
        for batch in range(batches):
            (_loss(model, step * batches + batch) / batches).backward()
        optimizer.step()
    assert any(bool((param.abs() == BOUND).any()) for param in model.parameters())
    return model


def _assert_same(model, truth):
    for param, other in zip(model.parameters(), truth.parameters(), strict=True):
        assert_same_bits(param, other.detach().numpy(), "parameter")


@pytest.mark.parametrize("kind", [Ours, WithScaler])
@pytest.mark.parametrize("scaled", [False, True])
def test_update_model_calls_it(kind, scaled, backend):
    model = _model()
    truth = _plain(copy.deepcopy(model), 4)
    optimizer = kind(model.parameters(), lr=0.5, momentum=0.5)
    pyupdate.build(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
    for step in range(4):
        pyupdate.update_model(model, _loss(model, step), scaler=scaler)
        if scaler is not None:
            scaler.update()
    assert optimizer.calls == 4
    _assert_same(model, truth)
    assert all(param.grad is None for param in model.parameters())


def test_a_step_that_is_skipped_writes_nothing(backend):
    model = _model()
    optimizer = WithScaler(model.parameters(), lr=1e-9)
    pyupdate.build(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with torch.no_grad():
        for param in model.parameters():
            param.clamp_(-BOUND, BOUND)
    before = copy.deepcopy(model)
    pyupdate.update_model(model, _loss(model, 0) * torch.inf, scaler=scaler)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert pyupdate.last_update(model).skipped
    _assert_same(model, before)


@pytest.mark.parametrize("kind", [Ours, WithScaler])
def test_a_window_is_counted_once(kind, backend):
    model = _model()
    truth = _plain(copy.deepcopy(model), 2, batches=2)
    optimizer = kind(model.parameters(), lr=0.5, momentum=0.5, accumulation_steps=2)
    pyupdate.build(model, optimizer)
    for batch in range(4):
        pyupdate.update_model(model, _loss(model, batch))
        assert optimizer.calls == (batch + 1) // 2
    _assert_same(model, truth)


@pytest.mark.parametrize("together", [False, True])
def test_what_was_deferred_calls_it(together, backend):
    models = [_model(), _model()] if together else [_model()]
    truth = _plain(_model(), 1)
    optimizers, deferred = [], {}
    for number, model in enumerate(models):
        optimizers.append(Ours(model.parameters(), lr=0.5, momentum=0.5))
        pyupdate.build(model, optimizers[-1], model_name=f"model {number}")
        pyupdate.update_model(model, _loss(model, 0), defer=True, deferred=deferred)
    pyupdate.drain(deferred)
    for model, optimizer in zip(models, optimizers, strict=True):
        assert optimizer.calls == 1
        _assert_same(model, truth)


def test_another_models_gradients_are_not_stepped(backend):
    first, second = _model(), _model()
    truth = _plain(copy.deepcopy(first), 1)
    untouched = copy.deepcopy(second)
    optimizer = Ours([*first.parameters(), *second.parameters()], lr=0.5, momentum=0.5)
    for model in (first, second):
        pyupdate.build(model, optimizer)
    for param in second.parameters():
        param.grad = torch.ones_like(param)
    pyupdate.update_model(first, _loss(first, 0))
    _assert_same(first, truth)
    _assert_same(second, untouched)
    assert all(bool((param.grad == 1.0).all()) for param in second.parameters())


def test_not_during_backward():
    model = _model()
    with pytest.raises(TypeError, match=r"which the step of Ours .* would not see"):
        pyupdate.build(model, Ours(model.parameters(), lr=0.5), in_backward=True)
