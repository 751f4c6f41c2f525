# SPDX-License-Identifier: Apache-2.0
"""`drain`: the bits of calling every callable in order, several models in one parallel region.

The truth is the same models, drained one by one.
"""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from torch import nn
from waiting import Deferred, Net, assert_same, one_by_one, pending, settled

import pyupdate
from pyupdate import build, drain, update_model
from pyupdate.backends import cpu as cpu_backend


@pytest.fixture
def regions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many models each region stepped that was asked to step several; 0 where it refused."""
    return counted(cpu_backend.Part, monkeypatch)


def counted(part: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The same, of a back end's class of parts."""
    seen: list[int] = []
    own = part.step_together

    def noted(joinings):
        done = own(joinings)
        seen.append(0 if done is None else len(done))
        return done

    monkeypatch.setattr(part, "step_together", staticmethod(noted))
    return seen


def zoo(size: int = 3000) -> list[nn.Module]:
    """A model of each kind: rules with other numbers of states, storages, options."""
    optim = pyupdate.optim
    kinds = (
        (torch.float32, lambda p: optim.AdamW(p, lr=0.1)),
        (torch.bfloat16, lambda p: optim.SGD(p, lr=0.01)),
        (torch.float64, lambda p: optim.Adam(p, lr=0.1, amsgrad=True, max_norm=1.0)),
        (torch.float16, lambda p: optim.SGD(p, lr=0.01, momentum=0.9, max_norm=0.5)),
        (torch.float32, lambda p: torch.optim.AdamW(p, lr=0.1, maximize=True)),
        (torch.float32, lambda p: optim.AdamW(p, lr=0.1, clip_value=0.3)),
        (torch.bfloat16, lambda p: optim.AdamW(p, lr=0.1, state_dtype=torch.float32)),
        (torch.float32, lambda p: optim.AdamW([{"params": p[:1]}, {"params": p[1:], "lr": 0.3}])),
        (torch.float32, lambda p: optim.SGD(p, max_norm=2.0, norm_type=math.inf)),
        (torch.float32, lambda p: optim.AdamW(p, lr=0.1, ema_decay=0.9, max_norm=0.7)),
        (torch.bfloat16, lambda p: optim.SGD(p, lr=0.01, momentum=0.9, ema_decay=0.5)),
        (torch.float32, lambda p: optim.SGD(p, lr=0.1, skip_nonfinite=True)),
    )
    return [
        build(Net(i, size + 17 * i, dtype), make, model_name=f"net {i}")
        for i, (dtype, make) in enumerate(kinds)
    ]


# ----- results ------------------------------------------------------------------------------------


@pytest.mark.slow_reference
@pytest.mark.parametrize("size", [300, 300_000])  # one thread, and several
def test_the_bits_of_one_by_one(size, backend, regions, threads):
    for count in threads[:3]:
        torch.set_num_threads(count)
        regions.clear()
        assert_bits_of_one_by_one(size)
        # The first step makes the state, one by one.
        assert regions == ([0, 12, 12, 12] if backend != "reference" else [])


def assert_bits_of_one_by_one(size: int) -> None:
    models, truths = zoo(size), zoo(size)
    for turn in range(4):
        for each, make in ((models, drain), (truths, one_by_one)):
            deferred: Deferred = {}
            for i, model in enumerate(each):
                # The last one skips its step, and so does only it.
                weight = math.nan if turn == 2 and i == 11 else 1.0
                update_model(model, model.loss(turn, weight), defer=True, deferred=deferred)
            make(deferred)
            assert deferred == {}
        assert_same(models, truths)
        skips = [pyupdate.last_update(model).skipped for model in models]
        assert skips == [False] * 11 + [turn == 2]


def test_each_with_its_own_scaler(backend, regions):
    models, truths = zoo()[:4], zoo()[:4]
    ours, theirs = ([torch.amp.GradScaler("cpu", init_scale=2.0**k) for k in (3, 5)] for _ in "ab")
    for turn in range(4):
        for each, scalers, make in ((models, ours, drain), (truths, theirs, one_by_one)):
            deferred: Deferred = {}
            for i, model in enumerate(each):
                scaler = (scalers[0], scalers[1], scalers[1], None)[i]
                weight = math.inf if turn == 2 and i == 1 else 1.0
                loss = model.loss(turn, weight)
                update_model(model, loss, scaler=scaler, defer=True, deferred=deferred)
            make(deferred)
            for scaler in scalers:
                scaler.update()
        assert_same(models, truths)
        assert [each.state_dict() for each in ours] == [each.state_dict() for each in theirs]
        skips = [pyupdate.last_update(model).skipped for model in models]
        assert skips == [False, turn == 2, False, False]
    assert [scaler.get_scale() for scaler in ours] == [2.0**3, 2.0**4]
    assert regions == ([0, 4, 4, 4] if backend != "reference" else [])


