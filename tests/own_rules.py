# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RET504 - a rule returns the names that it assigned
"""Rules as users write them, for the tests of `pyupdate.rule` and `from_rule`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bits import random_values, torch_steps

import pyupdate
from pyupdate.language import (
    absolute,
    divide,
    integer_power,
    maximum,
    minimum,
    sign,
    sqrt,
    where,
)
from pyupdate.optim import from_rule

SIZES = (1, 7, 2_049, 16_385)
STEPS = 3


@pyupdate.rule
def descent(param, grad, lr):
    param = param - lr * grad
    return param


@pyupdate.rule(state={"exp_avg": 0.0}, defaults={"beta": 0.75})
def signum(param, grad, exp_avg, lr, beta, weight_decay):
    exp_avg = exp_avg * beta + grad * (1.0 - beta)
    param = param - lr * (sign(exp_avg) + weight_decay * param)
    return param, exp_avg


@pyupdate.rule(state={"largest": 0.25, "fast": 0.0})
def everything(param, grad, largest, fast, lr, low, high, step):
    """Every word of the language, and the step."""
    largest = maximum(largest, absolute(grad))
    fast = where(fast * grad < 0.0, 0.0, fast + sqrt(largest))
    scale = minimum(maximum(divide(fast, step + 1.0), low), high)
    for _ in range(2):
        scale = scale * 0.5 + largest
    param = param - lr * sign(grad) * scale
    return param, largest, fast


def prepare_corrected(step, lr, beta):
    one_minus_beta = 1.0 - beta
    correction = divide(1.0, 1.0 - integer_power(beta, step))
    return lr, beta, one_minus_beta, correction


def norms(param, grad, exp_avg, beta, one_minus_beta):
    exp_avg = exp_avg * beta + grad * one_minus_beta
    kept = param * param
    moved = exp_avg * exp_avg
    return exp_avg, kept, moved


@pyupdate.rule(state={"exp_avg": 0.0}, prepare=prepare_corrected, after=(norms,))
def layer_wise(param, exp_avg, kept, moved, lr, correction):
    trust = where(moved > 0.0, divide(sqrt(kept), sqrt(moved)), 1.0)
    param = param - lr * trust * exp_avg * correction
    return param


NUMBERS = {
    descent: {"lr": 0.3},
    signum: {"lr": 0.01, "beta": 0.8, "weight_decay": 0.1},
    everything: {"lr": 0.1, "low": 0.05, "high": 2.0},
    layer_wise: {"lr": 0.1, "beta": 0.9},
}

every_rule = pytest.mark.parametrize("rule", NUMBERS, ids=lambda rule: rule.name)


def values(seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    rng = np.random.default_rng(seed)
    return [random_values(rng, n, dtype) for n in SIZES]


def stepped(rule, dtype=torch.float32, steps=STEPS, **more):
    """An optimizer after some steps, and its parameters."""
    params = [torch.nn.Parameter(value) for value in values(1, dtype)]
    optimizer = from_rule(rule)(params, **NUMBERS[rule], **more)
    torch_steps(optimizer, params, [values(seed, dtype) for seed in range(2, 2 + steps)])
    return optimizer, params
