# SPDX-License-Identifier: Apache-2.0
"""ScheduleFree AdamW: by hand, by its formula in fp64, on every back end, and its two modes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from bits import array_of, assert_same_bits, random_values, torch_steps
from cases import DTYPES, name_of
from torch import nn

import pyupdate
from pyupdate.kernels import oracle
from pyupdate.kernels.rules import RULES
from pyupdate.pytorch.rows import numbers_of

RULE = RULES["schedulefree_adamw"]
OPTIONS: tuple[dict[str, Any], ...] = (
    {"lr": 0.125},
    {"lr": 0.125, "weight_decay": 0.1, "warmup_steps": 4},
    {"lr": 0.125, "r": 1.0, "weight_lr_power": 1.0, "betas": (0.75, 0.9375)},
)
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)
STEPS = 6


def formula(y: Any, grads: Sequence[Any], **options: Any) -> dict[str, Any]:
    """The paper's three sequences x, y and z, of which the optimizer keeps two."""
    numbers = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "warmup_steps": 0}
    numbers |= {"r": 0.0, "weight_lr_power": 2.0, **options}
    b1, b2 = numbers["betas"]
    x, z, v = y, y, np.zeros_like(y)
    total = largest = 0.0
    for t, g in enumerate(grads, 1):
        lr = numbers["lr"] * min(1.0, t / numbers["warmup_steps"] if numbers["warmup_steps"] else 1)
        v = b2 * v + (1 - b2) * g**2
        move = g / (np.sqrt(v / (1 - b2**t)) + numbers["eps"]) + numbers["weight_decay"] * y
        largest = max(largest, lr)
        weight = t ** numbers["r"] * largest ** numbers["weight_lr_power"]
        total += weight
        z = z - lr * move
        x = x + weight / total * (z - x)
        y = b1 * x + (1 - b1) * z
    return {"param": y, "z": z, "exp_avg_sq": v, "x": x, "weight_sum": total, "lr_max": largest}


def made(params: Any, **options: Any) -> Any:
    return pyupdate.optim.ScheduleFreeAdamW(params, **options)


def test_a_step_worked_out_by_hand(backend):
    # v = 0.25 * 4, of which the corrected root is 2: d = 2 / (2 + 2) = 0.5; c = 1, so y <- z - ...
    # y <- 1 + 1 (1 - 1) - 0.5 (1 - 0.5 (1 - 1)) 0.5 = 0.75 and z <- 1 - 0.5 * 0.5 = 0.75
    # second, g = 0: d = 0, c = 1/2: y <- 0.75, z stays
    # third, g = 0 again, after z was put to 1.75: c = 1/3: y <- 0.75 + 1/3
    param = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = made([param], lr=0.5, betas=(0.5, 0.75), eps=2.0)
    for grad, after in ((2.0, 0.75), (0.0, 0.75)):
        param.grad = torch.full_like(param, grad)
        optimizer.step()
        assert param.tolist() == [after] * 2
        assert optimizer.state[param]["z"].tolist() == [0.75] * 2
    optimizer.state[param]["z"].fill_(1.75)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert param.tolist() == pytest.approx([0.75 + 1 / 3] * 2, rel=1e-7)  # weights are kept in fp32


@every_option
def test_the_papers_formula_in_fp64(options, backend):
    rng = np.random.default_rng(91)
    start = rng.standard_normal(5_000)
    grads = [rng.standard_normal(5_000) for _ in range(STEPS)]
    torch.set_default_dtype(torch.float64)
    try:
        param = nn.Parameter(torch.tensor(start))
        optimizer = made([param], **options)
        torch_steps(optimizer, [param], [[torch.tensor(grad)] for grad in grads])
        truth = formula(start, grads, **options)
        found = {"param": param.detach(), **optimizer.state[param]}
        for name in found.keys() - {"step"}:
            np.testing.assert_allclose(
                found[name].numpy(), truth[name], rtol=1e-12, atol=1e-13, err_msg=name
            )
        optimizer.eval()
        np.testing.assert_allclose(param.detach().numpy(), truth["x"], rtol=1e-11, atol=1e-12)
        optimizer.train()
        np.testing.assert_allclose(param.detach().numpy(), truth["param"], rtol=1e-11, atol=1e-12)
    finally:
        torch.set_default_dtype(torch.float32)


