# SPDX-License-Identifier: Apache-2.0
"""`drain` through the back end ``cuda``, its kernels run on the CPU: several models in one step.

The truth is the same models, drained one by one; that these steps are right is
test_cuda_backend.py's.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from device_on_cpu import cuda_on_cpu
from test_drain import (  # run on this back end, too
    assert_bits_of_one_by_one,
    counted,
    test_an_optimizer_without_a_rule,  # noqa: F401
    test_autograd_still_sees_what_was_written,  # noqa: F401
    test_each_with_its_own_scaler,  # noqa: F401
    test_every_optimizer_that_there_is,  # noqa: F401
    test_foreign_callables_are_called_in_their_place,  # noqa: F401
    test_gradients_are_let_go,  # noqa: F401
    test_memory_that_two_models_share,  # noqa: F401
    test_models_that_share_an_optimizer_or_a_parameter,  # noqa: F401
    test_options_that_are_stepped_alone,  # noqa: F401
)
from test_predicted import recorded_launches
from torch import nn
from waiting import Deferred, Net, assert_same, one_by_one, pending

import pyupdate
from pyupdate import build, drain, update_model
from pyupdate.backends import cuda
from pyupdate.backends.cuda_memory import Memory


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Net, "strided", False)


@pytest.fixture
def backend(cuda_module: Any, plain: None) -> Iterator[str]:
    with cuda_on_cpu(cuda_module):
        yield "cuda"


@pytest.fixture
def regions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return counted(cuda.Part, monkeypatch)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The range of bytes of every sending of joint tables."""
    found: list[tuple[int, int]] = []
    send = Memory.send

    def noted(self: Memory, *given: Any) -> tuple[int, int]:
        if len(self.parts) > 1:
            found.append(given[2:4])
        return send(self, *given)

    monkeypatch.setattr(Memory, "send", noted)
    return found


def nets(count: int, **options: Any) -> list[nn.Module]:
    """Models of one kind and other sizes."""
    made = [Net(i, 50 + 16_400 * (i % 2), torch.float32) for i in range(count)]
    kind = pyupdate.optim.AdamW
    return [
        build(net, kind(net.parameters(), lr=0.1, **options), model_name=f"net {i}")
        for i, net in enumerate(made)
    ]


def keeping(models: list[nn.Module], turn: int) -> Deferred:
    """Updates that wait, with gradients that stay where they are from one turn to the next."""
    deferred: Deferred = {}
    for model in models:
        held = getattr(model, "held", None)
        update_model(model, model.loss(turn), defer=True, deferred=deferred)
        if held is None:
            model.held = held = [param.grad for param in model.parameters()]
        for param, grad in zip(model.parameters(), held, strict=True):
            if grad is not None:
                grad.copy_(param.grad)
            param.grad = grad
    return deferred


# ----- results ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [300, 17_000])  # one chunk a parameter, and two
def test_the_bits_of_one_by_one(size, backend, regions):
    assert_bits_of_one_by_one(size)
    assert regions == [0, 12, 12, 12]


def test_a_model_that_is_stepped_alone_between(backend, regions):
    ours, truths = nets(3, max_norm=0.5), nets(3, max_norm=0.5)
    for turn in range(6):
        for each, make in ((ours, drain), (truths, one_by_one)):
            waits = pending(each, turn)
            if turn % 2 == 1:  # one that others go behind, and the last one
                for name in ("net 0", "net 2"):
                    one_by_one({name: waits.pop(name)})
            make(waits)
        assert_same(ours, truths)
    assert regions == [0, 3, 3]


def test_other_members_than_before(backend, regions):
    ours, truths = nets(4), nets(4)
    for turn, names in enumerate(("0123", "0123", "012", "13", "0123", "03")):
        for each, make in ((ours, drain), (truths, one_by_one)):
            make(pending([each[int(name)] for name in names], turn))
        assert_same(ours, truths)
    assert regions == [0, 4, 3, 2, 4, 2]


def test_a_parameter_without_a_gradient(backend, regions):
    ours, truths = nets(3, max_norm=0.5), nets(3, max_norm=0.5)
    for turn in range(4):
        for each, make in ((ours, drain), (truths, one_by_one)):
            waits = pending(each, turn)
            if turn == 2:
                each[1].a.grad = None
            make(waits)
        assert_same(ours, truths)
    assert regions == [0, 3, 3, 3]


@pytest.mark.parametrize("one", range(3))
def test_only_one_is_clipped(one, backend, regions):
    def made():
        models = nets(3)
        models[one].current_optimizer = pyupdate.optim.AdamW(
            models[one].parameters(), lr=0.1, max_norm=0.5
        )
        return models

    ours, truths = made(), made()
    for turn in range(3):
        drain(pending(ours, turn))
        one_by_one(pending(truths, turn))
        assert_same(ours, truths)
    assert regions == [0, 3, 3]
    assert [pyupdate.last_update(model).norm is None for model in ours].count(False) == 1


