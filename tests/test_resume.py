# SPDX-License-Identifier: Apache-2.0
"""Training that goes on from a checkpoint has the bits of training that never stopped.

The truth is the uninterrupted run. Torch's own classes are held to the same harness: those go on
exactly too, but for NAdam and ASGD, whose scalars torch casts to the parameter's dtype on load.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from cases import name_of
from test_own_rules import turning
from torch import nn

from pyupdate.optim import CLASSES, from_rule

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "SGD": [{}, {"momentum": 0.9, "dampening": 0.5}],
    "Adam": [{}, {"amsgrad": True}],
    "LARS": [{}, {"momentum": 0.9}],
    "RMSprop": [{}, {"centered": True, "momentum": 0.9}],
}
"""Options by which a class has other state; others are made with none."""

KINDS = [
    pytest.param(kind, options, id="-".join([name, *options]))
    for name, kind in CLASSES.items()
    for options in VARIANTS.get(name, [{}])
]
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=name_of
)
SHAPES = ((4, 6), (7, 3))  # matrices, for Muon
HALF_WAY, STEPS = 3, 6


def params_of(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in SHAPES
    ]


def train(optimizer: Any, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for param in optimizer.param_groups[0]["params"]:
            values = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            param.grad = values.to(param.dtype)
        optimizer.step()


def by_state_dict(optimizer: Any, kind: Any, options: dict[str, Any]) -> Any:
    return loaded(copy.deepcopy(optimizer.state_dict()), optimizer, kind, options)


def by_file(optimizer: Any, kind: Any, options: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return loaded(torch.load(file, weights_only=True), optimizer, kind, options)


def by_copy(optimizer: Any, kind: Any, options: dict[str, Any]) -> Any:
    return copy.deepcopy([*optimizer.param_groups[0]["params"], optimizer])[-1]


def loaded(saved: Any, like: Any, kind: Any, options: dict[str, Any]) -> Any:
    params = [nn.Parameter(param.detach().clone()) for param in like.param_groups[0]["params"]]
    made = kind(params, **options)
    made.load_state_dict(saved)
    return made


def assert_alike(optimizer: Any, truth: Any, what: str) -> None:
    pairs = zip(optimizer.param_groups[0]["params"], truth.param_groups[0]["params"], strict=True)
    for param, expected in pairs:
        assert_same_bits(param, expected, f"{what}: parameter")
        state, wanted = optimizer.state[param], truth.state[expected]
        assert state.keys() == wanted.keys(), what
        for key, value in wanted.items():
            assert_same_bits(state[key], value, f"{what}: {key}")


def check(kind: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    truth = kind(params_of(dtype), **options)
    train(truth, range(HALF_WAY))
    ways = (by_state_dict, by_file, by_copy)
    resumed = [way(truth, kind, options) for way in ways]
    for step in range(HALF_WAY, STEPS):
        train(truth, range(step, step + 1))
        for way, optimizer in zip(ways, resumed, strict=True):
            train(optimizer, range(step, step + 1))
            assert_alike(optimizer, truth, f"{way.__name__}, step {step}")


@dtypes
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(kind, options, dtype, backend):
    check(kind, options, dtype)


@pytest.fixture
def wide_scalars() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@dtypes
@pytest.mark.parametrize("name", ["NAdam", "ASGD", "NovoGrad", "ScheduleFreeAdamW"])
def test_so_it_has_with_scalars_of_float64(name, dtype, wide_scalars, backend):
    check(CLASSES[name], {}, dtype)


@dtypes
def test_so_it_has_with_scalars_of_ones_own_rule(dtype):
    check(from_rule(turning), {"lr": 0.5, "factor": 0.3}, dtype)


@dtypes
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(kind, {**options, "foreach": False}, id=f"{kind.__name__}-{i}")
        for name in ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "RAdam", "Rprop")
        for kind in [getattr(torch.optim, name)]
        for i, options in enumerate(VARIANTS.get(name, [{}]))
    ],
)
def test_torchs_own_classes_go_on_exactly(kind, options, dtype):
    check(kind, options, dtype)
