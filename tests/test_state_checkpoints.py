# SPDX-License-Identifier: Apache-2.0
"""The dtype of state through checkpoints, copies and `accelerate`."""

from __future__ import annotations

import copy
import pickle
from itertools import product

import numpy as np
import pytest
import torch
from bits import random_values, torch_steps
from cases import DTYPES, FULL, Case, name_of
from test_state_dtype import ADAMW, FP32, dtypes_of_state, halves
from torch import nn
from ways import snapshot

import pyupdate
from pyupdate.options import Options

# ----- checkpoints --------------------------------------------------------------------------------


def trained(
    case: Case, dtype: torch.dtype, state_dtype: torch.dtype | None
) -> torch.optim.Optimizer:
    rng = np.random.default_rng(65)
    params = [nn.Parameter(random_values(rng, n, dtype)) for n in (1, 300)]
    optimizer = case.ours(params, state_dtype=state_dtype)
    grads = [[random_values(rng, len(p), dtype) for p in params] for _ in range(4)]
    torch_steps(optimizer, params, grads)
    return optimizer


def fresh(case: Case, like: torch.optim.Optimizer, **options) -> torch.optim.Optimizer:
    params = [nn.Parameter(p.detach().clone()) for p in like.param_groups[0]["params"]]
    return case.ours(params, **options)


def states_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [
        value
        for param in optimizer.param_groups[0]["params"]
        for key, value in optimizer.state[param].items()
        if key != "step" and value.dim() != 0
    ]


STATED = [case for case in FULL if case.rule.state]


@pytest.mark.all_pairs
@halves
@pytest.mark.parametrize("case", STATED, ids=str)
@pytest.mark.parametrize("saved", [None, FP32], ids=str)
@pytest.mark.parametrize("wanted", [None, FP32], ids=str)
def test_state_is_loaded_without_a_loss(case: Case, dtype, saved, wanted, backend):
    """fp32 that was saved stays, whatever is wanted; own-type state is widened where it is."""
    given = trained(case, dtype, saved)
    taken = fresh(case, given, state_dtype=wanted)
    taken.load_state_dict(copy.deepcopy(given.state_dict()))
    expected = dtype if saved is None and wanted is None else FP32
    assert dtypes_of_state(taken) == {expected}
    for found, value in zip(states_of(taken), states_of(given), strict=True):
        assert torch.equal(found, value.to(expected))  # exact: a widening or no conversion
    rng = np.random.default_rng(66)
    for turn in range(3):
        grads = [[random_values(rng, n, dtype) for n in (1, 300)]]
        for optimizer in (given, taken):
            torch_steps(optimizer, optimizer.param_groups[0]["params"], grads)
        if saved is wanted or saved is FP32:  # else the roundings are others
            pairs = zip(states_of(given), states_of(taken), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs), turn


@halves
@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16], ids=name_of)
def test_without_the_option_other_dtypes_are_cast_as_torch_does(dtype, kind):
    given = trained(ADAMW, kind, None)
    taken = fresh(ADAMW, trained(ADAMW, dtype, None))
    truth = ADAMW.truth([nn.Parameter(p.detach().clone()) for p in taken.param_groups[0]["params"]])
    for optimizer in (taken, truth):
        optimizer.load_state_dict(copy.deepcopy(given.state_dict()))
    for found, value in zip(states_of(taken), states_of(truth), strict=True):
        assert found.dtype is value.dtype is dtype and torch.equal(found, value)


def test_with_the_option_fp64_state_is_rounded_once():
    given = trained(ADAMW, torch.float64, None)
    taken = fresh(ADAMW, trained(ADAMW, torch.bfloat16, None), state_dtype=FP32)
    taken.load_state_dict(given.state_dict())
    for found, value in zip(states_of(taken), states_of(given), strict=True):
        assert found.dtype is FP32 and torch.equal(found, value.float())


def test_parameters_that_are_no_halves_load_as_in_torch():
    for dtype, kind in product((torch.float32, torch.float64), DTYPES):
        given = trained(ADAMW, kind, None)
        taken = fresh(ADAMW, trained(ADAMW, dtype, None), state_dtype=FP32)
        taken.load_state_dict(given.state_dict())
        assert dtypes_of_state(taken) == {dtype}


