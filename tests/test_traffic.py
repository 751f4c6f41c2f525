# SPDX-License-Identifier: Apache-2.0
"""The bytes that a step moves, and that the compiled stages read and write what is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import pyupdate
from pyupdate.kernels.language import rule
from pyupdate.kernels.rules import RULES
from pyupdate.pytorch.engines import ROWS
from pyupdate.pytorch.rows import OptimizerRow

FULL = {"max_norm": 1.0, "ema_decay": 0.999, "clip_value": 1.0, "skip_nonfinite": True}


def params_of(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(n, dtype=dtype)) for n in (3, 100)]


@pytest.mark.parametrize(
    ("options", "scaled", "expected"),
    [
        ({}, False, 28),
        ({"clip_value": 1.0}, False, 28),
        ({}, True, 32),
        ({"max_norm": 1.0}, False, 32),
        ({"max_norm": 1.0}, True, 32),
        ({"skip_nonfinite": True}, False, 32),
        ({"ema_decay": 0.999}, False, 36),
        (FULL, True, 40),
    ],
    ids=str,
)
def test_adamw_in_fp32(options, scaled, expected):
    optimizer = pyupdate.optim.AdamW(params_of(), **options)
    assert pyupdate.bytes_per_parameter(optimizer, scaled=scaled) == expected


def test_narrow_storage():
    of = pyupdate.bytes_per_parameter
    halves = params_of(torch.bfloat16)
    assert of(pyupdate.optim.AdamW(halves)) == 14
    assert of(pyupdate.optim.AdamW(halves, state_dtype=torch.float32)) == 22
    assert of(pyupdate.optim.AdamW(halves, ema_decay=0.9, max_norm=1.0)) == 14 + 8 + 2
    assert of(pyupdate.optim.SGD(params_of(torch.float64))) == 24
    assert of(torch.optim.SGD(params_of(), momentum=0.9, lr=0.1)) == 20
    mixed = pyupdate.optim.SGD([*params_of(torch.float64), *params_of(torch.float16)], lr=0.1)
    assert of(mixed) == (24 + 6) / 2


def prepare(step: float, lr: float) -> tuple[float, ...]:
    twice = lr * step
    return lr, twice


@rule(state={"velocity": 0.0}, prepare=prepare)
def toy(param: float, grad: float, velocity: float, lr: float) -> tuple[float, ...]:
    velocity = velocity * 0.5 + grad
    param = param - lr * velocity
    return param, velocity


@rule(state={"velocity": 0.0, "slow": 0.0}, prepare=prepare)
def toy_with_more(
    param: float, grad: float, velocity: float, slow: float, lr: float
) -> tuple[float, ...]:
    velocity = velocity * 0.5 + grad
    slow = slow * 0.5 + velocity
    param = param - lr * slow
    return param, velocity, slow


def test_one_more_state_of_a_toy_adds_a_read_and_a_write(monkeypatch):
    class Toy(torch.optim.SGD):
        pass

    found = []
    for each in (toy, toy_with_more):
        monkeypatch.setitem(ROWS, Toy, OptimizerRow(lambda group, each=each: each, False))
        found.append(pyupdate.bytes_per_parameter(Toy(params_of(), lr=0.1)))
    assert found == [20, 28]


def test_the_compiled_stages_read_and_write_what_is_counted(compiled):
    for name, each in RULES.items():
        masks = [
            tuple(
                sum(1 << each.elements.index(n) for n in names) for names in (s.elements, s.writes)
            )
            for s in each.stages
        ]
        assert compiled.stages(name) == masks, name


def test_what_has_no_rule_is_refused():
    model: Any = nn.Linear(2, 2)
    for wrong in (
        model,
        torch.optim.LBFGS(model.parameters()),
        3,
        pyupdate.optim.SGD([nn.Parameter(torch.ones(0))]),
    ):
        with pytest.raises(ValueError, match="bytes_per_parameter takes"):
            pyupdate.bytes_per_parameter(wrong)
    pyupdate.build(model, "adamw", ema_decay=0.9)
    assert pyupdate.bytes_per_parameter(model) == 36


# ----- what an update left, read when it is asked for ---------------------------------------------


def test_values_of_the_last_update_are_read_once_and_late():
    reads: list[str] = []

    def read(name: str, value: Any) -> Any:
        return lambda: reads.append(name) or value

    last = pyupdate.options.LastUpdate(read("norm", 2.0), read("skipped", True), read("mult", 0.5))
    assert reads == []
    assert (last.skipped, last.skipped, reads) == (True, True, ["skipped"])
    assert last == pyupdate.options.LastUpdate(2.0, skipped=True, multiplier=0.5)
    assert repr(last) == "LastUpdate(norm=2.0, skipped=True, multiplier=0.5)"
    assert sorted(reads) == ["mult", "norm", "skipped"]
    assert hash(last) == hash(pyupdate.options.LastUpdate(2.0, skipped=True, multiplier=0.5))


def test_a_step_by_torchs_own_path_is_read_late(monkeypatch):
    model: Any = nn.Linear(2, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    model.current_optimizer = torch.optim.Adam(model.parameters())
    model.current_optimizer.step = model.current_optimizer.step  # replaced: torch's own path
    pyupdate.update_model(model, model(torch.ones(1, 2)), scaler=scaler)
    asked: list[Any] = []
    own = torch.Tensor.__float__
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: asked.append(1) or own(self))
    last = pyupdate.last_update(model)
    assert last is not None
    assert not asked
    assert (last.norm, last.skipped, last.multiplier) == (None, False, 0.125)
    assert asked
