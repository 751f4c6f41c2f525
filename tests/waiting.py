# SPDX-License-Identifier: Apache-2.0
"""Models with deferred updates, and what it means that two ways to drain them agree."""

from __future__ import annotations

from typing import Any

import torch
from bits import assert_same_bits
from torch import nn

import pyupdate
from pyupdate import build, update_model

Deferred = dict[str, list[Any]]


class Net(nn.Module):
    """Parameters of odd sizes, one of them strided and one empty, and a loss of them."""

    strided = True
    """Kernels of a GPU know no strides, and leave such a parameter to `reference`."""

    def __init__(self, seed: int, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in (("a", (size,)), ("b", (7, 5)), ("c", ()), ("d", (0, 3))):
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))
        if self.strided:
            self.b = nn.Parameter(torch.randn(5, 14, generator=generator).to(dtype).t()[::2])

    def loss(self, turn: int, weight: float = 1.0) -> torch.Tensor:
        terms = [((p.float() - turn) ** 2 * (i + 1)).sum() for i, p in enumerate(self.parameters())]
        return sum(terms, torch.zeros(())) * weight


def pending(models: list[nn.Module], turn: int = 1) -> Deferred:
    deferred: Deferred = {}
    for model in models:
        update_model(model, model.loss(turn), defer=True, deferred=deferred)
    return deferred


def settled(count: int) -> list[nn.Module]:
    """Models that have made a first step."""
    models = [
        build(Net(i, 50, torch.float32), "adamw", model_name=f"net {i}") for i in range(count)
    ]
    one_by_one(pending(models, 0))
    return models


def one_by_one(deferred: Deferred) -> None:
    for updates in deferred.values():
        for update in updates:
            update()
    deferred.clear()


def assert_same(models: list[nn.Module], truths: list[nn.Module]) -> None:
    for model, truth in zip(models, truths, strict=True):
        for (name, param), other in zip(model.named_parameters(), truth.parameters(), strict=True):
            said = f"{name} of {model.model_name}"
            assert_same_bits(param, other, said)
            assert param.grad is None
            state = model.current_optimizer.state.get(param, {})
            expected = truth.current_optimizer.state.get(other, {})
            assert state.keys() == expected.keys(), said
            for key, value in expected.items():
                assert_same_bits(state[key], value, f"{key} of {said}")
        # As text: the norm of a skipped step may be nan.
        assert repr(pyupdate.last_update(model)) == repr(pyupdate.last_update(truth))
