# SPDX-License-Identifier: Apache-2.0
"""The drop-in classes behave as torch's in all but speed: arguments, state, hooks, copies."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from bits import array_of, assert_same_bits, oracle_steps, random_values
from cases import CASES, DTYPES, FULL, Case, name_of
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from ways import optimizer_of, ways

import pyupdate

pytestmark = pytest.mark.usefixtures("wide_scalars")
cases = pytest.mark.parametrize("case", FULL, ids=str)
ADAMW = next(case for case in FULL if case.name == "adamw")
MOMENTUM = next(case for case in FULL if case.name == "sgd_momentum")
SIZES = (1, 70, 3000)


def params_of(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[nn.Parameter]:
    rng = np.random.default_rng(seed)
    return [nn.Parameter(random_values(rng, n, dtype)) for n in SIZES]


def set_grads(params: Sequence[torch.Tensor], seed: int) -> None:
    rng = np.random.default_rng(1000 + seed)
    for param in params:
        values = random_values(rng, param.numel(), torch.float64)
        param.grad = values.to(param.dtype).reshape(param.shape)


def train(optimizer: torch.optim.Optimizer, turns: range) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for turn in turns:
        set_grads(params, turn)
        optimizer.step()


def assert_alike(optimizer: torch.optim.Optimizer, truth: torch.optim.Optimizer) -> None:
    """Parameters and state of two optimizers agree to the last digits of fp64."""
    close = {"rtol": 1e-11, "atol": 1e-13}
    for group, other in zip(optimizer.param_groups, truth.param_groups, strict=True):
        for param, expected in zip(group["params"], other["params"], strict=True):
            torch.testing.assert_close(param, expected, **close)
            state = optimizer.state.get(param, {})
            assert list(state) == list(truth.state.get(expected, {}))
            for key, value in state.items():
                torch.testing.assert_close(value, truth.state[expected][key], **close)


def params_values(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [param.detach() for param in optimizer.param_groups[0]["params"]]


STOCK = [name for name in pyupdate.optim.CLASSES if hasattr(torch.optim, name)]

# ----- construction -------------------------------------------------------------------------------

PAIRS = [
    pytest.param(getattr(pyupdate.optim, name), getattr(torch.optim, name), id=name)
    for name in STOCK
]
pairs = pytest.mark.parametrize(("ours", "theirs"), PAIRS)

WRONG: list[dict[str, Any]] = [
    {"lr": -1.0},
    {"lr": torch.tensor([1.0, 2.0])},
    {"betas": (1.0, 0.9)},
    {"betas": (0.9, -0.1)},
    {"eps": -1e-8},
    {"weight_decay": -0.1},
    {"momentum": -0.5},
    {"nesterov": True, "momentum": 0.0},
    {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
    {"foreach": True, "fused": True},
    {"fused": True, "differentiable": True},
    {"alpha": -0.5},
    {"rho": 1.5},
    {"lr_decay": -0.5},
    {"initial_accumulator_value": -1.0},
    {"etas": (1.5, 2.0)},
    {"lr": torch.tensor(0.1), "foreach": True, "capturable": False},
    {"no_such_option": 1},
]


def outcome(make: Callable[[], Any]) -> Any:
    try:
        made = make()
    except Exception as error:
        return type(error), str(error)
    return made.defaults


@pairs
@pytest.mark.parametrize("options", WRONG, ids=lambda o: "-".join(o))
def test_wrong_arguments_are_refused_in_torchs_words(ours, theirs, options):
    found = outcome(lambda: ours([nn.Parameter(torch.ones(2))], **options))
    expected = outcome(lambda: theirs([nn.Parameter(torch.ones(2))], **options))
    assert found == expected


def test_the_wrong_arguments_are_wrong():
    for options in WRONG:
        made = [outcome(lambda c=p.values[1], o=options: c([torch.ones(2)], **o)) for p in PAIRS]
        assert any(isinstance(each, tuple) for each in made), options


@pairs
@pytest.mark.parametrize("params", [[], [1.0], torch.ones(2), [torch.ones(2) * 2.0], {}], ids=repr)
def test_wrong_parameters_are_refused_in_torchs_words(ours, theirs, params):
    assert outcome(lambda: ours(params)) == outcome(lambda: theirs(params))


@pairs
def test_arguments_by_position_and_defaults(ours, theirs):
    param = nn.Parameter(torch.ones(2, 2))  # a matrix, for Muon
    third: dict[str, Any] = {"SGD": 0.9, "RMSprop": 0.9, "Adagrad": 0.5, "Adadelta": 0.8}
    third |= {"Rprop": (0.4, 1.5), "Muon": 0.5, "Adafactor": -0.5}
    for args in ((), (0.1,), (0.1, third.get(theirs.__name__, (0.8, 0.9)))):
        assert ours([param], *args).defaults == theirs([param], *args).defaults
    named = [("weight", param)]
    assert ours(named).param_groups == theirs(named).param_groups


@pairs
def test_repr_is_torchs(ours, theirs):
    param = nn.Parameter(torch.ones(2, 2))
    groups = [{"params": [param]}, {"params": [nn.Parameter(torch.ones(1, 1))], "lr": 0.5}]
    assert repr(ours(groups, lr=0.1)) == repr(theirs(groups, lr=0.1))


def takes(case: Case, name: str) -> bool:
    """Whether torch's class has such an argument."""
    return name in inspect.signature(case.torch_class).parameters


