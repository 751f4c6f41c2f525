# SPDX-License-Identifier: Apache-2.0
"""``finish_window``: the step of a window that is not full, on the mean of what is in it.

The truth is torch's optimizer on the mean of as many losses.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_accumulation import K, cases, close, pair, torchs_window
from torch import nn
from training import loss_of
from ways import ways

import pyupdate
from pyupdate.pytorch.accumulation import POSITION


def grads_of(model: nn.Module) -> list[Any]:
    return [param.grad for param in model.parameters()]


@pytest.mark.each_value
@cases
@ways
@pytest.mark.parametrize("count", [1, 2])
def test_a_model_steps_on_the_mean_of_what_there_is(case, way, count, backend):
    model, twin, other = pair(case, way, max_norm=0.01)
    for turn in range(K + count):
        pyupdate.update_model(model, loss_of(model, turn))
    assert pyupdate.finish_window(model) is True
    torchs_window(twin, other, range(K), 0.01)
    torchs_window(twin, other, range(K, K + count), 0.01)
    close(model, twin)
    assert not any(grad is not None for grad in grads_of(model))
    for turn in range(K):  # and the next window is a whole one
        pyupdate.update_model(model, loss_of(model, turn))
    torchs_window(twin, other, range(K), 0.01)
    close(model, twin)


@pytest.mark.each_value
@cases
@ways
def test_a_loop_of_ones_own(case, way, backend):
    model, twin, other = pair(case, way)
    optimizer = model.current_optimizer
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for turn in range(K + 2):
        loss_of(model, turn).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert pyupdate.finish_window(optimizer) is True
    scheduler.step()
    torchs_window(twin, other, range(K), None)
    torchs_window(twin, other, range(K, K + 2), None)
    close(model, twin)
    assert grads_of(model) == [None] * 4


def test_where_no_window_is_open_nothing_is_done(backend):
    model: Any = pyupdate.build(nn.Linear(4, 2), "adamw", accumulation_steps=2)
    plain: Any = pyupdate.build(nn.Linear(4, 2), "adamw")
    for one in (model, plain):
        before = copy.deepcopy(one.state_dict())
        assert pyupdate.finish_window(one) is False
        assert pyupdate.finish_window(one.current_optimizer) is False
        assert all(map(torch.equal, one.state_dict().values(), before.values()))
    pyupdate.update_model(model, model(torch.ones(1, 4)))
    model.zero_grad()  # which withdraws the window
    assert pyupdate.finish_window(model) is False
    assert [g[POSITION] for g in model.current_optimizer.param_groups] == [0]


def scaled_window(of: str) -> tuple[Any, Any, Any]:
    """A model with 2 of 4 micro-batches, its twin on their mean, and the scaler."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    model: Any = pyupdate.build(nn.Linear(4, 2).double(), "sgd", lr=0.5, accumulation_steps=4)
    twin = nn.Linear(4, 2).double()
    twin.load_state_dict(model.state_dict())
    for value in (1.0, 2.0):
        x = torch.full((1, 4), value, dtype=torch.float64)
        if of == "model":
            pyupdate.update_model(model, model(x).sum(), scaler=scaler)
        else:
            scaler.scale(model(x).sum()).backward()
            scaler.step(model.current_optimizer)
        scaler.update()
        (twin(x).sum() / 2).backward()
    return model, twin, scaler


@pytest.mark.parametrize("of", ["model", "optimizer"])
def test_with_a_scaler(of, backend):
    model, twin, scaler = scaled_window(of)
    assert scaler.get_scale() == 4.0
    assert pyupdate.finish_window(model if of == "model" else model.current_optimizer, scaler)
    torch.optim.SGD(twin.parameters(), lr=0.5).step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))  # powers of two throughout
    scaler.update()
    assert scaler.get_scale() == 8.0  # it counts a good step


@pytest.mark.parametrize("of", ["model", "optimizer"])
def test_without_the_scaler_of_the_micro_batches_it_is_given_up(of, backend):
    model, _, _ = scaled_window(of)
    before = [param.detach().clone() for param in model.parameters()]
    given = model if of == "model" else model.current_optimizer
    with pytest.raises(ValueError, match="scale of the gradients changed"):
        pyupdate.finish_window(given)
    assert pyupdate.finish_window(given) is False
    assert all(map(torch.equal, model.parameters(), before))


def test_an_inf_in_a_micro_batch_skips_it(backend):
    model: Any = pyupdate.build(nn.Linear(4, 2), "adamw", accumulation_steps=4, skip_nonfinite=True)
    before = [param.detach().clone() for param in model.parameters()]
    pyupdate.update_model(model, model(torch.ones(1, 4)))
    pyupdate.update_model(model, model(torch.full((1, 4), torch.inf)))
    assert pyupdate.finish_window(model)
    assert pyupdate.last_update(model).skipped
    assert all(map(torch.equal, model.parameters(), before))
    assert grads_of(model) == [None, None]


