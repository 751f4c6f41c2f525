# SPDX-License-Identifier: Apache-2.0
"""``ema_decay``: the average that every step moves, against a plain lerp and the numpy oracle."""

from __future__ import annotations

import copy
import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from bits import array_of, assert_same_bits, compute_type, initial_state, random_values
from cases import DTYPES, FULL, Case, name_of
from test_scaler import ADAMW, MOMENTUM, SCALE, params_of, scaler_of, set_grads
from torch import nn
from ways import held, optimizer_of, snapshot, ways

import pyupdate
from pyupdate.kernels import oracle
from pyupdate.kernels.rules import averaged
from pyupdate.pytorch.rows import AVERAGE

cases = pytest.mark.parametrize("case", FULL, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
DECAY = 0.9


def average_of(optimizer: torch.optim.Optimizer, param: torch.Tensor) -> torch.Tensor:
    found = optimizer.state[param][AVERAGE]
    assert isinstance(found, torch.Tensor)
    return found


def oracle_averages(
    case: Case, start: np.ndarray, grads: list[np.ndarray], decay: float
) -> tuple[np.ndarray, np.ndarray]:
    """Parameter and average after a step on each gradient."""
    sign, numbers = case.numbers()
    param, state = start, initial_state(case, start)
    average = oracle.load(start).copy()
    for count, grad in enumerate(grads, 1):
        more = {"count": count, "multiplier": sign}
        param, state = oracle.step(case.rule, param, grad, state, numbers, **more)
        average = oracle.average(average, param, 1.0 - decay)
    return param, average


def test_the_text_is_a_lerp():
    assert averaged(1.0, 3.0, 0.25) == 1.5
    assert averaged(-2.0, 2.0, 0.0) == -2.0
    assert averaged(-2.0, 2.0, 1.0) == 2.0


# ----- the numbers --------------------------------------------------------------------------------


@cases
@every_dtype
def test_to_the_bit_on_every_instruction_set(case: Case, dtype, isas, threads, compiled):
    rng = np.random.default_rng(61)
    start, *grads = [random_values(rng, 40_003, dtype) for _ in range(4)]
    arrays = [array_of(grad) for grad in grads]
    truth, average = oracle_averages(case, array_of(start), arrays, DECAY)

    def check(what: str) -> None:
        param = nn.Parameter(start.clone())
        optimizer = case.ours([param], ema_decay=DECAY)
        for grad in grads:
            param.grad = grad
            optimizer.step()
        assert_same_bits(param, truth, what)
        found = average_of(optimizer, param)
        assert found.dtype is compute_type(dtype)
        assert_same_bits(found, average, f"{what}: average")

    with pyupdate.use_backend("reference"):
        check("reference")
    for isa, n in product(isas, threads):
        compiled.use_isa(isa)
        torch.set_num_threads(n)
        check(f"{isa}, {n} threads")


@pytest.mark.all_pairs
@cases
@ways
def test_beside_torchs_loop_and_a_plain_lerp(case: Case, way, backend):
    params, truth = params_of(), params_of()
    options = {"ema_decay": DECAY, "max_norm": 1.0, "clip_value": 0.1}
    optimizer, other = optimizer_of(way, case, params, **options), case.truth(truth)
    means = [param.detach().clone() for param in truth]
    for turn in range(6):
        scaler, expected = scaler_of(), scaler_of()
        for each, factor in ((params, SCALE), (truth, SCALE)):
            set_grads(each, turn, factor)
            if turn == 3:
                each[0].grad[0] = math.inf
        if turn == 2:
            params[1].grad = truth[1].grad = None
        expected.unscale_(other)
        torch.nn.utils.clip_grad_norm_(truth, 1.0)
        torch.nn.utils.clip_grad_value_(truth, 0.1)
        scaler.step(optimizer)
        expected.step(other)
        for i, (mean, param) in enumerate(zip(means, truth, strict=True)):
            if turn != 3 and (turn, i) != (2, 1):  # only what was stepped
                mean.lerp_(param.detach(), 1.0 - DECAY)
        for param, twin, mean in zip(params, truth, means, strict=True):
            close = {"rtol": 2e-5, "atol": 1e-6}
            torch.testing.assert_close(param, twin, **close)
            torch.testing.assert_close(average_of(optimizer, param), mean, **close)


@ways
def test_a_skipped_first_step_leaves_no_average(way, backend):
    params = params_of()
    optimizer = optimizer_of(way, ADAMW, params, ema_decay=DECAY)
    set_grads(params, 0, SCALE)
    params[0].grad[0] = math.nan
    before = snapshot(optimizer)
    scaler_of().step(optimizer)
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_the_ends_of_the_range(decay, backend):
    param = nn.Parameter(torch.linspace(-1, 1, 70))
    start = param.detach().clone()
    optimizer = pyupdate.optim.SGD([param], lr=0.5, ema_decay=decay)
    for _ in range(3):
        param.grad = torch.ones(70)
        optimizer.step()
    expected = start if decay else param.detach()
    torch.testing.assert_close(average_of(optimizer, param), expected, rtol=0.0, atol=1e-7)


# ----- where it lies ------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("case", [ADAMW, MOMENTUM], ids=str)
def test_strided_and_misaligned_rows_keep_to_their_memory(case: Case, dtype, backend):
    rng = np.random.default_rng(62)
    start = random_values(rng, 70 * 33, dtype).reshape(70, 33)
    grads = [random_values(rng, 70 * 33, dtype).reshape(70, 33) for _ in range(3)]
    places = [held(start, (1, 70)), held(start, (80, 2)), held(start, offset=1)]
    if backend == "reference":
        places.pop()  # torch's own operations need alignment
    arrays = [array_of(grad) for grad in grads]
    truth, average = oracle_averages(case, array_of(start), arrays, DECAY)
    for place in places:
        param = nn.Parameter(place.tensor)
        optimizer = case.ours([param], ema_decay=DECAY)
        for grad in grads:
            param.grad = grad
            optimizer.step()
        assert_same_bits(param.detach().contiguous(), truth, "parameter")
        assert_same_bits(average_of(optimizer, param).contiguous(), average, "average")
        place.assert_neighbours_untouched("parameter")
        around = held(average_of(optimizer, param), (1, 140))
        optimizer.state[param][AVERAGE] = around.tensor
        param.grad = grads[0]
        optimizer.step()
        around.assert_neighbours_untouched("average")


def test_memory_that_is_shared_is_refused(backend):
    params = [nn.Parameter(torch.ones(9)) for _ in range(2)]
    optimizer = pyupdate.optim.AdamW(params, ema_decay=DECAY)
    for param in params:
        param.grad = torch.ones(9)
    optimizer.step()
    optimizer.state[params[0]][AVERAGE] = optimizer.state[params[1]][AVERAGE]
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"'ema' of 'group 0, parameter [01]' shares memory"):
        optimizer.step()
    assert snapshot(optimizer) == before


