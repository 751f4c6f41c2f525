# SPDX-License-Identifier: Apache-2.0
"""Every optimizer with every option beside every other: the bits of `reference` on `cpu`.

Each turn draws an optimizer, numbers, options, shapes, layouts, dtypes and what happens between
steps (a gradient that is missing, one that is infinite, another learning rate). What each part is
in itself, its own file holds to a truth; here only the two back ends are held to each other, where
one's parts meet.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from bits import assert_same_bits, random_values
from torch import nn

import pyupdate
from pyupdate.optim import CLASSES
from pyupdate.options import PARAMETERS
from pyupdate.pytorch.engines import ROWS

TURNS = 8  # of each optimizer
STEPS = 4
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((), (1,), (7, 3), (33, 2), (0,), (2_049,), (16_385,), (130, 150))
OPTIONS: dict[str, tuple[Any, ...]] = {
    "max_norm": (0.5, 1e6),
    "norm_type": (math.inf,),
    "clip_value": (0.05, 3.0),
    "ema_decay": (0.9,),
    "state_dtype": (torch.float32,),
    "skip_nonfinite": (True,),
    "stochastic_rounding": (True,),
}
# Matrix products are outside of the promise of bits.
NAMES = [name for name, kind in CLASSES.items() if ROWS[kind].finish is None]


def drawn(rng: np.random.Generator) -> dict[str, Any]:
    """Options, each there in one turn of two."""
    known = {parameter.name for parameter in PARAMETERS}
    assert OPTIONS.keys() <= known
    return {
        name: values[rng.integers(len(values))]
        for name, values in OPTIONS.items()
        if rng.random() < 0.5
    }


def made(
    rng: np.random.Generator, kind: Any, options: dict[str, Any]
) -> tuple[list[nn.Parameter], Any]:
    params = []
    shapes = [SHAPES[i] for i in rng.integers(len(SHAPES), size=5)]
    for shape in shapes:
        values = random_values(rng, math.prod(shape), DTYPES[rng.integers(len(DTYPES))])
        values = values.reshape(shape)
        if len(shape) == 2 and rng.random() < 0.3:
            values = values.t().contiguous().t()
        params.append(nn.Parameter(values))
    groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.02}]
    return params, kind(groups, lr=0.01, **options)


def set_grads(rng: np.random.Generator, params: list[nn.Parameter], scale: float) -> None:
    for param in params:
        grad = random_values(rng, param.numel(), torch.float64).clamp(-8.0, 8.0) * scale
        param.grad = grad.to(param.dtype).reshape(param.shape)
        if rng.random() < 0.15:
            param.grad = None
    some = [p.grad for p in params if p.grad is not None and p.grad.numel()]
    if some and rng.random() < 0.2:
        some[rng.integers(len(some))].view(-1)[-1] = math.inf


def trained(name: str, turn: int, backend: str) -> tuple[list[nn.Parameter], Any, Any]:
    """The same draws on one back end."""
    rng = np.random.default_rng([turn, *name.encode()])
    options = drawn(rng)
    params, optimizer = made(rng, CLASSES[name], options)
    scaler = None
    if rng.random() < 0.5:
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    lasts = []
    with pyupdate.use_backend(backend):
        for _ in range(STEPS):
            if scaler is None:
                set_grads(rng, params, 1.0)
                optimizer.step()
            else:
                scaler.scale(torch.ones(()))
                set_grads(rng, params, 4.0)
                if any(param.grad is not None for param in params):
                    scaler.step(optimizer)
                    scaler.update()
            lasts.append(pyupdate.last_update(optimizer))
            if rng.random() < 0.3:
                optimizer.param_groups[0]["lr"] = 0.005
            if rng.random() < 0.3:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return params, optimizer, (options, lasts)


@pytest.mark.parametrize(
    "turn", [*range(4), *(pytest.param(n, marks=pytest.mark.slow) for n in range(4, TURNS))]
)
@pytest.mark.parametrize("name", NAMES)
def test_both_back_ends_give_the_same_bits(name, turn, compiled):
    torch.set_num_threads(2)
    ours, optimizer, (options, lasts) = trained(name, turn, "cpu")
    theirs, other, (_, expected) = trained(name, turn, "reference")
    assert lasts == expected or str(lasts) == str(expected), options  # nan is no nan
    for i, (param, twin) in enumerate(zip(ours, theirs, strict=True)):
        what = f"{options}, parameter {i}, {tuple(param.shape)} {param.dtype}"
        assert_same_bits(param.detach().contiguous(), twin.detach().contiguous(), what)
        state, truth = optimizer.state.get(param, {}), other.state.get(twin, {})
        assert list(state) == list(truth), what
        for key, value in state.items():
            assert_same_bits(value.contiguous(), truth[key].contiguous(), f"{what}, {key}")