@pytest.mark.parametrize(
    ("case", "flag"),
    [(case, flag) for case in FULL for flag in ("foreach", "fused") if takes(case, flag)],
    ids=str,
)
def test_flags_make_no_difference(case: Case, flag, backend):
    flags = {flag: True}
    plain, flagged = case.ours(params_of()), case.ours(params_of(), **flags)
    for optimizer in (plain, flagged):
        train(optimizer, range(3))
    for a, b in zip(
        plain.param_groups[0]["params"], flagged.param_groups[0]["params"], strict=True
    ):
        assert_same_bits(a, b, repr(flags))


# ----- steps --------------------------------------------------------------------------------------


@pytest.mark.all_pairs
@pytest.mark.parametrize("case", CASES, ids=str)
@ways
def test_the_state_is_torchs(case: Case, way, backend):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        optimizer = optimizer_of(way, case, params_of(dtype))
        truth = case.truth(params_of(dtype))
        for each in (optimizer, truth):
            train(each, range(2))
        ours, theirs = optimizer.state_dict(), truth.state_dict()
        assert ours["state"].keys() == theirs["state"].keys()
        for index, state in theirs["state"].items():
            found = {k: (v.dtype, v.shape, v.device) for k, v in ours["state"][index].items()}
            expected = {k: (v.dtype, v.shape, v.device) for k, v in state.items()}
            assert list(found.items()) == list(expected.items())
        for group, other in zip(ours["param_groups"], theirs["param_groups"], strict=True):
            assert {**group, "foreach": False} == other


def test_step_counters_follow_the_default_dtype(backend):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        optimizer, truth = ADAMW.ours(params_of()), ADAMW.truth(params_of())
        for each in (optimizer, truth):
            train(each, range(2))
            assert next(iter(each.state.values()))["step"].dtype is torch.float64
        assert_alike(optimizer, truth)
    finally:
        torch.set_default_dtype(before)
    train(optimizer, range(2, 4))
    train(truth, range(2, 4))
    assert_alike(optimizer, truth)


@pytest.mark.all_pairs
@cases
@ways
def test_groups_of_different_numbers_and_a_late_one(case: Case, way, backend):
    numbers: dict[str, Any] = {
        "lr": 0.02,
        "weight_decay": 0.3,
        "maximize": True,
        "betas": (0.7, 0.8),
        "eps": 1e-3,
        "amsgrad": True,
        "momentum": 0.4,
        "dampening": 0.0,
        "nesterov": True,
        "etas": (0.25, 2.0),
        "decoupled_weight_decay": True,
        "centered": True,
        "alpha": 0.75,
        "rho": 0.75,
        "lr_decay": 0.5,
    }
    others = {name: value for name, value in numbers.items() if takes(case, name)}

    def trained(make: Callable[[Any], torch.optim.Optimizer]) -> torch.optim.Optimizer:
        params = params_of() + params_of(seed=1)
        groups = [{"params": params[:2]}, {"params": params[2:4], **others}, {"params": []}]
        optimizer = make(groups)
        train(optimizer, range(3))
        optimizer.add_param_group({"params": params[4:], "lr": 0.001})
        train(optimizer, range(3, 6))
        optimizer.param_groups[1]["lr"] = 0.0
        optimizer.param_groups[0]["weight_decay"] = 0.0
        train(optimizer, range(6, 8))
        return optimizer

    ours = trained(lambda g: optimizer_of(way, case, g))
    try:
        truth = trained(case.truth)
    except KeyError:
        if not isinstance(ours, torch.optim.Adagrad):
            raise
        pytest.skip("torch 2.10's Adagrad makes no state for a group that is added, and fails")
    assert_alike(ours, truth)