@pytest.mark.parametrize(
    "wrong",
    [torch.ones(8), torch.ones(9, dtype=torch.float64), torch.ones(9).to_sparse(), "no tensor"],
    ids=["shape", "dtype", "sparse", "string"],
)
def test_what_is_no_average_is_refused_by_name(wrong, backend):
    param = nn.Parameter(torch.ones(9))
    optimizer = pyupdate.optim.AdamW([param], ema_decay=DECAY)
    param.grad = torch.ones(9)
    optimizer.step()
    optimizer.state[param][AVERAGE] = wrong
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError), match="state 'ema' of 'group 0, parameter 0'"):
        optimizer.step()
    assert snapshot(optimizer) == before


def test_autograd_hears_of_it(backend):
    param = nn.Parameter(torch.ones(9))
    optimizer = pyupdate.optim.AdamW([param], ema_decay=DECAY)
    for turn in range(3):
        param.grad = torch.ones(9)
        before = average_of(optimizer, param)._version if turn else -1
        optimizer.step()
        assert average_of(optimizer, param)._version > before


# ----- switched on, off, saved and loaded ---------------------------------------------------------


@cases
def test_switched_on_in_the_middle_of_training(case: Case, backend):
    rng = np.random.default_rng(63)
    start, *grads = [random_values(rng, 300, torch.float32) for _ in range(5)]
    results = []
    for switched in (False, True):
        param = nn.Parameter(start.clone())
        optimizer = case.ours([param])
        for turn, grad in enumerate(grads):
            if switched and turn == 2:
                pyupdate.accelerate(optimizer, ema_decay=DECAY)
                mean = param.detach().clone()
            param.grad = grad
            optimizer.step()
            if switched and turn >= 2:
                mean = mean + (param.detach() - mean) * torch.tensor(1.0 - DECAY)
                assert_same_bits(average_of(optimizer, param), mean, f"step {turn}")
        results.append(param.detach())
    assert_same_bits(results[1], results[0], "the parameter, with the average or without")
    pyupdate.accelerate(optimizer)
    before = average_of(optimizer, param).clone()
    optimizer.step()
    assert_same_bits(average_of(optimizer, param), before, "an average that nobody asks for")


