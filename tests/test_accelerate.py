# SPDX-License-Identifier: Apache-2.0
"""`pyupdate.accelerate`: an optimizer object of torch's steps through the plan, itself still."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from cases import FULL, Case
from test_optim import ADAMW, MOMENTUM, assert_alike, params_of, params_values, set_grads, train
from torch import nn
from torch.optim import lr_scheduler
from ways import WAYS, optimizer_of, plan_of, ways

import pyupdate
from pyupdate.pytorch.engines import has_rule, last_step

pytestmark = pytest.mark.usefixtures("wide_scalars")
cases = pytest.mark.parametrize("case", FULL, ids=str)


def stock(case: Case, params: Any = None, **more: Any) -> torch.optim.Optimizer:
    made: Any = case.torch_class
    return made(params_of() if params is None else params, **{**case.options, **more})


# ----- the object ---------------------------------------------------------------------------------


@cases
def test_the_object_its_state_and_its_groups_stay(case: Case, backend):
    optimizer, truth = stock(case, foreach=False), case.truth(params_of())
    for each in (optimizer, truth):
        train(each, range(3))
    state, groups, defaults = optimizer.state, optimizer.param_groups, optimizer.defaults
    inner = {id(v): key for each in state.values() for key, v in each.items()}
    assert pyupdate.accelerate(optimizer) is optimizer
    assert isinstance(optimizer, case.torch_class)
    assert isinstance(optimizer, getattr(pyupdate.optim, case.torch_class.__name__))
    assert optimizer.state is state and optimizer.param_groups is groups
    assert optimizer.defaults is defaults
    train(optimizer, range(3, 6))
    train(truth, range(3, 6))
    assert plan_of(optimizer).backends == (backend,)
    assert {id(v): key for each in state.values() for key, v in each.items()} == inner
    assert_alike(optimizer, truth)


@ways
def test_again_and_with_other_options(way, backend):
    optimizer = optimizer_of(way, ADAMW, params_of(), max_norm=1.0)
    train(optimizer, range(1))
    assert last_step(optimizer).norm is not None
    assert pyupdate.accelerate(optimizer) is optimizer
    train(optimizer, range(1))
    assert last_step(optimizer).norm is None
    pyupdate.accelerate(optimizer, max_norm=2.0)
    train(optimizer, range(1))
    assert last_step(optimizer).norm is not None
    assert type(optimizer) is pyupdate.optim.AdamW


class Users(torch.optim.AdamW):
    """A subclass of somebody's, which may step as it likes."""


def patched() -> torch.optim.Optimizer:
    optimizer = stock(ADAMW)
    optimizer.step = lambda closure=None: None
    return optimizer


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.optim.SparseAdam(params_of()), "SparseAdam;"),
        (lambda: torch.optim.LBFGS(params_of()), "torch.optim.lbfgs.LBFGS;"),
        (lambda: Users(params_of()), "Users;"),
        (patched, "torch.optim.adamw.AdamW whose step was replaced;"),
        (lambda: stock(ADAMW, differentiable=True), "AdamW with differentiable=True;"),
        (lambda: "adamw", "builtins.str;"),
        (lambda: torch.optim.AdamW, "builtins.type;"),
        (lambda: None, "NoneType;"),
    ],
    ids=["sparse", "lbfgs", "subclass", "patched", "differentiable", "name", "class", "none"],
)
def test_what_cannot_be_accelerated_is_refused_and_left_alone(make, words):
    optimizer = make()
    before = type(optimizer), dict(getattr(optimizer, "__dict__", {}))
    with pytest.raises(TypeError, match="cannot accelerate") as refused:
        pyupdate.accelerate(optimizer)
    assert words in str(refused.value)
    accepted = str(refused.value).partition("accepted are ")[2].removesuffix(" as torch made them")
    assert {"torch.optim.SGD", "torch.optim.Adam", "torch.optim.AdamW"} < set(accepted.split(", "))
    assert (type(optimizer), dict(getattr(optimizer, "__dict__", {}))) == before


def test_hooks_stay(backend):
    optimizer = stock(ADAMW)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    pyupdate.accelerate(optimizer)
    train(optimizer, range(2))
    assert seen == ["pre", "post"] * 2


# ----- update_model accelerates without asking ----------------------------------------------------


