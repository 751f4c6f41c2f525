# SPDX-License-Identifier: Apache-2.0
"""Adafactor: torch.optim.Adafactor's step within the accuracy of a mean, a stack a shape."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adafactor_cases import SHAPES, assert_close, give, params_of, values
from cases import name_of
from torch import nn

from pyupdate.kernels import composite
from pyupdate.optim import Adafactor, adafactor_packs, adafactor_stacks
from pyupdate.pytorch.engines import engine_of

OPTIONS: list[dict[str, Any]] = [
    {},
    # In fp64: torch rounds the whole step size to the dtype of such a learning rate.
    {"lr": torch.tensor(0.125, dtype=torch.float64), "weight_decay": 0.5},
    {"lr": 2.0, "beta2_decay": -0.5, "d": 1.5},
    {"eps": (1e-3, 0.25), "maximize": True},
    {"eps": (0.5, 1e-3), "weight_decay": 0.25, "lr": 1.0},
    {"beta2_decay": 0.0, "foreach": True},
]


@pytest.fixture(params=["packs", "stacks", "blocks", "device"])
def sweeps(request, monkeypatch):
    """How a sweep goes: over packs, over stacks, as if they were large, as if on a GPU."""
    if request.param != "packs":
        monkeypatch.setattr(adafactor_packs, "SMALL", 0)
    if request.param in ("blocks", "device"):
        monkeypatch.setattr(adafactor_stacks, "BLOCK", 8)
    if request.param == "device":
        monkeypatch.setattr(adafactor_stacks, "TorchOnCpu", adafactor_stacks.Torch)
    return request.param


def torchs(options: dict[str, Any]) -> dict[str, Any]:
    """The same options, by torch's plain loop."""
    return options | {"foreach": False}


@pytest.mark.all_pairs
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=name_of)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_is_torchs_within_the_accuracy_of_a_mean(options, dtype, backend, sweeps):
    params = params_of(dtype)
    twins = copy.deepcopy(params)
    ours = Adafactor(params, **options)
    theirs = torch.optim.Adafactor(twins, **torchs(options))
    for seed in range(2, 6):
        before = copy.deepcopy(params)
        give(params, values(seed, dtype, SHAPES))
        give(twins, values(seed, dtype, SHAPES))
        ours.step()
        theirs.step()
        for i, (param, twin) in enumerate(zip(params, twins, strict=True)):
            what = f"step {seed - 1} of {SHAPES[i]}"
            assert_close(param, twin, before[i].abs() + (before[i] - twin).abs(), what)
            state, truth = ours.state[param], theirs.state[twin]
            assert list(state) == list(truth)
            for key in truth:
                assert state[key].dtype == truth[key].dtype
                assert state[key].shape == truth[key].shape
                assert_close(state[key], truth[key], truth[key].abs(), f"{key}, {what}")
            with torch.no_grad():  # all go on from ours
                twin.copy_(param)
                for key in truth:
                    truth[key].copy_(state[key])
    assert [p.keys() for p in ours.param_groups] == [p.keys() for p in theirs.param_groups]


def test_a_step_by_hand(backend):
    """Powers of two: t = 1, so that every average is the mean itself, and then t = 4."""
    param = nn.Parameter(torch.tensor([[4.0, 4.0], [4.0, 4.0]]))
    # Rows' means of squares 4 and 16, columns' 4 and 16, by which g^2 is no product of the two.
    optimizer = Adafactor([param], lr=0.5, weight_decay=0.5, d=1.0)
    param.grad = torch.tensor([[2.0, 2.0], [4.0, 4.0]])
    optimizer.step()
    # R = (4, 16), C = (10, 10), v = R C / 10 = R, u = 1, rms(p) = 4, rho = 1/2
    assert param.tolist() == [[4.0 * 0.75 - 4.0 * 0.5] * 2] * 2
    state = optimizer.state[param]
    torch.testing.assert_close(state["row_var"], torch.tensor([[4.0], [16.0]]))
    torch.testing.assert_close(state["col_var"], torch.tensor([[10.0, 10.0]]))
    vector = nn.Parameter(torch.tensor([2.0, 2.0]))
    optimizer = Adafactor([vector], lr=4.0, beta2_decay=-0.5, d=1.0)
    state = optimizer.state[vector]
    state |= {"step": torch.tensor(3.0), "variance": torch.tensor([1.0, 1.0])}
    vector.grad = torch.tensor([7.0**0.5, 7.0**0.5])
    optimizer.step()  # t = 4: v = 1/2 + 7/2 = 4, u = sqrt(7)/2, over its rms 1; rho = 1/2
    torch.testing.assert_close(state["variance"], torch.tensor([4.0, 4.0]))
    torch.testing.assert_close(vector.detach(), torch.tensor([1.0, 1.0]))