@every_dtype
@pytest.mark.parametrize("case", [ADAMW, MOMENTUM], ids=str)
def test_a_state_dict_carries_it(case: Case, dtype, backend):
    rng = np.random.default_rng(64)
    start, *grads = [random_values(rng, 300, dtype) for _ in range(5)]
    straight = nn.Parameter(start.clone())
    optimizer: Any = case.ours([straight], ema_decay=DECAY)
    for turn, grad in enumerate(grads):
        if turn == 2:
            other = nn.Parameter(straight.detach().clone())
            loaded: Any = case.ours([other], ema_decay=DECAY)
            loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            assert average_of(loaded, other).dtype is compute_type(dtype)
        straight.grad = grad
        optimizer.step()
        if turn >= 2:
            other.grad = grad
            loaded.step()
    assert_same_bits(other, straight, "parameter")
    assert_same_bits(average_of(loaded, other), average_of(optimizer, straight), "average")


# ----- averaged_weights ---------------------------------------------------------------------------


@pytest.fixture
def trained(backend) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
    model[0].bfloat16()
    pyupdate.build(model, "adamw", ema_decay=DECAY, model_name="net")
    for turn in range(3):
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(turn)).bfloat16()
        loss = model[2](model[1](model[0](x)).float()) ** 2
        pyupdate.update_model(model, loss)
    return model


@pytest.mark.parametrize("of", ["model", "optimizer"])
def test_the_averages_are_in_and_the_bits_come_back(of, trained):
    optimizer: Any = trained.current_optimizer
    before = [param.detach().clone() for param in trained.parameters()]
    objects = [(param, param.data_ptr()) for param in trained.parameters()]
    with pyupdate.averaged_weights(trained if of == "model" else optimizer):
        for param in trained.parameters():
            mean = average_of(optimizer, param)
            assert torch.equal(param, mean.to(param.dtype))
        assert not any(map(torch.equal, trained.parameters(), before))
    for param, value in zip(trained.parameters(), before, strict=True):
        assert_same_bits(param, value, "parameter")
    assert [(param, param.data_ptr()) for param in trained.parameters()] == objects


def test_exceptions_and_writes_inside_are_undone(trained):
    before = [param.detach().clone() for param in trained.parameters()]
    with pytest.raises(KeyError, match="inside"), pyupdate.averaged_weights(trained):
        with torch.no_grad():
            for param in trained.parameters():
                param.fill_(7.0)
        raise KeyError("inside")
    for param, value in zip(trained.parameters(), before, strict=True):
        assert_same_bits(param, value, "parameter")
    with pyupdate.averaged_weights(trained):
        pass


