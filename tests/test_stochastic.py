# SPDX-License-Identifier: Apache-2.0
"""Steps with stochastic rounding: the same bits everywhere, unbiased, and averages do not stall."""

from __future__ import annotations

import copy
import math
from itertools import product

import numpy as np
import pytest
import torch
from bits import (
    array_of,
    assert_same_bits,
    initial_state,
    oracle_steps,
    random_values,
    tensor_of,
    torch_steps,
)
from cases import CASES, DTYPES, FULL, Case, name_of
from test_bitwise import specials
from test_layouts import LAYOUTS, Roles, plain_layout
from test_state_dtype import ADAMW, FP32, STATEFUL, halves, second_moment
from torch import nn
from waiting import Net, assert_same, one_by_one, pending
from ways import optimizer_of, snapshot, ways

import pyupdate
from pyupdate.kernels import oracle
from pyupdate.pytorch.engines import last_step

SEED = 11
SIZES = (0, 1, 7, 33, 1025, 2_048, 2_049, 16_385, 50_001)

every_case = pytest.mark.parametrize("case", CASES, ids=str)
cases = pytest.mark.parametrize("case", FULL, ids=str)
wide_or_not = pytest.mark.parametrize("state_dtype", [None, FP32], ids=["own", "float32"])


# ----- bits ---------------------------------------------------------------------------------------


@pytest.mark.all_pairs
@halves
@wide_or_not
@every_case
def test_the_bits_are_those_of_numpy(case: Case, dtype, state_dtype, isas, threads, compiled):
    """Two groups, in each of which parameters are counted from 0."""
    rng = np.random.default_rng(81)
    steps, first = 3, 4
    start = [random_values(rng, n, dtype) for n in SIZES]
    grads = [[random_values(rng, n, dtype) for n in SIZES] for _ in range(steps)]
    expected = [
        oracle_steps(
            case,
            array_of(values),
            [array_of(row[i]) for row in grads],
            state_dtype=state_dtype,
            chance=(SEED, i if i < first else 1 << 32 | (i - first)),
        )
        for i, values in enumerate(start)
    ]

    def check(what: str) -> None:
        params = [nn.Parameter(values.clone()) for values in start]
        groups = [{"params": params[:first]}, {"params": params[first:]}]
        optimizer = case.ours(groups, state_dtype=state_dtype, stochastic_rounding=True, seed=SEED)
        torch_steps(optimizer, params, grads)
        for param, (value, states) in zip(params, expected, strict=True):
            assert_same_bits(param, value, f"{what}, size {len(param)}")
            for name, state in states.items():
                found = optimizer.state[param][name]
                assert_same_bits(found, state, f"{what}, size {len(param)}, {name}")

    for isa, n in product(isas, threads[:3] if case.full else threads[:1]):
        compiled.use_isa(isa)
        torch.set_num_threads(n)
        check(f"{isa}, {n} threads")
    with pyupdate.use_backend("reference"):
        check("reference")


@pytest.mark.each_value
@halves
@cases
def test_every_layout_draws_in_the_order_of_the_parameters_memory(case: Case, dtype, backend):
    rng = np.random.default_rng(82)
    everything = []
    for name, layout in LAYOUTS.items():
        plain = plain_layout(layout.shape)
        for kind, (of_grad, of_state) in {
            "all": (layout, layout),
            "parameter": (plain, plain),
        }.items():
            n = math.prod(layout.shape)
            values = [random_values(rng, n, dtype).reshape(layout.shape) for _ in range(4)]
            held = Roles(f"{name}/{kind}", layout, of_grad, of_state, values[0], values[1:])
            everything.append((held, layout.order))
    params = [roles.parameter for roles, _ in everything]
    optimizer = optimizer_of("ours", case, params, stochastic_rounding=True, seed=SEED)
    for step in range(3):
        for roles, _ in everything:
            roles.set_grad(step)
        optimizer.step()
        if step == 0:
            for roles, _ in everything:
                roles.move_state(optimizer, case)
    for i, (roles, order) in enumerate(everything):
        flat = [array_of(v.permute(order).reshape(-1)) for v in (roles.initial, *roles.grads)]
        value, states = oracle_steps(case, flat[0], flat[1:], chance=(SEED, i))
        found = roles.parameter.detach().permute(order).reshape(-1)
        assert_same_bits(found, value, roles.name)
        for key in case.rule.state:
            kept = optimizer.state[roles.parameter][key].permute(order).reshape(-1)
            assert_same_bits(kept, states[key], f"{roles.name} {key}")
        for held in (roles.param, *roles.others):
            held.assert_neighbours_untouched(roles.name)