@every_option
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_the_bits_of_numpy(options, dtype, backend):
    rng = np.random.default_rng(92)
    sizes = (0, 1, 31, 2_049, 16_385)
    start = [random_values(rng, n, dtype) for n in sizes]
    grads = [[random_values(rng, n, dtype) for n in sizes] for _ in range(STEPS)]
    params = [nn.Parameter(value.clone()) for value in start]
    optimizer = made(params, **options)
    torch_steps(optimizer, params, grads)
    sign, *numbers = numbers_of(RULE, optimizer.param_groups[0])
    for i, param in enumerate(params):
        value = array_of(start[i].clone())
        state = {"z": value.copy(), "exp_avg_sq": oracle.store(oracle.load(value) * 0, value)}
        state |= {name: np.asarray(0.0, np.float32) for name in RULE.scalars}
        for count, row in enumerate(grads, 1):
            value, state = oracle.step(
                RULE, value, array_of(row[i]), state, numbers, count=count, multiplier=sign
            )
        assert_same_bits(param, value, f"size {sizes[i]}")
        for name, expected in state.items():
            assert_same_bits(optimizer.state[param][name], expected, f"size {sizes[i]}, {name}")


def test_a_step_in_evaluation_mode_is_refused(backend):
    model = pyupdate.build(nn.Linear(3, 2), "schedulefreeadamw")
    optimizer: Any = model.current_optimizer
    pyupdate.update_model(model, model(torch.ones(4, 3)))
    optimizer.eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"evaluation mode.*optimizer\.train\(\)"):
        pyupdate.update_model(model, model(torch.ones(4, 3)))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    optimizer.train()
    pyupdate.update_model(model, model(torch.ones(4, 3)))
    assert any(not torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_a_change_of_mode_is_refused_while_averages_are_in_the_model(backend):
    param = nn.Parameter(torch.ones(2))
    optimizer = made([param], ema_decay=0.5)
    param.grad = torch.ones(2)
    optimizer.step()
    with pyupdate.averaged_weights(optimizer), pytest.raises(RuntimeError, match="leave the block"):
        optimizer.eval()
    assert optimizer.param_groups[0]["train_mode"]


def test_both_modes_are_kept_in_a_state_dict(backend):
    params = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))]
    first, second = made(params[:1], lr=0.5), made(params[1:], lr=0.5)
    params[0].grad = torch.arange(4.0)
    first.step()
    first.eval()
    with torch.no_grad():
        params[1].copy_(params[0])
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # torch shares tensors otherwise
    with pytest.raises(RuntimeError, match="evaluation mode"):
        second.step()
    for optimizer, param in zip((first, second), params, strict=True):
        optimizer.train()
        param.grad = torch.ones(4)
        optimizer.step()
    assert torch.equal(*params)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lr": -1.0}, "lr must be at least 0"),
        ({"betas": (0.0, 0.9)}, r"betas\[0\] must be above 0"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be at least 0 and less than 1"),
        ({"warmup_steps": float("nan")}, "warmup_steps must be at least 0"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        made([nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"betas": ("0.9", 0.9)}, ValueError, "'betas' of parameter group 1 is"),
        ({"betas": (0.0, 0.9)}, ValueError, "'betas' of parameter group 1 is"),
        ({"betas": None}, ValueError, "'betas' of parameter group 1 is None"),
        ({"z": torch.zeros(5)}, ValueError, r"state 'z' of 'group 1, parameter 0' is \(5,\)"),
        ({"z": 3.0}, ValueError, "state 'z' of 'group 1, parameter 0' is 3.0"),
        ({"state": 3}, TypeError, "state of 'group 1, parameter 0' is a int, not a dict"),
    ],
    ids=str,
)
def test_a_mode_changes_for_all_groups_or_for_none(mode, change, error, says):
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = made([{"params": [param]} for param in params], lr=0.25)
    for _ in range(2):
        for param in params:
            param.grad = torch.tensor([1.0, -2.0, 0.5])
        optimizer.step()
    if mode == "train":
        optimizer.eval()
    before = [param.detach().clone() for param in params]
    right = optimizer.param_groups[1]["betas"], optimizer.state[params[1]]
    if "betas" in change:
        optimizer.param_groups[1] |= change
    else:
        optimizer.state[params[1]] = change.get("state", {**right[1], **change})
    with pytest.raises(error, match=says):
        getattr(optimizer, mode)()
    assert all(map(torch.equal, params, before))
    assert [group["train_mode"] for group in optimizer.param_groups] == [mode == "eval"] * 2
    optimizer.param_groups[1]["betas"], optimizer.state[params[1]] = right
    getattr(optimizer, mode)()
    assert torch.equal(params[0], params[1])
    assert not torch.equal(params[0], before[0])
