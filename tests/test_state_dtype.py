# SPDX-License-Identifier: Apache-2.0
"""State in float32 beside parameters in bf16 and fp16: bits, memory, checkpoints, refusals."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from bits import (
    array_of,
    assert_same_bits,
    joined,
    oracle_steps,
    random_values,
    torch_steps,
)
from cases import CASES, DTYPES, FULL, Case, name_of
from test_bitwise import specials
from torch import nn
from ways import optimizer_of, snapshot, ways

import pyupdate
from pyupdate.kernels import oracle
from pyupdate.kernels.reduction import halving_tree
from pyupdate.kernels.rules import multiplier

FP32 = torch.float32
HALVES = (torch.bfloat16, torch.float16)
SIZES = (0, 1, 7, 8, 33, 70, 1025, 16_385, 50_001)

every_case = pytest.mark.parametrize("case", CASES, ids=str)
cases = pytest.mark.parametrize("case", FULL, ids=str)
halves = pytest.mark.parametrize("dtype", HALVES, ids=name_of)

ADAMW = next(case for case in FULL if case.name == "adamw")
STATEFUL = next(case for case in FULL if case.name == "sgd_momentum")


def dtypes_of_state(optimizer: torch.optim.Optimizer) -> set[torch.dtype]:
    return {
        value.dtype
        for inner in optimizer.state.values()
        for key, value in inner.items()
        if key != "step" and value.dim() != 0  # scalars have their own dtype
    }


# ----- bits ---------------------------------------------------------------------------------------


@halves
@every_case
def test_the_bits_are_those_of_numpy(case: Case, dtype, isas, compiled):
    rng = np.random.default_rng(61)
    total, steps = sum(SIZES), 5
    start = random_values(rng, total, dtype)
    grads = [random_values(rng, total, dtype) for _ in range(steps)]
    expected, states = oracle_steps(
        case, array_of(start), [array_of(grad) for grad in grads], state_dtype=FP32
    )

    def check(what: str) -> None:
        params = [nn.Parameter(piece) for piece in start.clone().split(SIZES)]
        optimizer = case.ours(params, state_dtype=FP32)
        torch_steps(optimizer, params, [grad.split(SIZES) for grad in grads])
        assert dtypes_of_state(optimizer) == ({FP32} if case.rule.state else set())
        assert_same_bits(joined(params), expected, what)
        for name in case.rule.state:
            found = joined([optimizer.state[p][name] for p in params])
            assert_same_bits(found, states[name], f"{what}, {name}")
        for name, param in product(case.rule.scalars, params):
            assert_same_bits(optimizer.state[param][name], states[name], f"{what}, {name}")

    for isa in isas:
        compiled.use_isa(isa)
        check(isa)
    with pyupdate.use_backend("reference"):
        check("reference")


@halves
@cases
def test_the_state_is_that_of_an_fp32_step(case: Case, dtype, backend):
    """Beside an fp32 optimizer whose parameter is rounded after every step: no oracle of ours."""
    size, rng = 20_000, np.random.default_rng(62)
    param = nn.Parameter(random_values(rng, size, dtype))
    wide = nn.Parameter(param.detach().float())
    half, full = case.ours([param], state_dtype=FP32), case.ours([wide])
    for count in range(1, 21):
        grad = random_values(rng, size, dtype) * 2.0 ** float(rng.integers(-10, 5))
        torch_steps(half, [param], [[grad]])
        torch_steps(full, [wide], [[grad.float()]])
        assert_same_bits(param, array_of(wide.detach().to(dtype)), f"step {count}")
        with torch.no_grad():
            wide.copy_(param)
        for name in case.rule.state:
            found, truth = half.state[param][name], full.state[wide][name]
            assert_same_bits(found, truth, f"step {count}, {name}")


@halves
@cases
def test_special_values_give_the_bits_of_numpy(case: Case, dtype, backend):
    values = specials(dtype)
    n = len(values)
    start = values.repeat_interleave(n)
    grads = [values.repeat(n).roll(shift) for shift in (0, 1, n + 7, 11)]
    expected, states = oracle_steps(
        case, array_of(start), [array_of(grad) for grad in grads], state_dtype=FP32
    )
    param = nn.Parameter(start.clone())
    optimizer = case.ours([param], state_dtype=FP32)
    torch_steps(optimizer, [param], [[grad] for grad in grads])
    assert_same_bits(param, expected, backend)
    for name, state in states.items():
        assert_same_bits(optimizer.state[param][name], state, f"{backend}, {name}")


@ways
def test_all_six_storages_in_one_clipped_step(way, backend):
    rng = np.random.default_rng(63)
    kinds = [*DTYPES, *HALVES]
    start = [random_values(rng, 3_000 + i, kind) for i, kind in enumerate(kinds)]
    grads = [[random_values(rng, len(v), v.dtype) for v in start] for _ in range(3)]
    params = [nn.Parameter(values.clone()) for values in start]
    optimizer = optimizer_of(way, ADAMW, params, max_norm=1.0, state_dtype=FP32)
    torch_steps(optimizer, params, grads[:1])
    for param in params[2:4]:  # these two go on with state of their own dtype
        inner = optimizer.state[param]
        for key in ADAMW.rule.state:
            inner[key] = inner[key].to(param.dtype)
    torch_steps(optimizer, params, grads[1:])
    clips = [
        multiplier(
            halving_tree([oracle.sum_of_squares(array_of(grad)) for grad in row]) ** 0.5, 1.0, 1.0
        )
        for row in grads
    ]
    _, numbers = ADAMW.numbers()
    for i, (param, values) in enumerate(zip(params, start, strict=True)):
        of_param = [array_of(row[i]) for row in grads]
        value, state = oracle_steps(ADAMW, array_of(values), of_param[:1], clips, FP32)
        if i in (2, 3):
            state = {key: oracle.store(kept, value) for key, kept in state.items()}
        for turn in (1, 2):
            value, state = oracle.step(
                ADAMW.rule,
                value,
                of_param[turn],
                state,
                numbers,
                count=turn + 1,
                multiplier=clips[turn],
            )
        assert_same_bits(param, value, f"{backend}, parameter {i}")
        for key, kept in state.items():
            assert_same_bits(optimizer.state[param][key], kept, f"{backend}, {key} of {i}")


def test_the_storage_of_a_row_follows_its_state_from_step_to_step(backend):
    rng = np.random.default_rng(64)
    values = random_values(rng, 5_000, torch.bfloat16)
    param = nn.Parameter(values.clone())
    optimizer = pyupdate.optim.AdamW([param], **ADAMW.options)
    _, numbers = ADAMW.numbers()
    truth, state = array_of(values), {}
    for count, kind in enumerate((None, FP32, torch.bfloat16, FP32, FP32), start=1):
        grad = random_values(rng, 5_000, torch.bfloat16)
        if kind is not None:
            for key in ADAMW.rule.state:
                optimizer.state[param][key] = optimizer.state[param][key].to(kind)
                wide = oracle.load(state[key])
                state[key] = wide if kind is FP32 else oracle.store(wide, truth)
        torch_steps(optimizer, [param], [[grad]])
        state = state or {key: np.zeros_like(truth) for key in ADAMW.rule.state}
        truth, state = oracle.step(ADAMW.rule, truth, array_of(grad), state, numbers, count=count)
        assert_same_bits(param, truth, f"{backend}, step {count}")
        for key, kept in state.items():
            assert_same_bits(optimizer.state[param][key], kept, f"step {count}, {key}")


# ----- averages that stall, and those that do not -------------------------------------------------


def second_moment(optimizer: torch.optim.Optimizer, param: torch.Tensor, zeros: int) -> list[float]:
    """The mean of v after 200 gradients of ones, and after so many of zeros."""
    found = []
    for count, value in ((200, 1.0), (zeros, 0.0)):
        param.grad = torch.full_like(param, value)
        for _ in range(count):
            optimizer.step()
        found.append(float(optimizer.state[param]["exp_avg_sq"].double().mean()))
    return found


def test_a_second_moment_in_bf16_stalls_as_torchs_does(backend):
    """The fact that the option is for: v <- 0.999 v rounds to v."""
    ours, fused, plain = (nn.Parameter(torch.ones(64, dtype=torch.bfloat16)) for _ in range(3))
    risen, fallen = second_moment(pyupdate.optim.AdamW([ours]), ours, 2_000)
    assert risen == fallen == 0.1953125
    of_torch = second_moment(torch.optim.AdamW([fused], fused=True), fused, 2_000)
    assert of_torch == [risen, fallen]
    # Torch's loop rounds more often, and stalls one place higher.
    risen, fallen = second_moment(torch.optim.AdamW([plain], foreach=False), plain, 2_000)
    assert risen == fallen == 0.1962890625


def test_a_second_moment_in_fp32_does_not_stall(backend):
    param = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    optimizer = pyupdate.optim.AdamW([param], state_dtype=FP32)
    risen, fallen = second_moment(optimizer, param, 2_000)
    assert risen == pytest.approx(1.0 - 0.999**200, rel=1e-5)
    assert fallen == pytest.approx((1.0 - 0.999**200) * 0.999**2_000, rel=1e-4)
    assert abs(fallen / 0.0245 - 1.0) < 0.2


# ----- what it is made for ------------------------------------------------------------------------


@ways
def test_only_halves_are_widened(way, backend):
    params = [nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in DTYPES]
    optimizer = optimizer_of(way, ADAMW, params, state_dtype=FP32)
    torch_steps(optimizer, params, [[torch.ones_like(param) for param in params]])
    for param in params:
        wide = torch.float64 if param.dtype is torch.float64 else FP32
        assert {optimizer.state[param][key].dtype for key in ADAMW.rule.state} == {wide}


def test_new_state_has_the_strides_of_its_parameter(backend):
    param = nn.Parameter(torch.ones(4, 3, dtype=torch.bfloat16).t())
    optimizer = pyupdate.optim.AdamW([param], state_dtype=FP32)
    torch_steps(optimizer, [param], [[torch.ones(3, 4, dtype=torch.bfloat16)]])
    assert optimizer.state[param]["exp_avg"].stride() == param.stride()


def test_build_hands_it_on(backend):
    net = nn.Linear(2, 1).bfloat16()
    pyupdate.build(net, "adamw", state_dtype=FP32)
    pyupdate.update_model(net, net(torch.ones(1, 2, dtype=torch.bfloat16)))
    assert dtypes_of_state(net.current_optimizer) == {FP32}
    stock = torch.optim.SGD(net.parameters(), momentum=0.5)
    pyupdate.build(net, stock, state_dtype=FP32)
    assert type(stock) is pyupdate.optim.SGD
    pyupdate.update_model(net, net(torch.ones(1, 2, dtype=torch.bfloat16)))
    assert dtypes_of_state(stock) == {FP32}


@pytest.mark.parametrize(
    ("value", "error"),
    [("float32", TypeError), (torch.bfloat16, ValueError), (torch.float64, ValueError)],
    ids=str,
)
def test_another_value_is_refused(value, error):
    with pytest.raises(error, match=r"state_dtype must be torch\.float32 or None"):
        pyupdate.optim.AdamW([nn.Parameter(torch.ones(1))], state_dtype=value)


def test_it_does_not_go_with_differentiable():
    param = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="state_dtype cannot be had with differentiable=True"):
        pyupdate.optim.AdamW([param], differentiable=True, state_dtype=FP32)


# ----- memory -------------------------------------------------------------------------------------


def test_fp32_state_that_reaches_into_other_memory_is_refused(backend):
    """Twice as long as its parameter: only intervals of the right item size meet."""
    n = 64
    base = torch.zeros(4 * n, dtype=torch.bfloat16)
    # In bytes: state from 0 to 4n, the other parameter from 2n on, or behind 4n.
    params = [nn.Parameter(torch.ones(n, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = optimizer_of("ours", STATEFUL, params, state_dtype=FP32)
    grads = [[torch.ones(n, dtype=torch.bfloat16)] * 2]
    torch_steps(optimizer, params, grads)
    optimizer.state[params[0]]["momentum_buffer"] = base[: 2 * n].view(FP32)
    params[1].data = base[2 * n : 3 * n]
    torch_steps(optimizer, params, grads)
    params[1].data = base[n : 2 * n]
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="shares memory with"):
        optimizer.step()
    assert snapshot(optimizer) == before


def test_state_that_becomes_wider_in_its_place_is_looked_at_anew(backend):
    n = 64
    base = torch.zeros(4 * n, dtype=torch.bfloat16)
    params = [nn.Parameter(torch.ones(n, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = optimizer_of("ours", STATEFUL, params)
    grads = [[torch.ones(n, dtype=torch.bfloat16)] * 2]
    torch_steps(optimizer, params, grads)
    optimizer.state[params[0]]["momentum_buffer"] = base[:n]
    params[1].data = base[n : 2 * n]
    torch_steps(optimizer, params, grads * 2)
    optimizer.state[params[0]]["momentum_buffer"] = base[: 2 * n].view(FP32)  # the same address
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="shares memory with"):
        optimizer.step()
    assert snapshot(optimizer) == before


# ----- what is refused ----------------------------------------------------------------------------


@ways
@pytest.mark.parametrize("wrong", [torch.float64, torch.float16, torch.int32], ids=name_of)
def test_state_of_a_third_dtype_is_refused(way, wrong, backend):
    params = [nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = optimizer_of(way, ADAMW, params, state_dtype=FP32)
    grads = [[torch.ones_like(param) for param in params]]
    torch_steps(optimizer, params, grads)
    for key in ADAMW.rule.state:
        optimizer.state[params[1]][key] = torch.ones(3).to(wrong)
    before = snapshot(optimizer)
    expected = (
        f"state 'exp_avg' of 'group 0, parameter 1' has dtype {wrong}, but the parameter "
        "torch.bfloat16: convert it to torch.float32, or load a state dict that fits this model"
    )
    with pytest.raises(TypeError) as refused:
        optimizer.step()
    assert str(refused.value) == expected
    assert snapshot(optimizer) == before


@ways
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_state_of_two_dtypes_is_refused(way, key, backend):
    params = [nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = optimizer_of(way, ADAMW, params)
    torch_steps(optimizer, params, [[torch.ones_like(param) for param in params]])
    optimizer.state[params[1]][key] = torch.ones(3)
    before = snapshot(optimizer)
    with pytest.raises(
        TypeError,
        match=r"of 'group 0, parameter 1' have different dtypes .*convert them to one",
    ):
        optimizer.step()
    assert snapshot(optimizer) == before


def test_fp32_state_of_an_fp64_parameter_stays_refused(backend):
    param = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = optimizer_of("ours", STATEFUL, [param], state_dtype=FP32)
    torch_steps(optimizer, [param], [[torch.ones_like(param)]])
    optimizer.state[param]["momentum_buffer"] = torch.ones(3)
    with pytest.raises(
        TypeError, match=r"has dtype torch\.float32, but the parameter torch\.float"
    ):
        optimizer.step()
