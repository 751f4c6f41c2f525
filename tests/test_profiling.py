# SPDX-License-Identifier: Apache-2.0
"""A profiler sees steps under torch's names; where there is none, nobody is told."""

import pytest
import torch
from cases import FULL
from ways import optimizer_of, ways

import pyupdate

ADAMW = next(case for case in FULL if case.name == "adamw")


def steps_seen(step):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
        step()
    found = {event.key: event.count for event in profiler.key_averages()}
    return {key: count for key, count in found.items() if key.startswith("Optimizer.step")}


def param_of_one():
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    return param


@ways
def test_each_step_is_seen_once_under_torchs_name(way, backend):
    optimizer = optimizer_of(way, ADAMW, [param_of_one()])
    optimizer.step()
    assert steps_seen(optimizer.step) == steps_seen(ADAMW.truth([param_of_one()]).step)


def test_update_model_is_seen(backend):
    model = pyupdate.build(torch.nn.Linear(2, 1), "adamw")
    update = lambda: pyupdate.update_model(model, model(torch.ones(1, 2)).sum())  # noqa: E731
    assert steps_seen(update) == {"Optimizer.step#AdamW.step": 2}


@ways
def test_nobody_is_told_where_nobody_listens(way, backend, monkeypatch):
    optimizer = optimizer_of(way, ADAMW, [param_of_one()])

    def told(*_):
        pytest.fail("a profiler was told of a step")

    monkeypatch.setattr(torch.autograd.profiler.record_function, "__enter__", told)
    optimizer.step()
