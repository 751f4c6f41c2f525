# SPDX-License-Identifier: Apache-2.0
"""Windows of ``accumulation_steps`` whose gradients or parameters somebody changes in between."""

from __future__ import annotations

import copy
import operator
import pickle
from typing import Any

import pytest
import torch
from test_accumulation import K, close, pair, torchs_window
from test_scaler import ADAMW, MOMENTUM, scaler_of
from torch import nn
from training import loss_of, network
from ways import snapshot, ways

import pyupdate
from pyupdate.pytorch.accumulation import POSITION


def drop(param: Any) -> None:
    param.grad = None


def replace(param: Any) -> None:
    param.grad = param.grad.clone()


CHANGES = {"dropped": (drop, "is gone"), "replaced": (replace, "is another tensor by now")}
changes = pytest.mark.parametrize("change", list(CHANGES))


def groups_of(optimizer: Any) -> Any:
    return [{**group, "params": [*group["params"]]} for group in optimizer.param_groups]


# ----- update_model -------------------------------------------------------------------------------


@ways
@changes
@pytest.mark.parametrize("counted", [1, 2])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaler"])
def test_update_model_refuses_a_window_that_lost_a_gradient(change, counted, scaled, way, backend):
    model, twin, other = pair(ADAMW, way)
    optimizer = model.current_optimizer
    scaler = scaler_of(growth_interval=1000) if scaled else None
    for turn in range(counted):
        pyupdate.update_model(model, loss_of(model, turn), scaler=scaler)
        if scaler is not None:
            scaler.update()
    breaks, how = CHANGES[change]
    breaks(model[2].bias)
    before, groups = snapshot(optimizer), groups_of(optimizer)
    scales = None if scaler is None else copy.deepcopy(scaler.state_dict())
    loss = loss_of(model, counted)
    for _ in range(2):  # a second attempt is refused as well
        match = f"{counted} of accumulation_steps={K} .* the gradient of '2.bias' {how}.*model.zero"
        with pytest.raises(RuntimeError, match=match):
            pyupdate.update_model(model, loss, scaler=scaler)
        assert snapshot(optimizer) == before
        assert groups_of(optimizer) == groups
        assert scaler is None or scaler.state_dict() == scales
    model.zero_grad()  # the mend
    for turn in range(2 * K):
        pyupdate.update_model(model, loss_of(model, turn), scaler=scaler)
        if scaler is not None:
            scaler.update()
    for start in (0, K):
        torchs_window(twin, other, range(start, start + K), None)
    for param, twins in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(param, twins, rtol=1e-6, atol=1e-9)


@changes
@pytest.mark.parametrize("counted", [1, K], ids=["open", "full"])
@pytest.mark.parametrize("by", ["update_model", "defer", "drain", "call"])
def test_a_deferred_window_that_lost_a_gradient_is_refused(change, counted, by, backend):
    model, twin, other = pair(MOMENTUM)
    waiting: dict[str, Any] = {}
    for turn in range(K):  # a window before it, of which nothing may be left
        pyupdate.update_model(model, loss_of(model, turn))
    torchs_window(twin, other, range(K), None)
    for turn in range(counted):
        pyupdate.update_model(model, loss_of(model, turn), defer=True, deferred=waiting)
    breaks, how = CHANGES[change]
    breaks(model[0].weight)
    optimizer = model.current_optimizer
    before, groups, entries = snapshot(optimizer), groups_of(optimizer), [*waiting["net"]]
    loss = loss_of(model, 1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"the gradient of '0.weight' {how}"):
            if by == "update_model":
                pyupdate.update_model(model, loss, deferred=waiting)
            elif by == "defer":
                pyupdate.update_model(model, loss, defer=True, deferred=waiting)
            elif by == "drain":
                pyupdate.drain(waiting)
            else:
                waiting["net"][0]()
        assert snapshot(optimizer) == before
        assert groups_of(optimizer) == groups
        assert waiting == {"net": entries}
    model.zero_grad()
    pyupdate.drain(waiting)
    for turn in range(K):
        pyupdate.update_model(model, loss_of(model, turn), defer=True, deferred=waiting)
    pyupdate.drain(waiting)
    torchs_window(twin, other, range(K), None)
    close(model, twin)


