# SPDX-License-Identifier: Apache-2.0
"""Adafactor: torch.optim.Adafactor's step within the accuracy of a mean, a stack a shape."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from bits import assert_same_bits
from cases import DTYPES, name_of
from torch import nn

import pyupdate
from pyupdate.kernels import composite
from pyupdate.optim import Adafactor, adafactor_packs, adafactor_stacks
from pyupdate.pytorch.engines import engine_of, last_step

SHAPES = ((), (1,), (7,), (8, 3), (33, 2), (2, 3, 4), (1025,), (8, 3), (7,), (), (1, 1))
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


def values(seed: int, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.tensor(rng.standard_normal(shape)).to(dtype) for shape in shapes]


def params_of(dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    return [nn.Parameter(value) for value in values(1, dtype, shapes)]


def give(params: Sequence[nn.Parameter], grads: Sequence[torch.Tensor]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, scale: torch.Tensor, what: str) -> None:
    """Within 8 roundings of `scale`, for a mean is some off, and each side takes its own."""
    bound = 8 * torch.finfo(ours.dtype).eps * scale.double()
    error = (ours.double() - theirs.double()).abs()
    assert (error <= bound).all(), f"{what}: {(error / bound).max()} of the bound"


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


@pytest.mark.parametrize("shape", [(3,), (4, 3)], ids=str)
@pytest.mark.parametrize("kind", ["packs", "stacks", "packs of different shapes"])
def test_operations_do_not_grow_with_the_number_of_parameters(shape, kind, monkeypatch):
    class Counting(torch.overrides.TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            name = getattr(func, "__name__", "")
            assert name not in ("item", "__float__", "__bool__"), name
            if name not in ("__get__", "detach", "new_zeros", "dim", "numel", "new_empty"):
                self.calls += 1
            return func(*args, **(kwargs or {}))

    if kind == "stacks":
        monkeypatch.setattr(adafactor_packs, "SMALL", 0)

    def calls_of(count: int) -> int:
        from pyupdate.optim.adafactor import _finish

        more = range(count) if "different" in kind else [0] * count
        shapes = [(shape[0] + i, *shape[1:]) for i in more]
        params = params_of(torch.float32, shapes)
        optimizer = Adafactor(params)
        for seed in (2, 3):
            give(params, values(seed, torch.float32, shapes))
            optimizer.step()
        (plan,) = engine_of(optimizer).plans.values()
        last = last_step(optimizer)
        assert last is not None
        with Counting() as counting:
            _finish(optimizer, plan.rows, last)
        return counting.calls

    assert calls_of(9) == calls_of(2) > 0


def test_of_one_element_there_are_two_averages():
    """More of them than elements, in a pack that follows a smaller one."""
    shapes = ((1, 1), (1, 1), (1, 1), (1, 1))
    params, twins = params_of(torch.float64, shapes), params_of(torch.float64, shapes)
    groups = [[{"params": of[:1]}, {"params": of[1:]}] for of in (params, twins)]
    ours, theirs = Adafactor(groups[0], lr=0.5), torch.optim.Adafactor(groups[1], lr=0.5)
    for seed in (2, 3, 4):
        give(params, values(seed, torch.float64, shapes))
        give(twins, values(seed, torch.float64, shapes))
        ours.step()
        theirs.step()
    for param, twin in zip(params, twins, strict=True):
        assert_close(param, twin, 1.0 + twin.detach().abs(), "one element")
        for key, value in theirs.state[twin].items():
            assert_close(ours.state[param][key], value, value.abs(), key)


def test_large_stacks_are_parted_without_a_difference(monkeypatch):
    monkeypatch.setattr(adafactor_packs, "SMALL", 0)
    made = []
    for most in (2**20, 20):
        monkeypatch.setattr(adafactor_stacks, "BLOCK", most)
        params = params_of(torch.float32, [(4, 3)] * 5)
        give(params, values(2, torch.float32, [(4, 3)] * 5))
        Adafactor(params).step()
        made.append(params)
    for one, other in zip(*made, strict=True):
        assert_close(one, other, other.detach().abs(), "parted")


MIXED = (
    (2, 3, 4),
    (7,),
    (8, 3),
    (),
    (33, 2),
    (1, 5),
    (3, 4),
    (2, 2, 3, 4),
    (1100,),
    (5, 1),
    (70, 30),
    (5, 4, 3, 3),
    (2, 3, 3),
    (6, 4, 4, 1),
    (1, 4, 1),
)
"""Some made of matrices of one shape, many or few; sums of more than one run."""


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("most", [2**17, 40])
def test_company_in_a_pack_makes_no_difference(dtype, most, monkeypatch, backend):
    """Of other shapes, other step counts and other layouts of gradients and state."""
    monkeypatch.setattr(adafactor_packs, "PACK", most)
    options: dict[str, Any] = {"lr": 0.75, "weight_decay": 0.25, "beta2_decay": -0.5}
    options |= {"clip_value": 1.5, "maximize": True}
    params, twins = params_of(dtype, MIXED), params_of(dtype, MIXED)
    together, alone = Adafactor(params, **options), [Adafactor([p], **options) for p in twins]
    for seed in range(2, 7):
        grads: list[Any] = values(seed, dtype, MIXED)
        if seed == 3:
            grads[::2] = [None] * len(grads[::2])  # these are a step behind
        if seed == 5:
            grads = [torch.stack([grad, grad], -1)[..., 0] for grad in grads]
            state = together.state[params[2]]
            state["row_var"] = torch.stack([state["row_var"]] * 2, -1)[..., 0]
        for param, twin, grad in zip(params, twins, grads, strict=True):
            param.grad, twin.grad = grad, None if grad is None else grad.clone()
        together.step()
        for one in alone:
            one.step()
    for param, twin, one in zip(params, twins, alone, strict=True):
        what = f"{tuple(param.shape)} in company"
        assert_same_bits(param.detach(), twin.detach(), what)
        for key, value in one.state[twin].items():
            assert_same_bits(together.state[param][key], value, f"{key} of {what}")
    every = engine_of(together).known.swept
    packs = [one for one in every if isinstance(one, adafactor_packs.Pack)]
    assert packs == every and (len(packs) > 3) == (most == 40)


# ----- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"lr": -1.0},
        {"lr": torch.ones(2)},
        {"beta2_decay": 0.5},
        {"eps": (-1.0, 1e-3)},
        {"eps": (None, -1.0)},
        {"d": 0.5},
        {"weight_decay": -0.5},
    ],
    ids=str,
)
def test_bad_arguments_have_torchs_words(arguments):
    said = []
    for kind in (Adafactor, torch.optim.Adafactor):
        with pytest.raises(ValueError, match=r"should be|must be") as caught:
            kind([nn.Parameter(torch.ones(2))], **arguments)
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_what_cannot_be_had_is_refused_by_name():
    param = nn.Parameter(torch.ones(2, 2))
    param.grad = torch.ones(2, 2)
    words = "Adafactor cannot be had with stochastic_rounding"
    with pytest.raises(ValueError, match=words):
        Adafactor([param], stochastic_rounding=True)
    with pytest.raises(ValueError, match=words):
        pyupdate.accelerate(torch.optim.Adafactor([param]), stochastic_rounding=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"row_var": torch.ones(2, 2)}, "state 'row_var' of 'group 0, parameter 0'"),
        ({"col_var": torch.ones(1, 2).double()}, "state 'col_var' of 'group 0, parameter 0'"),
        ({"col_var": None}, r"lacks \['col_var'\]"),
        ({"row_var": 1.0}, "is float, not a tensor"),
    ],
    ids=str,
)
def test_state_that_does_not_fit_is_refused_before_anything_is_written(change, words, backend):
    param = nn.Parameter(torch.ones(2, 2))
    param.grad = torch.ones(2, 2)
    optimizer = Adafactor([param])
    optimizer.step()
    optimizer.state[param].update(change)
    before = param.detach().clone()
    with pytest.raises((TypeError, ValueError), match=words):
        optimizer.step()
    assert torch.equal(param, before)
    assert float(optimizer.state[param]["step"]) == 1.0


@pytest.mark.parametrize(
    "change",
    [{"eps": None}, {"eps": (None, None)}, {"eps": 1e-3}, {"d": None}, {"d": "one"}],
    ids=str,
)
def test_numbers_of_a_group_that_are_none_are_refused_before_anything_is_written(change, backend):
    params = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    optimizer = Adafactor([{"params": [param]} for param in params])
    for param in params:
        param.grad = torch.ones(2, 2)
    optimizer.step()
    state = [{k: v.clone() for k, v in optimizer.state[param].items()} for param in params]
    before = [param.detach().clone() for param in params]
    optimizer.param_groups[1].update(change)
    (key,) = change
    with pytest.raises(ValueError, match=rf"'{key}'.* of parameter group 1 .*set them to what"):
        optimizer.step()
    for param, values, kept in zip(params, before, state, strict=True):
        assert torch.equal(param, values)
        assert all(torch.equal(optimizer.state[param][k], v) for k, v in kept.items())


@pytest.mark.parametrize("key", ["row_var", "col_var"])
@pytest.mark.parametrize("other", ["state", "parameter", "gradient", "itself"])
def test_state_that_shares_memory_is_refused_before_anything_is_written(key, other, backend):
    params = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    optimizer = Adafactor(params)
    for param in params:
        param.grad = torch.ones(2, 2)
    optimizer.step()
    state = optimizer.state[params[0]]
    shape, strides = state[key].shape, state[key].stride()
    of = {
        "state": optimizer.state[params[1]][key],
        "parameter": params[1].detach(),
        "gradient": params[0].grad,
        "itself": torch.ones(1).expand(2),
    }[other]
    assert of is not None
    kept = state[key]
    state[key] = of.as_strided(shape, (0, 0) if other == "itself" else strides)
    before = [param.detach().clone() for param in params]
    words = "overlaps itself" if other == "itself" else "shares memory with|lies in the memory of"
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    assert [float(optimizer.state[param]["step"]) for param in params] == [1.0, 1.0]
    state[key] = kept
    optimizer.step()
    assert float(optimizer.state[params[0]]["step"]) == 2.0


def test_a_gradient_that_moves_into_the_memory_of_state_is_refused(backend):
    room = torch.zeros(12)
    params = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    optimizer = Adafactor(params)
    give(params, [torch.ones(2, 2)] * 2)
    optimizer.step()
    optimizer.state[params[1]]["row_var"] = room[4:6].view(2, 1)
    for start in (0, 6, 8):  # two of them beside it
        give(params, [torch.ones(2, 2)] * 2)
        optimizer.step()
        params[0].grad = room[start : start + 4].view(2, 2)
        optimizer.step()
    before = [param.detach().clone() for param in params]
    for start in (1, 2, 3, 4, 5):
        params[0].grad = room[start : start + 4].view(2, 2)
        with pytest.raises(ValueError, match="lies in the memory of"):
            optimizer.step()
    assert all(map(torch.equal, params, before))


# ----- what every optimizer has -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_scaler_unscales_and_a_skipped_step_leaves_all_bits(dtype, backend):
    shapes = ((), (7,), (8, 3))
    params, twins = params_of(dtype, shapes), params_of(dtype, shapes)
    optimizer, truth = Adafactor(params, lr=0.125), Adafactor(twins, lr=0.125)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    grads = values(3, dtype, shapes)
    give(twins, grads)
    truth.step()
    give(params, [torch.full_like(grad, float("inf")) for grad in grads])
    scaler.step(optimizer)  # a skipped first step leaves no state
    scaler.update()
    assert not optimizer.state
    give(params, [grad * 2.0 for grad in grads])
    scaler.step(optimizer)
    scaler.update()
    for param, twin in zip(params, twins, strict=True):
        assert_same_bits(param.detach(), twin.detach(), "unscaled")
    give(params, grads)
    assert params[2].grad is not None
    params[2].grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    for param, twin in zip(params, twins, strict=True):
        assert_same_bits(param.detach(), twin.detach(), "skipped")
        for key, value in truth.state[twin].items():
            assert_same_bits(optimizer.state[param][key], value, f"skipped, {key}")
    assert scaler.get_scale() == 1.0


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


def test_state_goes_to_torch_and_back_in_the_middle(backend):
    shapes = ((), (7,), (8, 3), (2, 3, 4))
    params, twins = params_of(torch.float64, shapes), params_of(torch.float64, shapes)
    truth = torch.optim.Adafactor(twins, lr=0.125)
    kinds = (Adafactor, torch.optim.Adafactor, Adafactor, torch.optim.Adafactor)
    saved: Any = None
    for seed, kind in enumerate(kinds, 2):
        optimizer = kind(params, lr=0.5)
        if saved is not None:
            optimizer.load_state_dict(saved)
        optimizer.param_groups[0]["lr"] = 0.125
        give(params, values(seed, torch.float64, shapes))
        give(twins, values(seed, torch.float64, shapes))
        optimizer.step()
        truth.step()
        saved = copy.deepcopy(optimizer.state_dict())
    for param, twin in zip(params, twins, strict=True):
        assert_close(param, twin, len(kinds) * twin.detach().abs(), "moved to and fro")
    assert saved["param_groups"][0].keys() == truth.state_dict()["param_groups"][0].keys()


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


def test_accumulated_micro_batches_are_their_mean():
    param, twin = (nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    optimizer = Adafactor([param], eps=(0.5, 1e-3), accumulation_steps=2)
    first, second = values(2, torch.float32, [(4, 3)])[0], values(3, torch.float32, [(4, 3)])[0]
    param.grad = first.clone()
    optimizer.step()
    assert param.tolist() == twin.tolist()
    param.grad += second
    optimizer.step()
    twin.grad = (first + second) / 2
    torch.optim.Adafactor([twin], eps=(0.5, 1e-3)).step()
    assert_close(param, twin, twin.detach().abs(), "accumulated")


def test_a_stock_adafactor_is_accelerated_and_its_state_goes_on():
    param, twin = (nn.Parameter(torch.ones(5, 3)) for _ in range(2))
    stock, theirs = torch.optim.Adafactor([param]), torch.optim.Adafactor([twin])
    for seed in (2, 3):
        grad = values(seed, torch.float32, [(5, 3)])[0]
        param.grad, twin.grad = grad, grad.clone()
        stock.step()
        theirs.step()
        pyupdate.accelerate(stock)
    assert type(stock) is Adafactor
    assert_close(param, twin, twin.detach().abs(), "accelerated")


def test_update_model_steps_it_and_what_has_no_gradient_stays():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    twin = copy.deepcopy(model)
    pyupdate.build(model, "adafactor", lr=0.25)
    truth = torch.optim.Adafactor(twin.parameters(), lr=0.25)
    x = values(2, torch.float32, [(2, 4)])[0]
    for _ in range(2):
        pyupdate.update_model(model, (model[0](x) ** 2).mean())
        truth.zero_grad()
        (twin[0](x) ** 2).mean().backward()
        truth.step()
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-6)
    assert list(model.current_optimizer.state) == [model[0].weight, model[0].bias]
    assert model[0].weight.grad is None


def test_the_pass_runs_compiled(compiled):
    param = nn.Parameter(torch.ones(4, 4))
    param.grad = torch.ones(4, 4)
    optimizer = Adafactor([param])
    optimizer.step()
    (plan,) = engine_of(optimizer).plans.values()
    assert plan.backends == ("cpu",)


def test_update_model_steps_a_stock_one_unasked(backend):
    model = pyupdate.build(nn.Linear(3, 2), lambda p: torch.optim.Adafactor(p))
    optimizer: Any = model.current_optimizer
    twin = copy.deepcopy(nn.Sequential(model))[0]
    truth = Adafactor(twin.parameters())
    x = values(2, torch.float32, [(4, 3)])[0]
    for _ in range(2):
        pyupdate.update_model(model, model(x) ** 2)
        truth.zero_grad()
        (twin(x) ** 2).mean().backward()
        truth.step()
    assert type(optimizer) is torch.optim.Adafactor
    assert last_step(optimizer) is not None
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same_bits(param.detach(), other.detach(), "stock")
        for key, value in truth.state[other].items():
            assert_same_bits(optimizer.state[param][key], value, key)
    assert isinstance(pyupdate.accelerate(optimizer), Adafactor)


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
