# SPDX-License-Identifier: Apache-2.0
"""The options as such: one text, taken everywhere, and what is refused."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from test_scaler import ADAMW, params_of, set_grads
from ways import bits, optimizer_of, snapshot, ways

import pyupdate
from pyupdate.options import Options
from pyupdate.pytorch.engines import options_of

FIELDS = {field.name: field.default for field in dataclasses.fields(Options)}

TAKEN: dict[str, Any] = {
    "max_norm": 2.0,
    "norm_type": math.inf,
    "error_if_nonfinite": True,
    "skip_nonfinite": True,
    "clip_value": 0.5,
    "ema_decay": 0.99,
    "accumulation_steps": 3,
    "state_dtype": torch.float32,
    "stochastic_rounding": True,
    "seed": 7,
}
"""A value of each option that is not its default."""

BESIDE: dict[str, dict[str, Any]] = {"error_if_nonfinite": {"max_norm": 1.0}}
"""What an option cannot be had without."""

REFUSED = [
    ("max_norm", -1.0),
    ("max_norm", math.nan),
    ("max_norm", "1"),
    ("max_norm", True),
    ("max_norm", np.bool_(True)),
    ("max_norm", np.float32(-1.0)),
    ("max_norm", torch.tensor(1.0)),
    ("max_norm", np.array(1.0)),
    ("max_norm", 1j),
    ("clip_value", -1.0),
    ("clip_value", math.nan),
    ("clip_value", False),
    ("clip_value", torch.tensor(1.0)),
    ("clip_value", (-1.0, 1.0)),
    ("accumulation_steps", 0),
    ("accumulation_steps", 2.0),
    ("accumulation_steps", True),
    ("accumulation_steps", np.bool_(True)),
    ("accumulation_steps", np.float64(2.0)),
    ("accumulation_steps", np.int64(0)),
    ("accumulation_steps", torch.tensor(2)),
    ("accumulation_steps", None),
    ("ema_decay", -0.1),
    ("ema_decay", 1.1),
    ("ema_decay", math.nan),
    ("ema_decay", True),
    ("ema_decay", np.float32(1.1)),
    ("ema_decay", torch.tensor(0.9)),
    ("ema_decay", "0.9"),
    ("norm_type", 1.0),
    ("norm_type", 0),
    ("norm_type", -math.inf),
    ("norm_type", math.nan),
    ("norm_type", "inf"),
    ("norm_type", None),
    ("error_if_nonfinite", 1),
    ("error_if_nonfinite", None),
    ("skip_nonfinite", "yes"),
    ("skip_nonfinite", 0),
    ("state_dtype", "float32"),
    ("state_dtype", torch.bfloat16),
    ("state_dtype", torch.float64),
    ("stochastic_rounding", 1),
    ("stochastic_rounding", None),
    ("seed", -1),
    ("seed", 2**63),
    ("seed", 1.0),
    ("seed", True),
    ("seed", np.float64(1.0)),
]


def takers() -> list[Any]:
    return [pyupdate.build, pyupdate.accelerate, *pyupdate.optim.CLASSES.values()]


def with_option(taker: Any, **options: Any) -> Options:
    """The options that an optimizer has which was made by this taker."""
    if taker is pyupdate.build:
        model: Any = pyupdate.build(torch.nn.Linear(2, 2), "sgd", **options)
        return options_of(model.current_optimizer)
    params = [torch.nn.Parameter(torch.ones(2, 2))]  # a matrix, for Muon
    if taker is pyupdate.accelerate:
        return options_of(pyupdate.accelerate(torch.optim.SGD(params), **options))
    return options_of(taker(params, **options))


REFUSING = {
    (pyupdate.optim.Adafactor, "stochastic_rounding"),
}
"""What comes after its passes is not rounded by chance."""


def test_every_option_is_tried_here():
    assert TAKEN.keys() == FIELDS.keys()
    assert {name for name, _ in REFUSED} == FIELDS.keys()
    assert all(name in (Options.__doc__ or "") for name in FIELDS)


@pytest.mark.parametrize("taker", takers(), ids=lambda taker: taker.__name__)
@pytest.mark.parametrize("name", FIELDS)
def test_everything_takes_every_option_and_shows_it(taker, name):
    shown = inspect.signature(taker).parameters[name]
    assert shown.kind is shown.KEYWORD_ONLY
    assert shown.default == FIELDS[name]
    assert not with_option(taker, **{name: FIELDS[name]}).asked_for
    if (taker, name) in REFUSING:
        with pytest.raises(ValueError, match=f"{taker.__name__} cannot be had with {name}"):
            with_option(taker, **{name: TAKEN[name]})
        return
    options = with_option(taker, **{name: TAKEN[name]}, **BESIDE.get(name, {}))
    assert getattr(options, name) == TAKEN[name]
    assert set(options.asked_for) == {name, *BESIDE.get(name, {})}


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=str)
@pytest.mark.parametrize("taker", takers()[:3], ids=lambda taker: taker.__name__)
def test_what_is_no_value_of_an_option_is_refused_by_name(taker, name, value):
    with pytest.raises((TypeError, ValueError), match=f"^{name} must"):
        with_option(taker, **{name: value})


NUMPYS = [
    ("max_norm", np.float32(0.5), 0.5),
    ("max_norm", np.float16("inf"), math.inf),
    ("max_norm", np.int64(2), 2.0),
    ("clip_value", np.float32(0.1), float(np.float32(0.1))),
    ("ema_decay", np.float64(0.99), 0.99),
    ("ema_decay", np.int8(1), 1.0),
    ("norm_type", np.float32("inf"), math.inf),
    ("norm_type", np.int32(2), 2.0),
    ("accumulation_steps", np.int64(2), 2),
    ("seed", np.uint64(2**63 - 1), 2**63 - 1),
]


@pytest.mark.parametrize(("name", "value", "number"), NUMPYS, ids=str)
@pytest.mark.parametrize("taker", takers()[:3], ids=lambda taker: taker.__name__)
def test_numpys_numbers_become_pythons(taker, name, value, number):
    found = getattr(with_option(taker, **{name: value}), name)
    assert found == number
    assert type(found) is type(number)


@ways
def test_a_step_with_numpys_numbers_is_that_with_pythons(way, backend):
    given = {"max_norm": 0.25, "clip_value": 0.125, "ema_decay": 0.5, "accumulation_steps": 2}
    numpys = {
        n: (np.int64 if n == "accumulation_steps" else np.float32)(v) for n, v in given.items()
    }
    found = []
    for options in (given, numpys):
        params = params_of()
        optimizer: Any = optimizer_of(way, ADAMW, params, **options)
        set_grads(params, 0, 1.0)
        for _ in range(4):
            optimizer.step()
        averages = [optimizer.state[param]["ema"] for param in params if param in optimizer.state]
        found.append([bits(tensor) for tensor in (*params, *averages)])
    assert found[0] == found[1]
    assert found[0] != [bits(tensor) for tensor in params_of()]


def test_options_that_need_or_exclude_another_one():
    with pytest.raises(ValueError, match=r"error_if_nonfinite .* give a max_norm"):
        Options(error_if_nonfinite=True)
    with pytest.raises(ValueError, match="error_if_nonfinite and skip_nonfinite"):
        Options(max_norm=1.0, error_if_nonfinite=True, skip_nonfinite=True)


def test_an_unknown_option_is_refused_and_nothing_is_attached():
    stock = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match=r"accelerate got an unexpected option 'max_nrom'.*max_nor"):
        pyupdate.accelerate(stock, max_nrom=1.0)
    assert type(stock) is torch.optim.SGD
    model: Any = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'norm'"):
        pyupdate.build(model, "sgd", norm=1.0)
    assert not hasattr(model, "current_optimizer")
    with pytest.raises(TypeError, match="max_nrom"):
        pyupdate.optim.SGD(model.parameters(), max_nrom=1.0)


def test_options_survive_copies_and_pickles():
    import copy
    import pickle

    options = {"max_norm": 1.0, "norm_type": math.inf}
    optimizer = pyupdate.optim.SGD([torch.nn.Parameter(torch.ones(2))], **options)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert options_of(other) == Options(**options)


@ways
@pytest.mark.parametrize("name", FIELDS)
def test_a_differentiable_step_has_none_of_them_and_says_so(name, way, backend):
    params = params_of()
    options = {name: TAKEN[name]} | BESIDE.get(name, {})
    if way == "ours":
        with pytest.raises(ValueError, match=f"{name}.*differentiable.*clip_grad_norm_"):
            optimizer_of("ours", ADAMW, params, differentiable=True, **options)
    optimizer: Any = optimizer_of(way, ADAMW, params, **options)
    optimizer.param_groups[0]["differentiable"] = True  # switched on later
    set_grads(params, 0, 1.0)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=f"{name}.*differentiable.*clip_grad_norm_"):
        optimizer.step()
    assert snapshot(optimizer) == before