def test_elementwise_parts_by_hand():
    assert composite.adafactor_average(1.0, 3.0, 0.75) == 2.5
    assert composite.adafactor_average(1.0, 3.0, 0.25) == 1.5
    assert composite.adafactor_average(1e30, 3.0, 1.0) == 3.0
    assert composite.adafactor_row_root(1.0, 4.0, 0.5) == 0.5
    assert composite.adafactor_row_root(2.0, 0.25, 0.5) == 2.0
    assert composite.adafactor_root(4.0) == 2.0
    assert composite.adafactor_size(2.0, 3.0, 0.5, 0.25, 1.5) == 0.5
    assert composite.adafactor_size(0.125, 1.0, 0.5, 0.25, 1.5) == 0.125
    assert composite.adafactor_size(float("nan"), float("nan"), 0.5, 0.25, 1.0) == 0.125


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("wanted", [None, torch.float32], ids=["as_param", "state_dtype"])
def test_a_step_of_halves_is_the_fp32_step_of_their_values(dtype, wanted, backend, sweeps):
    shapes = ((7,), (8, 3), (2, 3, 4))
    params = params_of(dtype, shapes)
    twins = [nn.Parameter(param.detach().float()) for param in params]
    eps = (torch.finfo(dtype).eps, 1e-3)
    ours = Adafactor(params, lr=0.125, state_dtype=wanted)
    give(params, values(2, dtype, shapes))
    give(twins, [grad.float() for grad in values(2, dtype, shapes)])
    ours.step()
    torch.optim.Adafactor(twins, lr=0.125, eps=eps).step()
    for param, twin in zip(params, twins, strict=True):
        rounded = torch.finfo(dtype).eps * twin.detach().abs()
        assert ((param.detach().float() - twin).abs() <= rounded).all()
        state = {key: value for key, value in ours.state[param].items() if key != "step"}
        assert {value.dtype for value in state.values()} == {wanted or dtype}


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 3)])
def test_what_has_no_elements_is_left_alone(shape, backend):
    """Torch divides by zero."""
    empty, other = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(3))
    optimizer = Adafactor([empty, other])
    for _ in range(2):
        empty.grad, other.grad = torch.ones(shape), torch.ones(3)
        optimizer.step()
    assert empty.shape == shape
    assert float(optimizer.state[empty]["step"]) == 2.0
    assert all(value.isfinite().all() for value in optimizer.state[empty].values())
    assert (other < 1.0).all()


def test_layouts_make_no_difference(backend, sweeps):
    base = values(1, torch.float32, [(6, 4)])[0]
    grad = values(2, torch.float32, [(6, 4)])[0]
    plain, turned = nn.Parameter(base.clone()), nn.Parameter(base.t().contiguous().t())
    assert not turned.is_contiguous()
    room = torch.zeros(6, 9)
    within = nn.Parameter(room[:, ::2][:, :4])
    with torch.no_grad():
        within.copy_(base)
    within.grad = grad.clone()
    plain.grad, turned.grad = grad.clone(), grad.t().contiguous().t()
    Adafactor([plain], lr=0.5).step()
    Adafactor([turned], lr=0.5).step()
    Adafactor([within], lr=0.5).step()
    assert_close(turned, plain, plain.detach().abs(), "transposed")
    assert_close(within, plain, plain.detach().abs(), "a part of another tensor")
    assert torch.equal(room[:, :8:2], within) and not room[:, 1::2].any()


@pytest.mark.parametrize("shape", [(1000, 1030), (30_000, 2), (1, 60_000), (60_000,)], ids=str)
def test_long_sums_are_as_good_as_short_ones(shape, backend):
    (param,), (twin,) = params_of(torch.float32, [shape]), params_of(torch.float32, [shape])
    wide = nn.Parameter(twin.detach().double())
    param.grad = values(2, torch.float32, [shape])[0]
    wide.grad = param.grad.double()
    ours, truth = Adafactor([param], lr=0.5), torch.optim.Adafactor([wide], lr=0.5)
    truth.param_groups[0]["eps"] = (torch.finfo(torch.float32).eps, 1e-3)
    ours.step()
    truth.step()
    scale = twin.detach().abs() + (twin.detach() - wide.detach()).abs()
    assert_close(param, wide, scale.float(), "long")
    for key, value in truth.state[wide].items():
        assert_close(ours.state[param][key], value, value.abs(), key)