@halves
@cases
def test_special_values_give_the_bits_of_numpy(case: Case, dtype, backend):
    values = specials(dtype)
    n = len(values)
    start = values.repeat_interleave(n)
    grads = [values.repeat(n).roll(shift) for shift in (0, 1, n + 7)]
    expected, states = oracle_steps(
        case, array_of(start), [array_of(grad) for grad in grads], chance=(0, 0)
    )
    param = nn.Parameter(start.clone())
    optimizer = case.ours([param], stochastic_rounding=True)
    torch_steps(optimizer, [param], [[grad] for grad in grads])
    assert_same_bits(param, expected, backend)
    for name, state in states.items():
        assert_same_bits(optimizer.state[param][name], state, f"{backend}, {name}")


def test_fp32_and_fp64_are_rounded_to_nearest(backend):
    rng = np.random.default_rng(83)
    for dtype in DTYPES[:2]:
        values, grad = (random_values(rng, 5_000, dtype) for _ in range(2))
        found = []
        for chance in (False, True):
            param = nn.Parameter(values.clone())
            optimizer = ADAMW.ours([param], stochastic_rounding=chance)
            torch_steps(optimizer, [param], [[grad]] * 3)
            found.append(param)
        assert_same_bits(found[0], array_of(found[1]), name_of(dtype))


# ----- what the draws depend on -------------------------------------------------------------------


def moved(*, seed: int = 0, place: tuple[int, int] = (0, 0), steps: int = 1) -> torch.Tensor:
    """A parameter after steps of half a place each, at a position of a group."""
    group, position = place
    params = [nn.Parameter(torch.ones(4_000, dtype=torch.bfloat16)) for _ in range(4)]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = pyupdate.optim.SGD(groups, lr=2.0**-9, stochastic_rounding=True, seed=seed)
    for _ in range(steps):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    return params[2 * group + position].detach()


def test_a_run_repeats_itself_and_other_seeds_and_places_differ(backend):
    found = moved()
    assert torch.equal(found, moved())
    for other in (moved(seed=1), moved(place=(0, 1)), moved(place=(1, 0)), moved(place=(1, 1))):
        # Of independent draws half are alike, with a deviation of sqrt(4000) / 2 = 32.
        assert abs(int((found == other).sum()) - 2_000) < 5 * 32
    second = moved(steps=2) - found  # one step on, the draws are others
    assert abs(int((second == found - 1.0).sum()) - 2_000) < 5 * 32


@ways
def test_training_goes_on_from_a_checkpoint_with_the_same_bits(way, backend):
    rng = np.random.default_rng(84)
    values = [random_values(rng, n, torch.bfloat16) for n in (3, 700)]
    grads = [[random_values(rng, n, torch.bfloat16) for n in (3, 700)] for _ in range(6)]

    def made(start):
        params = [nn.Parameter(value.clone()) for value in start]
        options = {"stochastic_rounding": True, "seed": 3}
        return params, optimizer_of(way, ADAMW, params, **options)

    params, whole = made(values)
    torch_steps(whole, params, grads)
    first, before = made(values)
    torch_steps(before, first, grads[:3])
    second, after = made([param.detach() for param in first])
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    torch_steps(after, second, grads[3:])
    assert all(map(torch.equal, params, second))


@ways
def test_a_skipped_step_draws_the_same_again(way, backend):
    params = [nn.Parameter(torch.ones(500, dtype=torch.bfloat16)) for _ in range(2)]
    options = {"stochastic_rounding": True, "skip_nonfinite": True}
    first, second = (optimizer_of(way, ADAMW, [param], **options) for param in params)
    good = torch.full((500,), 0.3, dtype=torch.bfloat16)
    torch_steps(first, params[:1], [[good]])
    before = snapshot(first)
    bad = good.clone()
    bad[7] = math.inf
    first.param_groups[0]["params"][0].grad = bad
    first.step()
    params[0].grad = before_grad = good
    assert snapshot(first)[0][2:] == before[0][2:]
    torch_steps(first, params[:1], [[before_grad]])
    torch_steps(second, params[1:], [[good]] * 2)
    assert torch.equal(*params)