@changes
def test_a_lost_gradient_stops_its_own_model_alone(change, backend):
    models = [network(1), network(2)]
    twins = copy.deepcopy(models)
    groups = [{"params": list(model.parameters())} for model in models]
    shared: Any = pyupdate.optim.SGD(groups, lr=0.1, accumulation_steps=2)
    theirs = [torch.optim.SGD(twin.parameters(), lr=0.1) for twin in twins]
    for model in models:
        model.current_optimizer = shared
        pyupdate.update_model(model, loss_of(model, 0))
    breaks, how = CHANGES[change]
    breaks(models[0][0].bias)
    for turn in range(1, 4):  # it notes nothing of the other one, and is not stopped
        pyupdate.update_model(models[1], loss_of(models[1], turn))
    with pytest.raises(RuntimeError, match=f"the gradient of '0.bias' {how}"):
        pyupdate.update_model(models[0], loss_of(models[0], 1))
    models[0].zero_grad()
    for turn in range(2):
        pyupdate.update_model(models[0], loss_of(models[0], turn))
    torchs_window(twins[0], theirs[0], range(2), None)
    for start in (0, 2):
        torchs_window(twins[1], theirs[1], range(start, start + 2), None)
    close(models[0], twins[0])
    close(models[1], twins[1])


class Parts(nn.Module):
    """Three parameters, of which a loss may leave some out."""

    def __init__(self) -> None:
        super().__init__()
        self.always = nn.Parameter(torch.zeros(2))
        self.late = nn.Parameter(torch.zeros(2))
        self.never = nn.Parameter(torch.zeros(2))


def parts(**options: Any) -> Any:
    model: Any = Parts()
    return pyupdate.build(model, pyupdate.optim.SGD(model.parameters(), lr=1.0, **options))


@pytest.mark.parametrize("deferred", [False, True])
def test_what_is_legitimate_in_a_window_is_not_refused(deferred, backend):
    model = parts(accumulation_steps=4)
    waiting: dict[str, Any] = {}

    def update(loss: torch.Tensor) -> None:
        pyupdate.update_model(model, loss * 2.0, defer=deferred, deferred=waiting)

    for window in (1, 2, 3):
        update(model.always.sum())  # the others have no gradient yet
        update((model.always + model.late).sum())
        model.late.sum().backward()  # a user's own, in place
        model.late.requires_grad_(False)  # frozen, with its gradient
        update(model.always.sum())
        if window == 2:
            model.late.grad = None  # frozen and dropped: it is not stepped
            model.current_optimizer.zero_grad()  # which keeps them
        update(model.always.sum())
        pyupdate.drain(waiting)
        assert model.always.tolist() == [-2.0 * window] * 2
        assert model.always.grad is None
        model.late.requires_grad_()
        model.late.grad = None
    assert not model.late.any()
    assert not model.never.any()


def test_a_full_deferred_window_takes_more_micro_batches(backend):
    model = parts(accumulation_steps=2)
    waiting: dict[str, Any] = {}
    for turn in range(4):
        loss = (float(turn) * model.always).sum()
        pyupdate.update_model(model, loss, defer=True, deferred=waiting)
    pyupdate.drain(waiting)
    assert model.always.tolist() == [-(0.0 + 1.0 + 2.0 + 3.0) / 4] * 2


def test_a_failure_in_a_window_does_not_make_the_next_call_refuse(backend):
    model, twin, other = pair(ADAMW)
    for turn in range(2 * K):
        with pytest.raises(ValueError, match="does not require gradients"):
            pyupdate.update_model(model, torch.zeros(()))
        pyupdate.update_model(model, loss_of(model, turn))
    for start in (0, K):
        torchs_window(twin, other, range(start, start + K), None)
    close(model, twin)


# ----- a loop of one's own ------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 3])
def test_a_closure_that_drops_what_was_counted_is_refused(at, backend):
    model = parts(accumulation_steps=4)
    optimizer = model.current_optimizer
    dropping = False

    def evaluate() -> torch.Tensor:
        (model if dropping else optimizer).zero_grad()
        loss = model.always.sum()
        loss.backward()
        return loss

    for _ in range(at):
        optimizer.step(evaluate)
    dropping = True
    with pytest.raises(RuntimeError, match=f"{at} of accumulation_steps=4 .*'always'"):
        optimizer.step(evaluate)
    assert not model.always.any()
    assert optimizer.param_groups[0][POSITION] == 0  # given up, so zero_grad drops
    dropping = False
    for _ in range(4):
        optimizer.step(evaluate)
    assert model.always.tolist() == [-1.0, -1.0]