def test_what_was_deferred_into_the_window_is_in_it(backend):
    deferred: dict[str, Any] = {}
    models = [nn.Linear(4, 2).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, steps in zip(models, (4, 2), strict=True):
        pyupdate.build(model, "adamw", accumulation_steps=steps)
        for value in (1.0, 3.0):
            loss = model(torch.full((1, 4), value, dtype=torch.float64))
            pyupdate.update_model(model, loss, defer=value == 3.0, deferred=deferred)
    assert pyupdate.finish_window(models[0])
    pyupdate.drain(deferred)  # of the first there is nothing left to do
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def test_a_gradient_that_is_gone_is_refused(backend):
    model: Any = pyupdate.build(nn.Linear(4, 2), "adamw", accumulation_steps=4)
    for _ in range(2):
        pyupdate.update_model(model, model(torch.ones(1, 4)))
    model.bias.grad = None
    with pytest.raises(RuntimeError, match=r"the gradient of 'bias' is gone"):
        pyupdate.finish_window(model)
    with pytest.raises(RuntimeError, match=r"the gradient of 'bias' is gone"):
        pyupdate.finish_window(model.current_optimizer)


def test_a_norm_that_is_refused_says_what_becomes_of_the_window(backend):
    model: Any = pyupdate.build(
        nn.Linear(4, 2), "adamw", accumulation_steps=4, max_norm=1.0, error_if_nonfinite=True
    )
    pyupdate.update_model(model, model(torch.full((1, 4), torch.inf)))
    for _ in range(2):  # as often as it is asked
        with pytest.raises(RuntimeError, match="non-finite") as refused:
            pyupdate.finish_window(model)
        assert any("model.zero_grad() drops them" in note for note in refused.value.__notes__)
    model.zero_grad()
    assert not pyupdate.finish_window(model)


def test_a_subclass_with_a_step_of_its_own(backend):
    class Noted(pyupdate.optim.AdamW):
        steps = 0

        def step(self, closure=None, **given):
            Noted.steps += 1
            return super().step(closure, **given)

    model: Any = nn.Linear(4, 2)
    model.current_optimizer = Noted(model.parameters(), accumulation_steps=4)
    before = model.weight.detach().clone()
    model(torch.ones(1, 4)).sum().backward()
    model.current_optimizer.step()
    assert torch.equal(model.weight, before)
    assert pyupdate.finish_window(model.current_optimizer)
    assert Noted.steps == 2
    assert not torch.equal(model.weight, before)
    assert grads_of(model) == [None, None]


def test_windows_of_several_models_are_finished_by_their_models(backend):
    models = [nn.Linear(4, 2).double() for _ in range(2)]
    groups = [{"params": [*model.parameters()]} for model in models]
    optimizer: Any = pyupdate.optim.SGD(groups, lr=1.0, accumulation_steps=4)
    before = [model.bias.detach().clone() for model in models]
    for model, count in zip(models, (3, 1), strict=True):
        model.current_optimizer = optimizer  # type: ignore[assignment]
        for _ in range(count):
            pyupdate.update_model(model, model(torch.ones(1, 4, dtype=torch.float64)))
    with pytest.raises(ValueError, match=r"windows of \[1, 3\] micro-batches"):
        pyupdate.finish_window(optimizer)
    for model, bias in zip(models, before, strict=True):
        assert pyupdate.finish_window(model)
        assert torch.equal(model.bias, bias - 0.5)  # of a mean over two outputs


def test_what_was_frozen_since_is_not_in_a_later_window(backend):
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).double()
    pyupdate.build(model, "sgd", lr=1.0, accumulation_steps=2)
    first = model[0]
    x = torch.ones(1, 2, dtype=torch.float64)
    pyupdate.update_model(model, first(x))
    first.requires_grad_(False)
    assert pyupdate.finish_window(model) is False
    assert first.bias.grad is None
    model.requires_grad_(False)
    assert pyupdate.finish_window(model) is False
    model.requires_grad_(True)
    bias = first.bias.detach().clone()
    for _ in range(2):
        pyupdate.update_model(model, first(x))
    assert torch.equal(first.bias, bias - 0.5)


def test_update_model_begins_a_window_without_what_was_frozen_since(backend):
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).double()
    pyupdate.build(model, "sgd", lr=1.0, accumulation_steps=2)
    x = torch.ones(1, 2, dtype=torch.float64)
    pyupdate.update_model(model, model[0](x))
    model[0].requires_grad_(False)
    pyupdate.update_model(model, model[1](x))  # the first of another window
    model[0].requires_grad_(True)
    bias = model[0].bias.detach().clone()
    pyupdate.update_model(model, model[0](x) + model[1](x))
    assert torch.equal(model[0].bias, bias - 0.25)  # once, in a mean of two


def test_a_window_whose_model_was_frozen_as_a_whole_is_closed(backend):
    model: Any = pyupdate.build(nn.Linear(2, 2), "sgd", lr=1.0, accumulation_steps=2)
    pyupdate.update_model(model, model(torch.ones(1, 2)))
    model.requires_grad_(False)
    assert pyupdate.finish_window(model) is False
    assert [group[POSITION] for group in model.current_optimizer.param_groups] == [0]
    assert grads_of(model) == [None, None]


class Wrapper:
    """What looks like an optimizer and is none."""

    def __init__(self, optimizer: Any) -> None:
        self.param_groups, self.step = optimizer.param_groups, optimizer.step


@pytest.mark.parametrize(
    "value", [None, 3, nn.Linear, {}, Wrapper(pyupdate.optim.SGD([nn.Parameter(torch.ones(1))]))]
)
def test_what_is_neither_model_nor_optimizer_is_refused(value):
    with pytest.raises(ValueError, match="finish_window takes a torch model"):
        pyupdate.finish_window(value)


def test_a_model_without_an_optimizer_is_refused():
    with pytest.raises(ValueError, match="no optimizer attached"):
        pyupdate.finish_window(nn.Linear(1, 1))