def test_a_part_of_the_parameters_draws_as_the_whole_does(backend):
    """Two models on one optimizer, updated one by one, and one update of both by the optimizer."""
    found = []
    for at_once in (True, False):
        torch.manual_seed(0)
        nets = [nn.Linear(30, 20).bfloat16() for _ in range(2)]
        params = [param for net in nets for param in net.parameters()]
        optimizer = pyupdate.optim.AdamW(params, stochastic_rounding=True)
        x = torch.ones(2, 30, dtype=torch.bfloat16)
        for net in nets:
            pyupdate.build(net, optimizer)
        for _ in range(3):
            if at_once:
                sum(net(x).mean() for net in nets).backward()
                optimizer.step()
                optimizer.zero_grad()
            else:
                for net in nets:
                    pyupdate.update_model(net, net(x))
        found.append([param.detach() for param in params])
    assert all(map(torch.equal, *found))


# ----- on average nothing is lost -----------------------------------------------------------------


def test_moves_of_a_part_of_a_place_are_made_on_average(backend):
    """1 - 2^-12 is 1/16 of a place below one: 1/16 of the elements move a place."""
    n = 20_000
    param = nn.Parameter(torch.ones(n, dtype=torch.bfloat16))
    optimizer = pyupdate.optim.SGD([param], lr=2.0**-12, stochastic_rounding=True)
    torch_steps(optimizer, [param], [[torch.ones_like(param)]])
    assert set(param.tolist()) == {1.0, 1.0 - 2.0**-8}
    count = int((param != 1.0).sum())
    assert abs(count - n / 16) < 5 * math.sqrt(n * 1 / 16 * 15 / 16)
    torch_steps(optimizer, [param], [[torch.ones_like(param)]] * 63)
    # Each step adds an error of mean 0 and of variance p (1 - p) places^2, p = 1/16.
    deviation = 2.0**-8 * math.sqrt(64 * 1 / 16 * 15 / 16 / n)
    assert abs(float(param.detach().double().mean()) - (1.0 - 64 * 2.0**-12)) < 5 * deviation


@pytest.mark.slow_reference
def test_a_second_moment_does_not_stall_on_average(backend):
    """As with fp32 state in test_state_dtype.py, where by default it stays at 0.1953."""
    n = 2_000
    param = nn.Parameter(torch.ones(n, dtype=torch.bfloat16))
    optimizer = pyupdate.optim.AdamW([param], stochastic_rounding=True)
    risen, fallen = second_moment(optimizer, param, 2_000)
    right = 1.0 - 0.999**200, (1.0 - 0.999**200) * 0.999**2_000
    # An element's error: 200 steps of at most half a place (2^-11 below 1/4) and variance 1/4; then
    # it shrinks with v, and 2,000 steps that move p places have p (1 - p) each, p <= 1/4 of a place
    # that is v / 128 at most. So its square is below 2,200 / 4 (v / 128)^2 in any case.
    for value, truth in zip((risen, fallen), right, strict=True):
        assert abs(value - truth) < 5 * truth / 128 * math.sqrt(2_200 / 4 / n)
    assert abs(fallen / 0.0245 - 1.0) < 0.2
    assert optimizer.state[param]["exp_avg_sq"].dtype is torch.bfloat16


@halves
def test_state_alone_is_unbiased_too(dtype, backend):
    """b <- 0.999 b from 1: beside the exact value, with the variance of each step added up."""
    n, steps = 5_000, 300
    param = nn.Parameter(torch.zeros(n, dtype=dtype))
    optimizer = pyupdate.optim.SGD(
        [param], lr=0.0, momentum=0.999, stochastic_rounding=True, seed=2
    )
    zeros = torch.zeros_like(param)
    torch_steps(optimizer, [param], [[torch.ones_like(param)], *[[zeros]] * steps])
    found = float(optimizer.state[param]["momentum_buffer"].double().mean())
    place = torch.finfo(dtype).eps / 2  # of values from a half to one
    assert abs(found - float(np.float32(0.999)) ** steps) < 5 * place * math.sqrt(steps / 4 / n)


# ----- beside other options -----------------------------------------------------------------------