@pytest.mark.parametrize("by", ["update_model", "step"])
@pytest.mark.parametrize("how", ["replaced", "added"])
def test_a_parameter_that_is_put_into_a_group_in_an_open_window_is_refused(how, by, backend):
    model = parts(accumulation_steps=2)
    optimizer = model.current_optimizer
    group = optimizer.param_groups[0]
    taken = group["params"].pop(1)  # late

    def micro_batch() -> None:
        loss = (model.always + model.late).sum()
        if by == "update_model":
            pyupdate.update_model(model, loss)
        else:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    micro_batch()
    old = group["params"][-1]
    group["params"][-1:] = [taken] if how == "replaced" else [old, taken]
    before, params = snapshot(optimizer), [*group["params"]]
    match = "1 of accumulation_steps=2 micro-batches were counted when parameter 'late' was not in"
    with pytest.raises(ValueError, match=match):
        micro_batch()
    assert all(map(operator.is_, group["params"], params))
    if by == "update_model":
        assert snapshot(optimizer) == before
        model.zero_grad()
    for _ in range(2):
        micro_batch()
    assert model.always.tolist() == model.late.tolist() == [-1.0, -1.0]


@pytest.mark.parametrize("by", ["update_model", "step"])
def test_a_parameter_that_is_taken_out_of_a_group_leaves_the_window_to_the_others(by, backend):
    model = parts(accumulation_steps=2)
    optimizer = model.current_optimizer
    for turn in range(2):
        loss = (model.always + model.late).sum()
        if by == "update_model":
            pyupdate.update_model(model, loss)
        else:
            loss.backward()
            optimizer.step()
        if turn == 0:
            del optimizer.param_groups[0]["params"][1]
            model.late.grad = None
    assert (model.always.tolist(), model.late.tolist()) == ([-1.0, -1.0], [0.0, 0.0])


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("by", ["update_model", "step"])
def test_a_copy_in_an_open_window_begins_its_own(by, how, backend):
    # Torch copies and pickles parameters without their gradients.
    model, twin, other = pair(ADAMW)

    def micro_batch(of: Any, turn: int) -> None:
        if by == "update_model":
            pyupdate.update_model(of, loss_of(of, turn))
        else:
            of.current_optimizer.zero_grad()
            loss_of(of, turn).mean().backward()
            of.current_optimizer.step()

    micro_batch(model, 0)
    made = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    twins = copy.deepcopy(twin)
    others = ADAMW.truth(list(twins.parameters()))
    assert made.current_optimizer.param_groups[0][POSITION] == 0
    assert model.current_optimizer.param_groups[0][POSITION] == 1
    for turn in range(1, K):
        micro_batch(model, turn)
    for turn in range(K):
        micro_batch(made, turn)
    torchs_window(twin, other, range(K), None)
    torchs_window(twins, others, range(K), None)
    close(model, twin)
    close(made, twins)


@pytest.mark.parametrize("by", ["update_model", "defer", "step"])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_hook_that_raises_behind_a_step_does_not_have_it_made_twice(steps, by, backend):
    model = parts(accumulation_steps=steps)
    optimizer = model.current_optimizer
    waiting: dict[str, Any] = {}

    def micro_batch() -> None:
        loss = model.always.sum()
        if by == "update_model":
            pyupdate.update_model(model, loss)
        elif by == "defer":
            pyupdate.update_model(model, loss, defer=True, deferred=waiting)
            pyupdate.drain(waiting)
        else:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def fail(*_: object) -> None:
        message = "from a hook"
        raise ArithmeticError(message)

    handle = optimizer.register_step_post_hook(fail)
    for _ in range(steps - 1):
        micro_batch()
    with pytest.raises(ArithmeticError, match="from a hook"):
        micro_batch()
    assert model.always.tolist() == [-1.0, -1.0]
    handle.remove()
    for _ in range(steps):
        micro_batch()
    assert model.always.tolist() == [-2.0, -2.0]
    assert not optimizer.param_groups[0].get(POSITION)