def line(optimizer_of_params: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    model.current_optimizer = optimizer_of_params(model.parameters())
    return model


def update(model: nn.Module, turns: int) -> None:
    for turn in range(turns):
        x = torch.linspace(-1, turn + 1.0, 6, dtype=torch.float64).reshape(2, 3)
        pyupdate.update_model(model, model(x).square())


def test_a_stock_optimizer_steps_through_the_plan_and_stays_stock(backend):
    model = line(lambda p: stock(ADAMW, p))
    truth = line(lambda p: Users(p, **ADAMW.options))  # stepped as it is
    for each in (model, truth):
        update(each, 4)
    assert type(model.current_optimizer) is torch.optim.AdamW
    assert plan_of(model.current_optimizer).backends == (backend,)
    assert_alike(model.current_optimizer, truth.current_optimizer)
    # Its own step goes on from there: nothing of it was replaced.
    assert "step" not in model.current_optimizer.__dict__
    for each in (model, truth):
        train(each.current_optimizer, range(2))
    assert_alike(model.current_optimizer, truth.current_optimizer)


def test_a_step_that_somebody_replaced_is_left_alone(backend):
    model = line(lambda p: stock(ADAMW, p))
    optimizer, calls = model.current_optimizer, []
    own = optimizer.step
    optimizer.step = lambda *args, **kwargs: (calls.append(args), own(*args, **kwargs))[1]
    assert not has_rule(optimizer)
    update(model, 3)
    assert len(calls) == 3
    assert pyupdate.last_update(model).norm is None
    truth = line(lambda p: Users(p, **ADAMW.options))
    update(truth, 3)
    assert_alike(optimizer, truth.current_optimizer)


class Halves(torch.optim.SGD):
    """A subclass whose step is its own."""

    @torch.no_grad()
    def step(self, closure=None):
        for param in self.param_groups[0]["params"]:
            param.mul_(0.5)


def test_a_subclass_is_stepped_as_it_is(backend):
    model = line(lambda p: Halves(p, lr=0.1))
    before = [param.detach().clone() for param in model.parameters()]
    assert not has_rule(model.current_optimizer)
    update(model, 1)
    for param, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(param, value / 2)


@pytest.mark.parametrize("way", [*WAYS, "stock"])
def test_a_class_that_is_changed_at_run_time(way, backend):
    # As Lightning does: optimizer.__class__ = type("Lightning" + cls.__name__, (cls,), {...}).
    def make(params: Any) -> torch.optim.Optimizer:
        made = stock(ADAMW, params) if way == "stock" else optimizer_of(way, ADAMW, params)
        made.__class__ = type("LightningAdamW", (type(made),), {})
        return made

    optimizer, truth = make(params_of()), ADAMW.truth(params_of())
    for each in (optimizer, truth):
        train(each, range(4))
    assert_alike(optimizer, truth)
    assert has_rule(optimizer) == (way != "stock")
    model, twin = line(make), line(lambda p: Users(p, **ADAMW.options))
    for each in (model, twin):
        update(each, 3)
    assert_alike(model.current_optimizer, twin.current_optimizer)
    if way != "stock":
        assert plan_of(optimizer).backends == (backend,)
        made = copy.deepcopy(optimizer)
        train(made, range(4, 5))
        train(truth, range(4, 5))
        assert_alike(made, truth)


# ----- learning-rate schedulers -------------------------------------------------------------------

SCHEDULERS: dict[str, Any] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.3),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1.0 / (1.0 + epoch)),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=12),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, 2, cycle_momentum=False),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.8)], [3]
    ),
}


def scheduled(
    optimizer: torch.optim.Optimizer, scheduler: Any, turns: range
) -> torch.optim.Optimizer:
    for turn in turns:
        train(optimizer, range(turn, turn + 1))
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(float(turn))
        else:
            scheduler.step()
    return optimizer


@pytest.mark.all_pairs
@pytest.mark.parametrize("name", list(SCHEDULERS))
@pytest.mark.parametrize("case", [ADAMW, MOMENTUM], ids=str)
@pytest.mark.parametrize("when", ["before", "after", "in mid-training", "ours"])
def test_schedulers(name, case: Case, when, backend):
    make = SCHEDULERS[name]
    truth = case.truth(params_of())
    expected = scheduled(truth, make(truth), range(8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()", and others
        optimizer = case.ours(params_of()) if when == "ours" else stock(case)
        if when == "after":
            pyupdate.accelerate(optimizer)
        scheduler = make(optimizer)
        if when == "before":
            pyupdate.accelerate(optimizer)
        if when == "in mid-training":
            scheduled(optimizer, scheduler, range(4))
            pyupdate.accelerate(optimizer)
        scheduled(optimizer, scheduler, range(4 if when == "in mid-training" else 0, 8))
    assert optimizer.param_groups[0]["lr"] == expected.param_groups[0]["lr"]
    assert_alike(optimizer, expected)
    assert isinstance(optimizer, pyupdate.optim.Planned)
    assert plan_of(optimizer).backends == (backend,)


def test_a_scheduler_still_notices_a_missing_step(backend):
    for accelerate_first in (False, True):
        optimizer = stock(ADAMW)
        if accelerate_first:
            pyupdate.accelerate(optimizer)
        scheduler = lr_scheduler.StepLR(optimizer, 1)
        pyupdate.accelerate(optimizer)
        with pytest.warns(UserWarning, match="before `optimizer.step"):
            scheduler.step()


def test_a_scheduler_sees_the_steps_of_update_model(backend):
    model = line(lambda p: stock(ADAMW, p))
    scheduler = lr_scheduler.StepLR(model.current_optimizer, 1, gamma=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            update(model, 1)
            scheduler.step()
    assert plan_of(model.current_optimizer).backends == (backend,)
    assert model.current_optimizer.param_groups[0]["lr"] == ADAMW.options["lr"] / 8


def test_a_scheduler_attached_before_keeps_scalers_working(backend):
    optimizer = stock(ADAMW)
    lr_scheduler.StepLR(optimizer, 1)
    pyupdate.accelerate(optimizer)
    assert "grad_scaler" in inspect.signature(optimizer.step).parameters
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    truth = ADAMW.truth(params_of())
    set_grads(truth.param_groups[0]["params"], 0)
    truth.step()
    set_grads(optimizer.param_groups[0]["params"], 0)
    for param in optimizer.param_groups[0]["params"]:
        param.grad *= 4.0
    scaler.step(optimizer)
    assert last_step(optimizer).multiplier == 0.25
    assert_alike(optimizer, truth)


def test_copies_of_a_scheduled_one_go_on(backend):
    optimizer = stock(ADAMW)
    lr_scheduler.StepLR(optimizer, 1)
    pyupdate.accelerate(optimizer)
    train(optimizer, range(2))
    made = copy.deepcopy(optimizer)
    train(made, range(2, 4))
    train(optimizer, range(2, 4))
    for a, b in zip(params_values(optimizer), params_values(made), strict=True):
        assert_same_bits(a, b, "copy")