def test_a_scaler_that_was_asked_to_unscale_one_of_them(backend, regions):
    ours, truths = nets(3), nets(3)
    for turn in range(4):
        scales = []
        for each, make in ((ours, drain), (truths, one_by_one)):
            scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
            waits = pending([each[0]], turn)
            loss = each[1].loss(turn, math.inf if turn == 2 else 1.0)
            update_model(each[1], loss, scaler=scaler, defer=True, deferred=waits)
            update_model(each[2], each[2].loss(turn), defer=True, deferred=waits)
            scaler.unscale_(each[1].current_optimizer)
            make(waits)
            scaler.update()
            scales.append(scaler.get_scale())
        assert_same(ours, truths)
        assert scales == ([4.0, 4.0] if turn == 2 else [8.0, 8.0])
        skips = [pyupdate.last_update(model).skipped for model in ours]
        assert skips == [False, turn == 2, False]
    assert regions == [0, 3, 3, 3]


@pytest.mark.parametrize("new", ["1", "2", "02", "012"])
def test_state_that_was_loaded_is_no_first_step(new, backend, regions, sent):
    # Torch does not count SGD's steps. With dampening, a second one is another than a first.
    def optimizer_of(model):
        return pyupdate.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5)

    def made():
        models = nets(3)
        for model in models:
            model.current_optimizer = optimizer_of(model)
        return models

    ours, truths = made(), made()
    for turn in range(3):
        for each, make in ((ours, drain), (truths, one_by_one)):
            make(keeping(each, turn))
    assert len(sent) == 1
    for each in (ours, truths):
        for model in (each[int(name)] for name in new):
            saved = model.current_optimizer.state_dict()
            model.current_optimizer = optimizer_of(model)
            model.current_optimizer.load_state_dict(saved)
    for turn in range(3):
        for each, make in ((ours, drain), (truths, one_by_one)):
            make(keeping(each, turn))
        assert_same(ours, truths)
    assert regions == [0, 3, 3, 3, 3, 3]
    assert len(sent) == 2  # once for those that were loaded


# ----- what it costs ------------------------------------------------------------------------------


def test_launches_do_not_depend_on_how_many_models_there_are(plain, recorded_module):
    found = []
    for count in (2, 7):
        with cuda_on_cpu(recorded_module):
            models = nets(count, max_norm=1.0)
            lamb = build(Net(9, 40, torch.bfloat16), "lamb", model_name="lamb")
            drain(pending([*models, lamb], 0))
            recorded_launches(recorded_module)
            drain(pending([*models, lamb], 1))
            found.append([made[:3] for made in recorded_launches(recorded_module)])
    assert found[0] == found[1]
    kernels = [name for name, _, _ in found[0]]
    stages = len(pyupdate.kernels.rules.RULES["lamb"].stages)
    assert kernels == ["reduce", "adamw", *["lamb"] * stages]


def test_where_nothing_moved_nothing_is_sent(backend, regions, sent):
    models = nets(3, max_norm=1.0)
    for turn in range(5):
        drain(keeping(models, turn))
    assert regions == [0, 3, 3, 3, 3]
    assert len(sent) == 1


def test_another_number_sends_little(backend, sent):
    models = nets(3, max_norm=1.0)
    for turn in range(3):
        drain(keeping(models, turn))
    del sent[:]
    models[1].current_optimizer.param_groups[0]["lr"] = 0.5
    drain(keeping(models, 3))
    ((begin, end),) = sent
    assert begin == 0
    assert end <= 128  # 5 numbers of 3 groups are 120 bytes


def test_no_model_keeps_another_one_alive(backend, regions):
    models = nets(3)
    for turn in range(2):
        drain(pending(models, turn))
    assert regions == [0, 3]
    gone = [weakref.ref(model) for model in models]
    kept = models.pop(0)
    del models
    gc.collect()
    assert [ref() is None for ref in gone] == [False, True, True]
    assert kept.current_optimizer is not None


def test_what_is_to_be_sent_while_a_graph_is_captured_is_refused(backend, monkeypatch):
    models = nets(2)
    for turn in range(2):
        drain(keeping(models, turn))
    monkeypatch.setenv("PYUPDATE_TEST_CAPTURING", "1")
    drain(keeping(models, 2))  # nothing has to be sent
    waits = keeping(models, 3)
    models[1].a.grad = models[1].a.grad.clone()
    with pytest.raises(RuntimeError, match="the memory of the gradient of 'a' is another one"):
        drain(waits)


class Named(nn.Module):
    """Parameters of these names; what ends in "unused" no loss reaches."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, nn.Parameter(torch.ones(5)))

    def loss(self, turn: int) -> torch.Tensor:
        reached = [p for name, p in self.named_parameters() if not name.endswith("unused")]
        return torch.stack(reached).sum() * turn


@pytest.mark.parametrize("name", ["x", "y", "other_y", "z", "last_z"])
def test_what_has_moved_is_named(name, backend, monkeypatch):
    names = ("unused", "x"), ("y", "y_unused", "other_y"), ("a", "z_unused", "z", "last_z")
    models = [
        build(Named(*each), "adamw", model_name=f"net {i}", max_norm=1.0)
        for i, each in enumerate(names)
    ]
    for turn in (1, 2):
        drain(keeping(models, turn))
    waits = keeping(models, 3)
    (param,) = (p for m in models for called, p in m.named_parameters() if called == name)
    param.grad = param.grad.clone()
    monkeypatch.setenv("PYUPDATE_TEST_CAPTURING", "1")
    with pytest.raises(RuntimeError, match=f"of the gradient of '{name}' is another one"):
        drain(waits)