@pytest.mark.all_pairs
@cases
@ways
def test_late_gradients_have_their_own_step(case: Case, way, backend):
    def trained(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        params = optimizer.param_groups[0]["params"]
        for turn in range(7):
            set_grads(params, turn)
            if turn < 3:
                params[0].grad = None
            if turn in (2, 4):
                params[1].grad = None
            optimizer.step()
            made = case.state_from_the_start or (turn >= 3 and bool(case.rule.state))
            assert (params[0] in optimizer.state) == made
        return optimizer

    optimizer = trained(optimizer_of(way, case, params_of()))
    assert_alike(optimizer, trained(case.truth(params_of())))
    if case.step_is_counted:
        steps = [float(optimizer.state[p]["step"]) for p in optimizer.param_groups[0]["params"]]
        assert steps == [4.0, 5.0, 7.0]


@ways
def test_no_gradient_makes_no_state(way, backend):
    params = params_of()
    optimizer = optimizer_of(way, ADAMW, params)
    optimizer.step()
    assert not optimizer.state
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    assert list(optimizer.state) == [params[1]]


@pytest.mark.all_pairs
@cases
@ways
def test_dtypes_mixed_in_one_model(case: Case, way, backend):
    rng = np.random.default_rng(4)
    values = [[random_values(rng, 500, dtype) for dtype in DTYPES * 2] for _ in range(4)]
    params = [nn.Parameter(value.clone()) for value in values[0]]
    optimizer = optimizer_of(way, case, params)
    for grads in values[1:]:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
    for i, param in enumerate(params):
        grads = [array_of(grads[i]) for grads in values[1:]]
        truth, state = oracle_steps(case, array_of(values[0][i]), grads)
        assert_same_bits(param, truth, name_of(param.dtype))
        for key, value in state.items():
            assert_same_bits(optimizer.state[param][key], value, f"{param.dtype} {key}")


@pytest.mark.parametrize(
    ("case", "numbers"),
    [
        (case, numbers)
        for case in FULL
        for numbers in ("lr", "betas")
        # Torch's Rprop makes its step sizes of lr.item(), so a tensor is read once.
        if takes(case, numbers) and case.name != "rprop"
    ],
    ids=str,
)
@ways
def test_tensors_as_numbers(case: Case, way, numbers, backend):
    more: dict[str, Any] = {"lr": torch.tensor(0.01, dtype=torch.float64)}
    if numbers != "lr":
        more["betas"] = tuple(torch.tensor(b, dtype=torch.float64) for b in (0.8, 0.95))
    optimizer = optimizer_of(way, case, params_of(), **copy.deepcopy(more), foreach=False)
    made: Any = case.torch_class
    truth = made(params_of(), **{**case.options, **more}, foreach=False)
    for turn in range(4):
        for each in (optimizer, truth):
            train(each, range(turn, turn + 1))
            each.param_groups[0]["lr"].mul_(0.5)
    assert_alike(optimizer, truth)


# ----- closures and hooks -------------------------------------------------------------------------


@ways
def test_a_closure_is_called_once_with_gradients_enabled(way, backend):
    param = nn.Parameter(torch.ones(3))
    optimizer = optimizer_of(way, MOMENTUM, [param])
    calls = []

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (param * param).sum()
        loss.backward()
        calls.append(loss)
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) is calls[0]
        assert not torch.is_grad_enabled()
    assert len(calls) == 1 and float(param.detach()[0]) < 1.0
    assert optimizer.step() is None

    def breaks() -> float:
        raise ArithmeticError

    before = param.detach().clone()
    with pytest.raises(ArithmeticError):
        optimizer.step(breaks)
    assert torch.equal(param, before)
    optimizer.step()  # it is not locked


@ways
def test_hooks_run_once_each_in_torchs_order(way, backend):
    def events(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> list[str]:
        seen: list[str] = []
        start = float(param.detach())

        def note(name: str) -> Callable[..., None]:
            def hook(stepped, args, kwargs):
                assert stepped is optimizer
                moved = float(param.detach()) != start
                seen.append(f"{name}, {'after' if moved else 'before'}, {args[1:]}, {kwargs}")

            return hook

        handles = [
            optimizer.register_step_pre_hook(note("first pre")),
            optimizer.register_step_pre_hook(note("second pre")),
            optimizer.register_step_post_hook(note("post")),
            register_optimizer_step_pre_hook(note("global pre")),
            register_optimizer_step_post_hook(note("global post")),
        ]
        try:
            optimizer.step()
        finally:
            for handle in handles:
                handle.remove()
        seen.append("removed")
        optimizer.step(closure=lambda: seen.append("closure"))
        return seen

    found = []
    for make in (lambda p: optimizer_of(way, ADAMW, p), ADAMW.truth):
        param = nn.Parameter(torch.ones(()))
        param.grad = torch.ones(())
        found.append(events(make([param]), param))
    assert found[0] == found[1]
    assert len(found[0]) == 7


@ways
def test_a_pre_hook_may_change_the_arguments(way, backend):
    param = nn.Parameter(torch.ones(()))
    param.grad = torch.ones(())
    optimizer = optimizer_of(way, ADAMW, [param])
    optimizer.register_step_pre_hook(lambda stepped, args, kwargs: ((stepped, lambda: 7.0), {}))
    assert optimizer.step() == 7.0


# ----- odd corners --------------------------------------------------------------------------------


def _is_differentiable(name: str) -> bool:
    """Whether torch's class has such a step; Muon's has not."""
    return "differentiable" in inspect.signature(getattr(torch.optim, name)).parameters


@pytest.mark.parametrize("name", [name for name in STOCK if _is_differentiable(name)])
def test_differentiable_steps_are_torchs_and_differentiable(name, backend):
    gradients = []
    for module in (pyupdate.optim, torch.optim):
        leaf = torch.ones(3, dtype=torch.float64, requires_grad=True)
        param = leaf.clone()
        optimizer = getattr(module, name)([param], lr=0.1, differentiable=True)
        param.grad = (leaf * torch.arange(1.0, 4.0, dtype=torch.float64)).clone()
        optimizer.step()
        (gradient,) = torch.autograd.grad(param.square().sum(), leaf)
        gradients.append(gradient)
    assert torch.equal(*gradients)
    assert gradients[0].abs().sum() > 0.0