def test_every_optimizer_that_there_is(backend, regions):
    # Rules with scalars, with turns between stages, with three stages: all in one region.
    def models():
        kinds = sorted(pyupdate.optim.CLASSES)
        return [build(Matrix(i), kind, model_name=kind) for i, kind in enumerate(kinds)]

    class Matrix(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(seed)
            self.a = nn.Parameter(torch.randn(90, 70, generator=generator))

        def loss(self, turn: int) -> torch.Tensor:
            return ((self.a - turn) ** 2).sum()

    ours, truths = models(), models()
    for turn in range(3):
        for each, make in ((ours, drain), (truths, one_by_one)):
            deferred: Deferred = {}
            for model in each:
                update_model(model, model.loss(turn), defer=True, deferred=deferred)
            make(deferred)
        assert_same(ours, truths)
    if backend != "reference":
        assert max(regions) >= 3


def test_autograd_still_sees_what_was_written(backend, regions):
    models = [build(nn.Linear(4, 4), "adamw", model_name=f"net {i}") for i in range(3)]
    for _ in range(2):
        deferred: Deferred = {}
        x = torch.ones(2, 4, requires_grad=True)
        outs = [model(x) for model in models]
        for model, out in zip(models, outs, strict=True):
            update_model(model, out, defer=True, deferred=deferred)
        versions = [param._version for model in models for param in model.parameters()]
        drain(deferred)
        after = [param._version for model in models for param in model.parameters()]
        assert all(a > v for a, v in zip(after, versions, strict=True))
        for out in outs:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.sum().backward()
    assert regions == ([0, 3] if backend != "reference" else [])


def test_gradients_stay_where_autograd_put_them(backend):
    models = zoo()[:3]
    put: dict[int, int] = {}
    for param in (param for model in models for param in model.parameters()):
        param.register_post_accumulate_grad_hook(
            lambda p: put.__setitem__(id(p), p.grad.data_ptr())
        )
    for _ in range(2):
        deferred: Deferred = {}
        for model in models:
            update_model(model, model.loss(1), defer=True, deferred=deferred)
        stepped = []
        for model in models:
            params = list(model.parameters())
            assert [p.grad.data_ptr() for p in params] == [put[id(p)] for p in params]
            stepped += [(param, param.grad) for param in params]
        before = [grad.clone() for _, grad in stepped]
        drain(deferred)
        for (param, grad), old in zip(stepped, before, strict=True):
            assert_same_bits(grad, old, "gradient")  # read in place, not written
            assert param.grad is None


def test_gradients_are_let_go(backend):
    models = settled(3)
    deferred = pending(models)
    grads = [weakref.ref(param.grad) for model in models for param in model.parameters()]
    assert all(grad() is not None for grad in grads)
    drain(deferred)
    gc.collect()
    assert [grad() for grad in grads] == [None] * len(grads)


# ----- what cannot go together --------------------------------------------------------------------


def test_foreign_callables_are_called_in_their_place(backend, regions):
    models, truths = settled(4), settled(4)
    seen: list[Any] = []

    def look(of):
        seen.append([param.detach().clone() for model in of for param in model.parameters()])

    for each, make in ((models, drain), (truths, one_by_one)):
        deferred = pending(each)
        deferred["net 1"].append(lambda of=each: look(of))
        make(deferred)
        assert deferred == {}
    assert_same(models, truths)
    ours, theirs = seen
    assert all(map(torch.equal, ours, theirs))
    assert regions == ([2, 2] if backend != "reference" else [])


def test_step_hooks_run_between_the_steps(backend, regions):
    models, truths = settled(3), settled(3)
    seen: list[Any] = []
    for each in (models, truths):
        first, second, _ = each
        second.current_optimizer.register_step_pre_hook(
            lambda *_, first=first: seen.append(first.a.detach().clone())
        )
    drain(pending(models))
    one_by_one(pending(truths))
    assert_same(models, truths)
    assert torch.equal(*seen)
    assert regions == []


def test_models_that_share_an_optimizer_or_a_parameter(backend, regions):
    def make():
        models = settled(4)
        shared = pyupdate.optim.SGD([*models[0].parameters(), *models[1].parameters()], lr=0.1)
        models[0].current_optimizer = models[1].current_optimizer = shared
        models[3].a = models[2].a
        build(models[3], "adamw")
        return models

    models, truths = make(), make()
    for turn in range(3):
        drain(pending(models, turn))
        one_by_one(pending(truths, turn))
        for model, truth in zip(models, truths, strict=True):
            for param, other in zip(model.parameters(), truth.parameters(), strict=True):
                assert_same_bits(param, other, "parameter")
    if backend != "reference":
        assert regions[-1] == 2  # the second and the third alone


@pytest.mark.parametrize("shared", ["parameters", "a gradient"])
def test_memory_that_two_models_share(shared, backend, regions):
    def make():
        models = settled(3)
        if shared == "parameters":
            base = torch.zeros(60)
            with torch.no_grad():
                models[0].a.set_(base[:50])
                models[2].a.set_(base[10:])
        return models

    def prepared(models):
        deferred = pending(models)
        if shared == "a gradient":  # the third is stepped with what the first has become
            models[2].a.grad = models[0].a.detach()
        return deferred

    models, truths = make(), make()
    drain(prepared(models))
    one_by_one(prepared(truths))
    assert_same(models, truths)
    assert regions == ([0] if backend != "reference" else [])


def test_an_optimizer_without_a_rule(backend, regions):
    def make():
        models = settled(3)
        other = torch.optim.LBFGS(models[1].parameters(), lr=0.1)
        other.step = lambda: models[1].a.data.add_(1.0)
        build(models[1], other)
        return models

    models, truths = make(), make()
    drain(pending(models))
    one_by_one(pending(truths))
    for model, truth in zip(models, truths, strict=True):
        assert all(map(torch.equal, model.parameters(), truth.parameters()))
    assert regions == []


def test_options_that_are_stepped_alone(backend, regions):
    def make():
        models = settled(5)
        careful = pyupdate.optim.AdamW(models[2].parameters(), max_norm=1, error_if_nonfinite=True)
        models[2].current_optimizer = careful
        return models

    models, truths = make(), make()
    drain(pending(models))
    one_by_one(pending(truths))
    assert_same(models, truths)
    assert regions == ([2, 2] if backend != "reference" else [])