def test_nested_use_and_steps_inside_are_refused(trained):
    optimizer: Any = trained.current_optimizer
    before = [param.detach().clone() for param in trained.parameters()]
    for param in trained.parameters():
        param.grad = torch.ones_like(param)
    with pyupdate.averaged_weights(trained):
        with pytest.raises(RuntimeError, match="in force already"):
            pyupdate.averaged_weights(optimizer).__enter__()
        with pytest.raises(RuntimeError, match=r"leave the block first"):
            optimizer.step()
        loss = trained[2](torch.ones(1, 7))
        with pytest.raises(RuntimeError, match=r"leave the block first"):
            pyupdate.update_model(trained, loss)
    for param, value in zip(trained.parameters(), before, strict=True):
        assert_same_bits(param, value, "parameter")
    optimizer.step()


def test_a_graph_made_outside_is_not_differentiated_inside(trained):
    x = torch.ones(1, 7, requires_grad=True)
    loss = (trained[2](x) ** 2).mean()
    with (
        pyupdate.averaged_weights(trained),
        pytest.raises(RuntimeError, match="modified by an inplace operation"),
    ):
        loss.backward()


def test_tied_weights_and_parameters_never_stepped(backend):
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    unused = nn.Parameter(torch.full((3,), 5.0))
    model = nn.Sequential(first, second)
    model.unused = unused
    pyupdate.build(model, "sgd", ema_decay=DECAY)
    pyupdate.update_model(model, model(torch.ones(2, 4)))
    optimizer: Any = model.current_optimizer
    with pyupdate.averaged_weights(model):
        assert torch.equal(first.weight, average_of(optimizer, first.weight))
        assert second.weight is first.weight
        assert (unused == 5.0).all()


def test_who_keeps_no_averages_says_so(backend):
    model = pyupdate.build(nn.Linear(2, 2), "adamw")
    with pytest.raises(ValueError, match=r"AdamW keeps no averages.*ema_decay"):
        pyupdate.averaged_weights(model).__enter__()
    with pytest.raises(ValueError, match="averaged_weights takes a model"):
        pyupdate.averaged_weights(3).__enter__()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no optimizer"):
        pyupdate.averaged_weights(nn.Linear(2, 2)).__enter__()
    early = pyupdate.build(nn.Linear(2, 2), "adamw", ema_decay=DECAY)
    with pyupdate.averaged_weights(early):
        pass  # no step yet: every average is the parameter


def test_a_deferred_update_of_averages_is_refused(backend):
    model = pyupdate.build(torch.nn.Linear(2, 1), "adamw", ema_decay=0.5)
    pyupdate.update_model(model, model(torch.ones(3, 2)))
    waiting: dict[str, Any] = {}
    refused = pytest.raises(RuntimeError, match="leave the block first")
    with pyupdate.averaged_weights(model), refused:
        pyupdate.update_model(model, model(torch.ones(3, 2)), defer=True, deferred=waiting)
    assert not waiting and model.weight.grad is None


def test_an_average_that_torchs_loading_has_rounded_says_what_to_do(backend):
    param = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = pyupdate.accelerate(torch.optim.AdamW([param]), ema_decay=0.9)
    param.grad = torch.ones_like(param)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    late = torch.optim.AdamW([param])
    late.load_state_dict(saved)
    pyupdate.accelerate(late, ema_decay=0.9)
    before = param.detach().clone()
    with pytest.raises(TypeError, match=r"torch\.bfloat16, but the average .* in torch\.float32"):
        late.step()
    assert torch.equal(param, before)
    early = pyupdate.accelerate(torch.optim.AdamW([param]), ema_decay=0.9)
    early.load_state_dict(saved)
    early.step()
    assert early.state[param]["ema"].dtype is torch.float32
