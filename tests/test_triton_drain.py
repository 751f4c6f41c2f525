# SPDX-License-Identifier: Apache-2.0
"""`drain` through the back end ``triton``: several models in the launches of one.

The steps are made by the PTX that a GPU would run, as in test_triton.py. The truth is the same
models, drained one by one on `reference`.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from test_drain import counted
from torch import nn
from torch.amp.grad_scaler import GradScaler
from waiting import Deferred, Net, assert_same, one_by_one, pending

import pyupdate
from pyupdate import build, drain, optim, update_model

pytest.importorskip("triton", reason="triton is not installed (make check-device installs it)")

from device.triton_backend import triton_backend
from device.triton_on_cpu import Machine
from test_triton_rows import FORBIDDEN
from ways import plan_of

from pyupdate.backends import triton, triton_together

Make = Callable[[Sequence[nn.Parameter]], Any]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Net, "strided", False)


@pytest.fixture(params=[True], ids=["by C++"])
def machine(request: Any, compiled: Any) -> Iterator[Machine]:
    with triton_backend(compiled=request.param) as made:
        yield made


by_each = pytest.mark.parametrize(
    "machine", [True, False], ids=["by C++", "by Python"], indirect=True
)
"""Who reads the tensors anew at every step."""


@pytest.fixture
def regions(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many models were stepped at once; 0 where they had to be stepped one by one."""
    from device import triton_backend as module

    return counted(module._Saying, monkeypatch)


def built(*kinds: tuple[int, torch.dtype, Make]) -> list[nn.Module]:
    """A model of each size, dtype and optimizer."""
    return [
        build(Net(i, size, dtype), make, model_name=f"net {i}")
        for i, (size, dtype, make) in enumerate(kinds)
    ]


def nets(count: int, **options: Any) -> list[nn.Module]:
    """Models of one kind and other sizes, of few parameters: each takes the PTX a while."""
    made = []
    for i in range(count):
        net = Net(i, 50 + 16_400 * (i % 2), torch.float32)
        del net.c, net.d
        optimizer = optim.AdamW(net.parameters(), lr=0.1, **options)
        made.append(build(net, optimizer, model_name=f"net {i}"))
    return made


def step_both(
    ours: list[nn.Module],
    truths: list[nn.Module],
    turn: int,
    *,
    weights: Sequence[float] = (),
    scalers: Sequence[Sequence[GradScaler | None]] = ((), ()),
    before: Callable[[list[nn.Module]], None] = lambda models: None,
    alike: slice = slice(None),
) -> None:
    """Drain `ours` together, and `truths` one by one on `reference`; `alike` must be the same."""

    def waiting(models: list[nn.Module], own: Sequence[GradScaler | None]) -> Deferred:
        deferred: Deferred = {}
        for i, model in enumerate(models):
            loss = model.loss(turn, weights[i] if weights else 1.0)
            scaler = own[i] if own else None
            update_model(model, loss, scaler=scaler, defer=True, deferred=deferred)
        before(models)
        return deferred

    drain(waiting(ours, scalers[0]))
    with pyupdate.use_backend("reference"):
        one_by_one(waiting(truths, scalers[1]))
    assert_same(ours[alike], truths[alike])


def launched(machine: Machine) -> list[str]:
    """The kernels' names."""
    return [launch.name for launch in machine.launches]


# ----- results ------------------------------------------------------------------------------------


def several() -> list[nn.Module]:
    """Rules of one stage and of two, two storages, norms and averages; other numbers for each."""
    return built(
        (50, torch.float32, lambda p: optim.AdamW(p, lr=0.1, max_norm=0.5)),
        (16_390, torch.float32, lambda p: optim.AdamW(p, lr=0.2, betas=(0.8, 0.9), max_norm=3.0)),
        (70, torch.float32, lambda p: optim.AdamW([{"params": p[:1]}, {"params": p[1:], "lr": 1}])),
        (40, torch.bfloat16, lambda p: optim.LAMB(p, lr=0.1, weight_decay=0.1, max_norm=0.25)),
        (60, torch.float32, lambda p: optim.AdamW(p, lr=0.1, max_norm=0.7, ema_decay=0.9)),
        (80, torch.float32, lambda p: optim.AdamW(p, lr=0.1)),
    )


def test_the_bits_of_one_by_one(machine, regions):
    ours, truths = several(), several()
    with pyupdate.use_backend("reference"):  # where the state is made
        for each in (ours, truths):
            one_by_one(pending(each))
            one_by_one(pending(each[1:2]))  # it is ahead: its bias is corrected by less
    scales = [[GradScaler("cpu", init_scale=2.0**k) for k in (3, 5)] for _ in "ab"]
    scalers = [[a, None, None, b, b, a] for a, b in scales]
    for turn in range(3):
        # One is not finite, and skips; the squares of two others overflow, and they do not.
        weights = [1e25, 1.0, 1.0, 1.0, math.inf, 1e25] if turn == 1 else [1.0] * 6
        machine.launches.clear()
        step_both(ours, truths, turn, weights=weights, scalers=scalers)
        # AdamW with and without averages, and LAMB, which has two stages.
        assert launched(machine) == ["reduce_pass"] * 3 + ["apply_pass"] * 4
        assert not any(FORBIDDEN.search(launch.text) for launch in machine.launches)
        for scaler in (*scales[0], *scales[1]):
            scaler.update()
        assert [s.state_dict() for s in scales[0]] == [s.state_dict() for s in scales[1]]
        skips = [pyupdate.last_update(model).skipped for model in ours]
        assert skips == [turn == 1 and m == 4 for m in range(6)]
    assert regions == [6, 6, 6]
    assert [scaler.get_scale() for scaler in scales[0]] == [2.0**3, 2.0**4]