def test_torch_loads_what_was_saved_in_fp32():
    given = trained(ADAMW, torch.bfloat16, FP32)
    params = [nn.Parameter(p.detach().clone()) for p in given.param_groups[0]["params"]]
    truth = ADAMW.truth(params)
    truth.load_state_dict(given.state_dict())
    torch_steps(truth, params, [[torch.ones_like(p) for p in params]])
    assert dtypes_of_state(truth) == {torch.bfloat16}


def test_hooks_see_what_they_always_do(backend):
    given = trained(ADAMW, torch.bfloat16, FP32)
    taken = fresh(ADAMW, given)
    seen = []

    def halved(_, state_dict):
        state = {
            i: {k: v if k == "step" else v * 0.5 for k, v in inner.items()}
            for i, inner in state_dict["state"].items()
        }
        return {**state_dict, "state": state}

    taken.register_load_state_dict_pre_hook(halved)
    taken.register_load_state_dict_post_hook(lambda o: seen.append(dtypes_of_state(o)))
    for _ in range(2):
        taken.load_state_dict(given.state_dict())
    assert seen == [{FP32}] * 2
    for found, value in zip(states_of(taken), states_of(given), strict=True):
        assert torch.equal(found, value * 0.5)
    assert len(taken._optimizer_load_state_dict_pre_hooks) == 1
    assert len(taken._optimizer_load_state_dict_post_hooks) == 1


def test_a_state_dict_that_does_not_fit_is_refused_and_leaves_no_hook():
    optimizer = trained(ADAMW, torch.bfloat16, FP32)
    before = snapshot(optimizer)
    other = ADAMW.ours([nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(other.state_dict())
    assert snapshot(optimizer) == before
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_keep_it(how, backend):
    optimizer = trained(ADAMW, torch.bfloat16, FP32)
    made = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    assert made.pyupdate_options == Options(state_dtype=FP32)
    assert dtypes_of_state(made) == {FP32}


# ----- accelerate ---------------------------------------------------------------------------------


@halves
@pytest.mark.parametrize("stock", [True, False], ids=["torch's", "ours"])
def test_accelerating_converts_the_state_that_is_there(dtype, stock, backend):
    params = [nn.Parameter(torch.linspace(-1, 1, n).to(dtype)) for n in (1, 300)]
    optimizer = (ADAMW.truth if stock else ADAMW.ours)(params)
    torch_steps(optimizer, params, [[torch.full_like(p, 0.3) for p in params]] * 3)
    before = [value.clone() for value in states_of(optimizer)]
    steps = [optimizer.state[p]["step"] for p in params]
    values = [p.detach().clone() for p in params]
    assert pyupdate.accelerate(optimizer, state_dtype=FP32) is optimizer
    assert dtypes_of_state(optimizer) == {FP32}
    assert all(map(torch.equal, states_of(optimizer), [value.float() for value in before]))
    assert all(optimizer.state[p]["step"] is kept for p, kept in zip(params, steps, strict=True))
    assert all(map(torch.equal, params, values))
    kept = states_of(optimizer)
    for again in (FP32, None):  # nothing left to convert, and nothing is rounded back
        pyupdate.accelerate(optimizer, state_dtype=again)
        assert all(a is b for a, b in zip(states_of(optimizer), kept, strict=True))
    torch_steps(optimizer, params, [[torch.full_like(p, 0.3) for p in params]])
    assert dtypes_of_state(optimizer) == {FP32}


def test_a_refused_acceleration_converts_nothing():
    params = [nn.Parameter(torch.ones(3, dtype=torch.bfloat16))]
    optimizer = torch.optim.AdamW(params)
    torch_steps(optimizer, params, [[torch.ones_like(p) for p in params]])
    optimizer.step = lambda: None
    before = snapshot(optimizer)
    with pytest.raises(TypeError, match="whose step was replaced"):
        pyupdate.accelerate(optimizer, state_dtype=FP32)
    assert snapshot(optimizer) == before
