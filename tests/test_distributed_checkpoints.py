# SPDX-License-Identifier: Apache-2.0
"""``torch.distributed.checkpoint`` and windows of ``accumulation_steps``.

To have state to load into, it calls ``step(closure=None)`` on gradients of zeros with
learning rates of 0: a step, not a micro-batch. The truth is torch's own optimizer.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from torch import nn
from training import batch, loss_of, network

import pyupdate
from pyupdate.optim import CLASSES
from pyupdate.pytorch.accumulation import POSITION

if not torch.distributed.is_available():
    pytest.skip("torch has no distributed", allow_module_level=True)

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

K = 2
LR = 0.05
flattened = pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
OPTIONS: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": LR},
    "AdamW, a tensor": {"lr": torch.tensor(LR, dtype=torch.float64)},
    "SGD": {"lr": LR},
    "SGD, momentum": {"lr": LR, "momentum": 0.9, "dampening": 0.5},
}
kinds = pytest.mark.parametrize("kind", OPTIONS)


def name_of(kind: str) -> str:
    return kind.partition(",")[0]


def ours(kind: str, model: nn.Module, **more: Any) -> Any:
    made: Any = CLASSES[name_of(kind)]
    options = {key: copy.copy(value) for key, value in OPTIONS.get(kind, {}).items()}
    return made(model.parameters(), **options, **{"accumulation_steps": K, **more})


def torchs(kind: str, model: nn.Module) -> Any:
    made: Any = getattr(torch.optim, name_of(kind))
    return made(model.parameters(), **OPTIONS[kind], foreach=False)


def count_one(model: nn.Module, optimizer: Any, seed: int) -> None:
    loss_of(model, seed).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def torchs_window(model: nn.Module, optimizer: Any, seeds: range) -> None:
    for seed in seeds:
        (loss_of(model, seed).mean() / len(seeds)).backward()
    optimizer.step()
    optimizer.zero_grad()


def assert_close(model: nn.Module, truth: nn.Module) -> None:
    for param, expected in zip(model.parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-12, atol=1e-14)


def positions(optimizer: Any) -> set[int]:
    return {group[POSITION] for group in optimizer.param_groups}


# ----- the state that is made ---------------------------------------------------------------------


@flattened
@pytest.mark.parametrize("name", CLASSES)
def test_making_state_is_a_step_of_every_class(name, flat, backend):
    matrices = nn.Linear(3, 4, bias=False)  # Muon takes no other
    start = matrices.weight.detach().clone()
    plain = copy.deepcopy(matrices)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    optimizer = ours(name, matrices)
    other = ours(name, plain, accumulation_steps=1)
    for model, each in ((matrices, optimizer), (plain, other)):
        get_optimizer_state_dict(model, each, options=options)
    assert positions(optimizer) == {0}
    assert matrices.weight.grad is None
    assert torch.equal(matrices.weight, start)
    state, expected = optimizer.state[matrices.weight], other.state[plain.weight]
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert_same_bits(state[key], value, key)


@kinds
@flattened
def test_training_goes_on_as_torchs_does(kind, flat, backend):
    model = network()
    twin = copy.deepcopy(model)
    optimizer, other = ours(kind, model), torchs(kind, twin)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    for each, of in ((model, optimizer), (twin, other)):
        get_optimizer_state_dict(each, of, options=options)
    for turn in range(3):
        seeds = range(turn * K, (turn + 1) * K)
        for seed in seeds:
            count_one(model, optimizer, seed)
        torchs_window(twin, other, seeds)
        assert_close(model, twin)


def test_a_subclass_with_a_step_of_its_own(backend):
    class Mine(pyupdate.optim.AdamW):
        def step(self, closure=None):
            return super().step(closure)

    model = network()
    optimizer = Mine(model.parameters(), accumulation_steps=K)
    get_optimizer_state_dict(model, optimizer)
    assert positions(optimizer) == {0}
    assert len(optimizer.state) == len(list(model.parameters()))
    count_one(model, optimizer, 0)
    assert positions(optimizer) == {1}


@pytest.mark.parametrize(
    "differs", ["no closure", "a gradient", "a learning rate", "no gradient", "state", "a window"]
)
def test_any_other_step_is_a_micro_batch(differs, backend):
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    groups = [{"params": [param], "lr": 0.0} for param in params]
    optimizer = pyupdate.optim.AdamW(groups, accumulation_steps=3)
    for param in params:
        param.grad = torch.zeros(2)
    if differs == "a gradient":
        params[1].grad[1] = 1.0
    elif differs == "a learning rate":
        groups[1]["lr"] = optimizer.param_groups[1]["lr"] = 1e-3
    elif differs == "no gradient":
        params[1].grad = None
    elif differs == "state":
        for _ in range(3):
            optimizer.step()
    elif differs == "a window":
        optimizer.step()
    before = max(positions(optimizer))
    if differs == "no closure":
        optimizer.step()
    else:
        optimizer.step(closure=None)
    assert positions(optimizer) == {before + 1}


# ----- there and back -----------------------------------------------------------------------------


def save(model: nn.Module, optimizer: Any, options: StateDictOptions, path: Any) -> Any:
    return copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))


def load(model: nn.Module, optimizer: Any, options: StateDictOptions, saved: Any) -> None:
    saved = copy.deepcopy(saved)
    set_optimizer_state_dict(model, optimizer, saved, options=options)


def save_in_files(model: nn.Module, optimizer: Any, options: StateDictOptions, path: Any) -> Any:
    found = get_optimizer_state_dict(model, optimizer, options=options)
    dcp.save({"optimizer": found}, checkpoint_id=path, no_dist=True)
    return path


def load_from_files(model: nn.Module, optimizer: Any, options: StateDictOptions, path: Any) -> None:
    found = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
    dcp.load(found, checkpoint_id=path, no_dist=True)
    set_optimizer_state_dict(model, optimizer, found["optimizer"], options=options)


WAYS = {"dict": (save, load), "files": (save_in_files, load_from_files)}
AT = [
    pytest.param(way, count, id=f"{name}-{count}")
    for name, way in WAYS.items()
    for count in range(2 * K + 1)
    if (name, count) != ("files", 1)  # in a first window is no state, of which torch makes some
]


@pytest.mark.all_pairs
@kinds
@flattened
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize(("how", "count"), AT)
@pytest.mark.filterwarnings("ignore")  # of torch: where it saves to, and TypedStorage
def test_a_checkpoint_after_any_micro_batch(how, count, used, flat, kind, tmp_path):
    model = network()
    twin = copy.deepcopy(model)
    optimizer, other = ours(kind, model), torchs(kind, twin)
    for seed in range(count):
        count_one(model, optimizer, seed)
    full = count // K * K
    for first in range(0, full, K):
        torchs_window(twin, other, range(first, first + K))
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    if count == 0:  # torch makes state, so its own optimizer's too
        get_optimizer_state_dict(twin, other, options=options)
    saved = how[0](model, optimizer, options, tmp_path)
    resumed = network(1)
    taken = ours(kind, resumed)
    for seed in range(K + 1 if used else 0):
        count_one(resumed, taken, 50 + seed)
    resumed.zero_grad()
    how[1](resumed, taken, options, saved)
    assert positions(taken) == {0}  # where there are no gradients no window is open
    resumed.load_state_dict(model.state_dict())
    if count % K:
        for param, old in zip(resumed.parameters(), model.parameters(), strict=True):
            assert old.grad is not None
            param.grad = old.grad.clone()
        how[1](resumed, taken, options, saved)
    assert positions(taken) == {count % K}
    for seed in range(count, 3 * K):
        count_one(resumed, taken, seed)
    for first in range(full, 3 * K, K):
        torchs_window(twin, other, range(first, first + K))
    assert_close(resumed, twin)


def test_a_parameter_without_a_gradient_so_far(backend):
    model = nn.ModuleDict({"used": nn.Linear(5, 3), "late": nn.Linear(5, 3)}).double()
    options = StateDictOptions(flatten_optimizer_state_dict=True)

    def trained(of: Any, each: Any, seeds: range, *names: str) -> None:
        for seed in seeds:
            sum(of[name](batch(seed)).square().mean() for name in names).backward()
            each.step()
            each.zero_grad()

    optimizer = ours("AdamW", model)
    trained(model, optimizer, range(2 * K), "used")
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    resumed = copy.deepcopy(model)
    taken = ours("AdamW", resumed)
    set_optimizer_state_dict(resumed, taken, saved, options=options)
    for of, each in ((model, optimizer), (resumed, taken)):
        trained(of, each, range(2 * K, 4 * K), "used", "late")
    for param, expected in zip(resumed.parameters(), model.parameters(), strict=True):
        assert_same_bits(param, expected, "parameter")