def test_a_scaler_that_has_unscaled_already(machine, regions):
    ours, truths = nets(3, max_norm=0.5), nets(3, max_norm=0.5)
    scales = [[None, *(GradScaler("cpu", init_scale=4.0) for _ in "ab")] for _ in "ab"]

    def unscale(models: list[nn.Module]) -> None:
        for model, scaler in zip(models, scales[models is truths], strict=True):
            if scaler is not None:
                scaler.unscale_(model.current_optimizer)

    with pyupdate.use_backend("reference"):
        for each in (ours, truths):
            one_by_one(pending(each))
    # `reference` takes no norm where others have found an inf, so that is looked at one turn later.
    for turn, alike in ((0, slice(0, None, 2)), (1, slice(None))):
        weights = [1.0, math.inf if turn == 0 else 1.0, 1.0]
        both = (ours, truths, turn)
        step_both(*both, weights=weights, scalers=scales, before=unscale, alike=alike)
        skips = [pyupdate.last_update(model).skipped for model in ours]
        assert skips == [False, turn == 0, False]
        for scaler in (*scales[0][1:], *scales[1][1:]):
            scaler.update()
    assert regions == [3, 3]


def test_without_a_norm(machine, regions):
    ours, truths = nets(2), nets(2)
    for turn in range(3):
        machine.launches.clear()
        step_both(ours, truths, turn)
        ours[1].current_optimizer.param_groups[0]["lr"] = 0.3
        truths[1].current_optimizer.param_groups[0]["lr"] = 0.3
    assert launched(machine) == ["prepare_pass", "apply_pass"]
    assert regions == [0, 2, 2]


def test_other_members_than_before(machine, regions, monkeypatch):
    monkeypatch.setattr(triton_together, "KEPT", 2)
    ours, truths = nets(3, max_norm=0.5), nets(3, max_norm=0.5)
    sets = ("012", "012", "01", "12", "02", "0", "012", "20")
    for turn, members in enumerate(sets):
        step_both(*([each[int(m)] for m in members] for each in (ours, truths)), turn)
    assert regions == [0, 3, 2, 2, 2, 3, 2]
    (part,) = plan_of(ours[0].current_optimizer).parts
    assert len(part.together._kept) == 2


@by_each
def test_steps_alone_and_without_a_gradient(machine, regions):
    def drop(models: list[nn.Module]) -> None:
        models[1].a.grad = None

    ours, truths = nets(3, max_norm=0.5), nets(3, max_norm=0.5)
    for turn in range(4):
        step_both(ours, truths, turn, before=drop if turn == 2 else lambda models: None)
        if turn == 1:
            step_both(ours[:1], truths[:1], turn)  # others go behind it
    assert regions == [0, 3, 3, 3]


@by_each
@pytest.mark.parametrize("shared", ["parameters", "a gradient"])
def test_memory_that_two_models_share(shared, machine, regions):
    def share(models: list[nn.Module]) -> None:
        if shared == "a gradient":  # the third is stepped with what the first has become
            models[2].a.grad = models[0].a.detach()

    def made() -> list[nn.Module]:
        models = nets(3)
        if shared == "parameters":
            base = torch.zeros(64)
            with torch.no_grad():
                models[0].a.set_(base[:50])
                models[2].a.set_(base[14:])
        return models

    ours, truths = made(), made()
    for turn in range(2):
        step_both(ours, truths, turn, before=share)
    assert regions == [0, 0]


# ----- what it costs ------------------------------------------------------------------------------


def test_launches_do_not_depend_on_how_many_models_there_are(machine):
    for count in (2, 5):
        models = nets(count, max_norm=1.0)
        for turn in range(2):
            machine.launches.clear()
            drain(pending(models, turn))
        assert launched(machine) == ["reduce_pass", "apply_pass"]


