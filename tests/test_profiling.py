# SPDX-License-Identifier: Apache-2.0
"""A profiler sees steps under torch's names; where there is none, nobody is told."""

import pytest
import torch
from cases import FULL
from torch.optim.optimizer import register_optimizer_step_post_hook
from ways import optimizer_of, ways

import pyupdate

ADAMW = next(case for case in FULL if case.name == "adamw")


def steps_seen(step):
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, acc_events=True) as profiler:  # 2.10 warns without
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


@ways
@pytest.mark.parametrize("of_all", [False, True], ids=["of_one", "of_all"])
def test_a_hook_that_a_closure_registers_is_run_behind_its_own_step(way, backend, of_all):
    def steps_told_of(make):
        told, handles = [], []
        param = param_of_one()
        optimizer = make(param)

        def note(stepped, args, kwargs):
            told.append(
                (stepped is optimizer, args[0] is optimizer, optimizer.state[param]["step"].item())
            )

        def closure():
            if not handles:
                register = (
                    register_optimizer_step_post_hook
                    if of_all
                    else optimizer.register_step_post_hook
                )
                handles.append(register(note))
            return torch.tensor(1.0)

        try:
            optimizer.step(closure)
            optimizer.step(closure)
        finally:
            for handle in handles:
                handle.remove()
        return told

    ours = steps_told_of(lambda param: optimizer_of(way, ADAMW, [param]))
    assert (
        ours
        == steps_told_of(lambda param: ADAMW.truth([param]))
        == [(True, True, 1.0), (True, True, 2.0)]
    )