@wide_or_not
def test_it_goes_with_a_clipped_scaled_step_and_a_late_gradient(state_dtype, backend):
    rng = np.random.default_rng(85)
    start = [random_values(rng, n, torch.float16) for n in (300, 5_000)]
    params = [nn.Parameter(value.clone()) for value in start]
    optimizer = ADAMW.ours(
        params, max_norm=0.5, state_dtype=state_dtype, stochastic_rounding=True, seed=SEED
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    _, numbers = ADAMW.numbers()
    values = [array_of(value) for value in start]
    states = [initial_state(ADAMW, value, state_dtype) for value in values]
    counts = [0, 0]
    for turn in range(3):
        for i, param in enumerate(params):
            late = i == 0 and turn == 0
            param.grad = None if late else random_values(rng, len(param), torch.float16)
        optimizer.step(grad_scaler=scaler)
        scaler.update(8.0)
        last = last_step(optimizer)
        assert last is not None and last.multiplier < 0.125  # it clips
        for i, param in enumerate(params):
            if param.grad is None:
                continue
            counts[i] += 1
            values[i], states[i] = oracle.step(
                ADAMW.rule,
                values[i],
                array_of(param.grad),
                states[i],
                numbers,
                count=counts[i],
                multiplier=last.multiplier,
                chance=(SEED, i),
            )
    for param, value, state in zip(params, values, states, strict=True):
        assert_same_bits(param, value, backend)
        for key, kept in state.items():
            assert_same_bits(optimizer.state[param][key], kept, key)
        assert torch.isfinite(tensor_of(value)).all()


@ways
def test_with_momentum_the_first_step_draws_as_a_first_one(way, backend):
    """SGD's steps are counted by the plan, from the buffer that is not there yet."""
    rng = np.random.default_rng(86)
    values, *grads = (random_values(rng, 3_000, torch.bfloat16) for _ in range(4))
    param = nn.Parameter(values.clone())
    optimizer = optimizer_of(way, STATEFUL, [param], stochastic_rounding=True)
    torch_steps(optimizer, [param], [[grad] for grad in grads])
    expected, _ = oracle_steps(
        STATEFUL, array_of(values), [array_of(grad) for grad in grads], chance=(0, 0)
    )
    assert_same_bits(param, expected, backend)


@halves
@wide_or_not
def test_an_average_takes_what_was_stored_by_chance(dtype, state_dtype, backend):
    rng = np.random.default_rng(87)
    n, weight = 5_000, 1.0 - 0.9
    start, *grads = (random_values(rng, n, dtype) for _ in range(4))
    flat = nn.Parameter(start.clone())
    strided = nn.Parameter(torch.zeros(n, 2, dtype=dtype)[:, 0])
    with torch.no_grad():
        strided.copy_(start)
    params = [flat, strided]
    optimizer = ADAMW.ours(
        params, ema_decay=0.9, state_dtype=state_dtype, stochastic_rounding=True, seed=SEED
    )
    _, numbers = ADAMW.numbers()
    values = [array_of(start)] * 2
    states = [initial_state(ADAMW, values[0], state_dtype)] * 2
    averages = [oracle.load(values[0])] * 2
    for count, grad in enumerate(grads, start=1):
        torch_steps(optimizer, params, [[grad, grad]])
        for i, param in enumerate(params):
            values[i], states[i] = oracle.step(
                ADAMW.rule,
                values[i],
                array_of(grad),
                states[i],
                numbers,
                count=count,
                chance=(SEED, i),
            )
            averages[i] = oracle.average(averages[i], values[i], weight)
            assert_same_bits(param.detach().contiguous(), values[i], f"{i}, step {count}")
            found = optimizer.state[param]["ema"].contiguous()
            assert_same_bits(found, averages[i], f"average of {i}, step {count}")


def test_models_that_are_drained_together_draw_as_one_by_one(backend):
    """One region for plans of several seeds, of one that rounds to nearest and of a wider rule."""

    def models() -> list[nn.Module]:
        kinds = [("adamw", {"stochastic_rounding": True, "seed": 1}), ("sgd", {})]
        kinds += [("sgd", {"stochastic_rounding": True, "seed": 2})]
        made = [
            pyupdate.build(Net(i, 3_000, torch.bfloat16), kind, model_name=f"net {i}", **options)
            for i, (kind, options) in enumerate(kinds)
        ]
        one_by_one(pending(made, 0))
        return made

    together, truth = models(), models()
    for turn in (1, 2):
        pyupdate.drain(pending(together, turn))
        one_by_one(pending(truth, turn))
        assert_same(together, truth)