@by_each
def test_where_nothing_moved_nothing_is_sent(machine, regions, monkeypatch):
    sent = []
    send = triton.Part.send
    monkeypatch.setattr(
        triton.Part, "send", lambda self, host: (sent.append(host), send(self, host))[1]
    )
    models = nets(3, max_norm=1.0)

    def keeping(turn: int) -> Deferred:
        """With gradients that stay where they are from one turn to the next."""
        deferred = pending(models, turn)
        for model in models:
            params = list(model.parameters())
            held = model.__dict__.setdefault("held", [param.grad for param in params])
            for param, grad in zip(params, held, strict=True):
                grad.copy_(param.grad)
                param.grad = grad
        return deferred

    for turn in range(2):
        drain(keeping(turn))
    sent.clear()
    for turn in range(2):
        drain(keeping(turn))
    assert regions == [0, 3, 3, 3]
    assert sent == []
    models[1].current_optimizer.param_groups[0]["lr"] = 0.5
    drain(keeping(4))
    assert [host.dtype for host in sent] == [torch.float64]  # the numbers alone
    sent.clear()
    waits = keeping(5)
    moved = models[1].a.grad = models[1].a.grad.clone()
    drain(waits)
    assert [host.dtype for host in sent] == [torch.int64]  # the addresses alone
    sent.clear()
    waits = keeping(6)
    models[1].a.grad = moved.clone()  # which cannot lie where that one does
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for model in models:
        plan_of(model.current_optimizer).parts[0]._is_cuda = True
    before = [param.detach().clone() for model in models for param in model.parameters()]
    with pytest.raises(RuntimeError, match=r"while a CUDA graph is captured.*an address or"):
        drain(waits)
    params = [param.detach() for model in models for param in model.parameters()]
    assert all(map(torch.equal, params, before))
    assert sent == []


def test_no_model_keeps_another_one_alive(machine, regions):
    models = nets(3, max_norm=1.0)
    for turn in range(2):
        drain(pending(models, turn))
    assert regions == [0, 3]
    (part,) = plan_of(models[0].current_optimizer).parts
    assert part.nbytes > part.together.nbytes > part._tables.nbytes  # those of three, and its own
    del part
    gone = [weakref.ref(model) for model in models]
    kept = models.pop(0)
    del models
    gc.collect()
    assert [ref() is None for ref in gone] == [False, True, True]
    truth = nets(1, max_norm=1.0)
    with pyupdate.use_backend("reference"):
        for turn in range(2):
            one_by_one(pending(truth, turn))
    step_both([kept], truth, 2)


# ----- more of it, which takes longer -------------------------------------------------------------


def more() -> list[nn.Module]:
    """Further rules, storages and options."""
    return built(
        (50, torch.float32, lambda p: optim.AdamW(p, lr=0.1, max_norm=0.5)),
        (70, torch.bfloat16, lambda p: optim.AdamW(p, lr=0.1, state_dtype=torch.float32)),
        (2000, torch.bfloat16, lambda p: optim.LAMB(p, lr=0.1, max_norm=0.25)),
        (16_500, torch.float16, lambda p: optim.LARS(p, lr=0.01, momentum=0.9, weight_decay=0.1)),
        (90, torch.float64, lambda p: optim.NAdam([{"params": p[:1]}, {"params": p[1:], "lr": 1}])),
        (60, torch.float32, lambda p: optim.AdamW(p, lr=0.1, max_norm=0.5, norm_type=math.inf)),
        (80, torch.float32, lambda p: optim.AdamW(p, lr=0.1, ema_decay=0.9, clip_value=0.3)),
        (50, torch.float64, lambda p: optim.SGD(p, lr=0.1, max_norm=0.1, norm_type=math.inf)),
        (40, torch.float32, lambda p: optim.AdamW(p, lr=0.1, skip_nonfinite=True)),
    )


@pytest.mark.slow
@by_each
def test_the_bits_of_further_rules_storages_and_options(machine, regions):
    ours, truths = more(), more()
    for turn in range(4):
        bad = [1.0] * 8 + [math.nan if turn == 2 else 1.0]
        step_both(ours, truths, turn, weights=bad)
        assert pyupdate.last_update(ours[-1]).skipped == (turn == 2)
    assert regions == [0, 9, 9, 9]


@pytest.mark.slow
@by_each
@pytest.mark.parametrize("new", ["1", "2", "02", "012"])
def test_state_that_was_loaded_is_no_first_step(new, machine, regions):
    # Torch does not count SGD's steps. With dampening, a second one is another than a first.
    def optimizer_of(model: nn.Module) -> Any:
        return optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5)

    ours, truths = nets(3), nets(3)
    for model in (*ours, *truths):
        model.current_optimizer = optimizer_of(model)
    for turn in range(4):
        step_both(ours, truths, turn)
        for each in (ours, truths) if turn == 1 else ():
            for model in (each[int(name)] for name in new):
                saved = model.current_optimizer.state_dict()
                model.current_optimizer = optimizer_of(model)
                model.current_optimizer.load_state_dict(saved)
    assert regions == [0, 3, 3, 3]


@pytest.mark.slow
@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("kind", sorted(set(optim.CLASSES) - {"Muon", "Adafactor"}))
def test_every_optimizer_that_there_is(kind, max_norm, machine, regions):
    def made() -> list[nn.Module]:
        cls = optim.CLASSES[kind]
        sizes = (40, 16_390, 70)
        return built(
            *(
                (size, torch.float32, lambda p, i=i: cls(p, lr=0.1 + i, max_norm=max_norm))
                for i, size in enumerate(sizes)
            )
        )

    ours, truths = made(), made()
    step_both(ours[1:2], truths[1:2], 0)  # it is ahead
    for turn in range(3):
        step_both(ours, truths, turn)
    assert regions[1:] == [3, 3]  # most make their state in the first one, some with the model
