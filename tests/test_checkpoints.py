# SPDX-License-Identifier: Apache-2.0
"""In mid-training: copies, pickles, checkpoints to torch and back, flags that are switched."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from bits import assert_same_bits
from cases import FULL, Case, name_of
from test_optim import ADAMW, SIZES, assert_alike, params_of, params_values, train
from test_oracle import bounds, gradient, sizes
from torch import nn
from ways import optimizer_of, snapshot, ways

import pyupdate

pytestmark = pytest.mark.usefixtures("wide_scalars")
cases = pytest.mark.parametrize("case", FULL, ids=str)


@pytest.mark.all_pairs
@cases
@ways
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_independent_and_go_on(case: Case, way, how, backend):
    optimizer = optimizer_of(way, case, params_of(), max_norm=3.0)
    train(optimizer, range(3))
    made = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    assert type(made) is type(optimizer)
    assert made.pyupdate_options == optimizer.pyupdate_options
    before = [value.clone() for value in params_values(optimizer)]
    train(made, range(3, 6))
    assert all(map(torch.equal, params_values(optimizer), before))
    train(optimizer, range(3, 6))
    for a, b in zip(params_values(optimizer), params_values(made), strict=True):
        assert_same_bits(a, b, how)


@ways
def test_a_pickle_without_options_loads(way, backend):
    optimizer = optimizer_of(way, ADAMW, params_of())
    state = optimizer.__getstate__()
    del state["pyupdate_options"]
    made = type(optimizer).__new__(type(optimizer))
    made.__setstate__(state)
    train(made, range(2))
    assert made.state


@pytest.mark.all_pairs
@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("flags", [{"foreach": False}, {"fused": True}], ids=["plain", "fused"])
def test_state_dicts_go_to_torch_and_back_at_every_step(case: Case, dtype, flags, backend):
    rng = np.random.default_rng(51)
    eps = torch.finfo(dtype).eps
    # Powers that are exact in fp64: the last bit of beta2 ** t would show in fp64 (test_oracle.py).
    made: Any = case.torch_class
    taken_by = inspect.signature(made).parameters
    more = {"betas": (0.875, 0.9375)} if "betas" in taken_by else {}
    flags = {flag: value for flag, value in flags.items() if flag in taken_by}

    def optimizer(ours: bool) -> torch.optim.Optimizer:
        if ours:
            return optimizer_of("ours", case, params_of(dtype), **more)
        return made(params_of(dtype), **{**case.options, **more}, **flags)

    def step_of(stepped: torch.optim.Optimizer, grads: list[np.ndarray]) -> None:
        for param, grad in zip(stepped.param_groups[0]["params"], grads, strict=True):
            param.grad = torch.from_numpy(grad).to(dtype)
        stepped.step()

    given = optimizer(ours=True)
    for turn in range(13):
        grads = [gradient(rng, n, case) for n in SIZES]
        if turn < 3:
            step_of(given, grads)
            continue
        # What made the last step goes on in an optimizer of the other kind, and both make one.
        taken = optimizer(ours=turn % 2 == 0)
        for param, other in zip(params_values(taken), params_values(given), strict=True):
            param.copy_(other)
        taken.load_state_dict(copy.deepcopy(given.state_dict()))
        before = [value.double().numpy().copy() for value in params_values(given)]
        step_of(given, grads)
        step_of(taken, grads)
        for i, grad in enumerate(grads):
            found, expected = (tensors_of(each, i) for each in (taken, given))
            assert list(found) == list(expected)
            of = sizes(case, grad, expected["param"] - before[i], turn + 1)
            for key, value in expected.items():
                if key == "step":
                    assert found[key] == value == turn + 1
                    continue
                if key in case.rule.scalars:
                    assert found[key] == pytest.approx(value, rel=4 * eps)
                    continue
                allowed = bounds(key, value, of, eps)
                assert (np.abs(found[key] - value) <= allowed).all(), f"step {turn}, {key}"
        given = taken


def tensors_of(optimizer: torch.optim.Optimizer, index: int) -> dict[str, np.ndarray]:
    param = optimizer.param_groups[0]["params"][index]
    tensors = {"param": param.detach(), **optimizer.state.get(param, {})}
    return {key: value.double().numpy() for key, value in tensors.items()}


@cases
def test_old_checkpoints(case: Case, backend):
    # As torch wrote them years ago: flags that did not exist, step counts that were numbers.
    truth = case.truth(params_of())
    train(truth, range(3))
    old = copy.deepcopy(truth.state_dict())
    for group in old["param_groups"]:
        for flag in ("foreach", "capturable", "differentiable", "fused"):
            group.pop(flag, None)
        if not group["maximize"]:
            del group["maximize"]
        if case.torch_class is torch.optim.Adam:
            del group["decoupled_weight_decay"]
    for state in old["state"].values():
        if "step" in state:
            state["step"] = int(state["step"])
    optimizer = case.ours(params_of())
    for param, value in zip(params_values(optimizer), params_values(truth), strict=True):
        param.copy_(value)
    optimizer.load_state_dict(old)
    train(optimizer, range(3, 6))
    train(truth, range(3, 6))
    assert_alike(optimizer, truth)


# ----- flags switched in mid-training -------------------------------------------------------------


@pytest.mark.all_pairs
@cases
@ways
def test_flags_of_torchs_implementations_make_no_difference(case: Case, way, backend):
    optimizer, other = (optimizer_of(way, case, params_of()) for _ in range(2))
    for turn, flag in enumerate(("foreach", "fused", None, "foreach")):
        optimizer.param_groups[0] |= {"foreach": flag == "foreach", "fused": flag == "fused"}
        train(optimizer, range(turn, turn + 1))
        train(other, range(turn, turn + 1))
    for a, b in zip(params_values(optimizer), params_values(other), strict=True):
        assert_same_bits(a, b, case.name)


@pytest.mark.parametrize("switched", [False, True], ids=["made", "switched"])
@pytest.mark.parametrize("ours", [False, True], ids=["torch", "ours"])
def test_update_model_makes_no_other_step_of_a_differentiable_optimizer(ours, switched, backend):
    # Torch refuses to change a leaf in a step that is differentiated; ours would have changed it.
    model: Any = nn.Linear(3, 2)
    kind = pyupdate.optim.AdamW if ours else torch.optim.AdamW
    model.current_optimizer = kind(model.parameters(), differentiable=not switched)
    if switched:
        pyupdate.update_model(model, model(torch.ones(2, 3)))
        model.current_optimizer.param_groups[0]["differentiable"] = True
        model.current_optimizer.defaults["differentiable"] = True
    before = snapshot(model.current_optimizer)
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        pyupdate.update_model(model, model(torch.ones(2, 3)))
    values = [(param[0][3], param[1]) for param in before]
    after = [(param[0][3], param[1]) for param in snapshot(model.current_optimizer)]
    assert values == after


@ways
def test_momentum_switched_on_off_and_on(way, backend):
    def trained(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        for turn, momentum in enumerate((0.0, 0.9, 0.9, 0.0, 0.5, 0.5)):
            optimizer.param_groups[0]["momentum"] = momentum
            train(optimizer, range(turn, turn + 1))
        return optimizer

    plain = next(case for case in FULL if case.name == "sgd")
    ours = trained(optimizer_of(way, plain, params_of()))
    truth = trained(plain.truth(params_of()))
    for param, expected in zip(
        ours.param_groups[0]["params"], truth.param_groups[0]["params"], strict=True
    ):
        torch.testing.assert_close(param, expected, rtol=1e-11, atol=1e-13)


@ways
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_amsgrad_switched_in_mid_training(name, way, backend):
    case = next(case for case in FULL if case.name == name)
    optimizer, truth = optimizer_of(way, case, params_of()), case.truth(params_of())
    for each in (optimizer, truth):
        train(each, range(2))
        each.param_groups[0]["amsgrad"] = True
    before = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(params_values(optimizer))
    with pytest.raises(ValueError, match=r"lacks \['max_exp_avg_sq'\].*amsgrad"):
        optimizer.step()
    torch.testing.assert_close(optimizer.state_dict(), before[0], rtol=0, atol=0)
    assert all(map(torch.equal, params_values(optimizer), before[1]))
    for each in (optimizer, truth):
        for state in each.state.values():
            state["max_exp_avg_sq"] = torch.zeros_like(state["exp_avg_sq"])
        train(each, range(2, 4))
        each.param_groups[0]["amsgrad"] = False
        train(each, range(4, 6))
    assert_alike(optimizer, truth)


def test_a_scalar_that_torch_has_loaded_into_half_goes_on(backend):
    # torch casts mu_product to the parameter's type on load; pyupdate's own classes do not.
    def made(kind: Any) -> tuple[torch.nn.Parameter, Any]:
        param = torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
        return param, kind([param])

    first, stock = made(torch.optim.NAdam)
    first.grad = torch.ones_like(first)
    stock.step()
    saved = copy.deepcopy(stock.state_dict())
    param, loaded = made(torch.optim.NAdam)
    loaded.load_state_dict(copy.deepcopy(saved))
    narrow = float(loaded.state[param]["mu_product"])
    assert loaded.state[param]["mu_product"].dtype is torch.bfloat16
    param.grad = torch.zeros_like(param)
    pyupdate.accelerate(loaded).step()
    product = loaded.state[param]["mu_product"]
    assert product.dtype is torch.float32
    assert float(product) == pytest.approx(narrow * 0.9 * (1 - 0.5 * 0.96 ** (2 * 0.004)), rel=1e-6)
    param, ours = made(pyupdate.optim.NAdam)
    ours.load_state_dict(saved)
    assert ours.state[param]["mu_product"].dtype is torch.float32
    assert ours.state[param]["mu_product"] == stock.state[first]["mu_product"]


def skip_by_option(optimizer: Any) -> None:
    optimizer.step()


def skip_by_scaler(optimizer: Any) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)


def skip_by_unscaled_scaler(optimizer: Any) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    scaler.unscale_(optimizer)
    scaler.step(optimizer)


def refuse(optimizer: Any) -> None:
    with pytest.raises(RuntimeError, match="is non-finite"):
        optimizer.step()


def refuse_a_gradient(optimizer: Any) -> None:
    last = optimizer.param_groups[0]["params"][-1]
    last.grad = torch.eye(5)[0].to_sparse()
    with pytest.raises(TypeError, match="is sparse"):
        optimizer.step()


SKIPS: dict[str, tuple[dict[str, Any], Any]] = {
    "skip_nonfinite": ({"skip_nonfinite": True}, skip_by_option),
    "scaler": ({}, skip_by_scaler),
    "unscaled": ({}, skip_by_unscaled_scaler),
    "error_if_nonfinite": ({"max_norm": 1e9, "error_if_nonfinite": True}, refuse),
    "refused": ({}, refuse_a_gradient),
}


@ways
@pytest.mark.parametrize("skip", list(SKIPS))
@pytest.mark.parametrize("case", [case for case in FULL if case.name.startswith("sgd_m")], ids=str)
def test_momentum_that_is_loaded_after_a_skipped_first_step_goes_on(case, skip, way, backend):
    # The skipped step saw that there is no momentum, by which SGD knows its first step.
    def grads(params: Any, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)

    options, make_skip = SKIPS[skip]
    theirs = [nn.Parameter(torch.ones(5)) for _ in range(20)]  # more than are read at once
    truth = case.torch_class(theirs, **case.options)
    for seed in range(2):
        grads(theirs, seed)
        truth.step()
    params = [nn.Parameter(param.detach().clone()) for param in theirs]
    optimizer = optimizer_of(way, case, params, **options)
    for param in params:
        param.grad = torch.full((5,), torch.inf)
    make_skip(optimizer)
    assert all(map(torch.equal, params, theirs))
    optimizer.load_state_dict(copy.deepcopy(truth.state_dict()))
    for seed in (2, 3):
        for each, of in ((optimizer, params), (truth, theirs)):
            grads(of, seed)
            each.step()
    for param, other in zip(params, theirs, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-7)
