# SPDX-License-Identifier: Apache-2.0
"""Deep models, built twice: one that is updated during backward, and its twin that is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from torch import nn

import pyupdate
from pyupdate import build, update_model

Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda p: pyupdate.optim.AdamW(p, lr=0.01),
    "amsgrad": lambda p: pyupdate.optim.Adam(p, lr=0.01, amsgrad=True, weight_decay=0.1),
    "sgd": lambda p: pyupdate.optim.SGD(p, lr=0.1),
    "momentum": lambda p: pyupdate.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
    "average": lambda p: pyupdate.optim.AdamW(p, lr=0.01, ema_decay=0.9, clip_value=0.001),
    "stock": lambda p: torch.optim.AdamW(p, lr=0.01),
}
optimizers = pytest.mark.parametrize("make", list(OPTIMIZERS.values()), ids=list(OPTIMIZERS))
WIDTH = 192  # a layer has 37,056 elements: two fill a bucket
LAYERS = 6


def mlp(layers: int = LAYERS, width: int = WIDTH, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(layers)]
    return nn.Sequential(*blocks).to(dtype)


def pair(make: Make, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A model that is updated during backward, and its twin that is not."""
    return (
        build(mlp(**options), make, model_name="net", in_backward=True),
        build(mlp(**options), make, model_name="twin"),
    )


def loss_of(model: nn.Module, seed: int, width: int = WIDTH) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(seed)
    return (model(torch.randn(8, width, generator=generator).to(dtype)) - 0.3) ** 2


def update(model: nn.Module, loss: torch.Tensor, **more: Any) -> None:
    update_model(model, loss, retain_graph=False, **more)


def assert_same(model: nn.Module, twin: nn.Module) -> None:
    for (name, param), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_same_bits(param, other, name)
        assert param.grad is None
        assert other.grad is None
        state = model.current_optimizer.state.get(param, {})
        expected = twin.current_optimizer.state.get(other, {})
        assert state.keys() == expected.keys(), name
        for key, value in expected.items():
            assert_same_bits(state[key], value, f"{key} of {name}")