def test_what_is_kept_for_the_next_step_is_no_state(sweeps):
    (param,) = params_of(torch.bfloat16, [(8, 3)])
    optimizer = Adafactor([param])
    for seed in (2, 3):
        give([param], values(seed, torch.bfloat16, [(8, 3)]))
        version = param._version
        optimizer.step()
        assert param._version > version
    sizes = [one.count for one in engine_of(optimizer).known.scratches.values()]
    assert sizes == [6 if sweeps in ("blocks", "device") else 24]
    copied = copy.deepcopy(optimizer)
    assert engine_of(copied).known is None
    assert list(optimizer.state_dict()["state"][0]) == ["step", "row_var", "col_var"]
    other = copied.param_groups[0]["params"][0]
    for one, its in ((optimizer, param), (copied, other)):
        give([its], values(4, torch.bfloat16, [(8, 3)]))
        one.step()
    assert torch.equal(param, other)


def test_a_parameter_that_changes_its_group_takes_that_ones_numbers(sweeps):
    params, twins = params_of(torch.float64, [(3, 2)] * 3), params_of(torch.float64, [(3, 2)] * 3)
    pair = [
        kind([{"params": of[:2], "lr": 0.5}, {"params": of[2:], "lr": 0.0}])
        for kind, of in ((Adafactor, params), (torch.optim.Adafactor, twins))
    ]
    for seed in range(2, 5):
        for optimizer, of in zip(pair, (params, twins), strict=True):
            give(of, values(seed, torch.float64, [(3, 2)] * 3))
            optimizer.step()
            groups = optimizer.param_groups
            if seed == 3:
                groups[1]["params"].insert(0, groups[0]["params"].pop())
    for param, twin in zip(params, twins, strict=True):
        assert_close(param, twin, 1.0 + twin.detach().abs(), "regrouped")


def test_a_clip_enters_the_gradient(backend, sweeps):
    shapes = ((7,), (8, 3))
    grads = values(3, torch.float64, shapes)
    norm = float(torch.cat([grad.flatten() for grad in grads]).norm())
    for options, clipped in (
        ({"max_norm": 0.5}, [grad * (0.5 / (norm + 1e-6)) for grad in grads]),
        ({"clip_value": 0.25}, [grad.clamp(-0.25, 0.25) for grad in grads]),
    ):
        params, twins = params_of(torch.float64, shapes), params_of(torch.float64, shapes)
        # An eps1 of the size of what is clipped, or Adafactor would not notice a factor.
        optimizer = Adafactor(params, eps=(0.25, 1e-3), **options)
        give(params, grads)
        give(twins, clipped)
        optimizer.step()
        torch.optim.Adafactor(twins, eps=(0.25, 1e-3)).step()
        for param, twin in zip(params, twins, strict=True):
            assert_close(param, twin, twin.detach().abs(), str(options))


def test_steps_that_were_not_counted_together(backend, sweeps):
    """Some parameters had no gradient at first: their schedule is one step behind."""
    shapes = ((4, 3), (4, 3), (5,), (2, 3, 2), (5,))
    params, twins = (params_of(torch.float64, shapes) for _ in range(2))
    options: dict[str, Any] = {"lr": 0.75, "beta2_decay": -0.5, "weight_decay": 0.25}
    ours, theirs = Adafactor(params, **options), torch.optim.Adafactor(twins, **options)
    for seed in (2, 3):
        grads = values(seed, torch.float64, shapes)
        give(params, grads)
        give(twins, grads)
        if seed == 2:
            for late in (*params[1:3], *twins[1:3]):
                late.grad = None
        ours.step()
        theirs.step()
    assert [float(ours.state[param]["step"]) for param in params] == [2.0, 1.0, 1.0, 2.0, 2.0]
    for param, twin in zip(params, twins, strict=True):
        assert_close(param, twin, 1.0 + twin.detach().abs(), "uneven")


@pytest.mark.parametrize("signs", ["--+-", "++--"])
def test_lazily_negated_gradients_count_as_their_values(signs, backend):
    values = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.complex64)
    found = []
    for make in (Adafactor, torch.optim.Adafactor):
        param = nn.Parameter(torch.ones(4, 6))
        optimizer = make([param], lr=0.1)
        for sign in signs:
            param.grad = values.conj().imag if sign == "-" else values.imag
            optimizer.step()
        found.append(param.detach())
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
