# SPDX-License-Identifier: Apache-2.0
"""Models, optimizers and the independent truth of the front end's tests: torch's own plain loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import pyupdate
from pyupdate.backends import available

LR = 0.05


@dataclass(frozen=True)
class Case:
    """An optimizer under test on a back end, and the torch optimizer that is its truth."""

    make: Callable[[Any], torch.optim.Optimizer]
    truth: Callable[[Any], torch.optim.Optimizer]
    backend: str | None
    planned: bool

    def on_backend(self) -> Any:
        return nullcontext() if self.backend is None else pyupdate.use_backend(self.backend)

    def model(self, seed: int = 0, name: str | None = "net") -> nn.Module:
        """A small network with this optimizer."""
        model = network(seed)
        model.current_optimizer = self.make(model.parameters())
        if name is not None:
            model.model_name = name
        return model

    def twin(self, model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
        """A copy of the model's weights, with the truth's optimizer."""
        twin = network()
        twin.load_state_dict(model.state_dict())
        return twin, self.truth(twin.parameters())


def _adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=LR, foreach=False)


def _stock_adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=LR)


def _our_adamw(params: Any) -> torch.optim.Optimizer:
    return pyupdate.optim.AdamW(params, lr=LR)


def _momentum(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=LR, momentum=0.9, foreach=False)


def _our_momentum(params: Any) -> torch.optim.Optimizer:
    return pyupdate.optim.SGD(params, lr=LR, momentum=0.9)


class Unplanned(torch.optim.Adagrad):
    """A user's own class, which steps itself."""


def _unplanned(params: Any) -> torch.optim.Optimizer:
    return Unplanned(params, lr=LR, foreach=False)


def _cases() -> list[Any]:
    cases = [pytest.param(Case(_unplanned, _unplanned, None, False), id="adagrad-torch")]
    kinds = {"stock": (_stock_adamw, _adamw), "ours": (_our_adamw, _adamw)}
    kinds["momentum"] = (_our_momentum, _momentum)
    reasons = dict(available())
    for backend in ("cpu", "reference"):
        reason = reasons[backend]
        marks = [pytest.mark.skip(reason=f"{backend}: {reason}")] if reason else []
        for kind, (make, truth) in kinds.items():
            case = Case(make, truth, backend, True)
            cases.append(pytest.param(case, id=f"{kind}-{backend}", marks=marks))
    return cases


CASES = _cases()


def network(seed: int = 0) -> nn.Module:
    """Two linear layers in fp64, so that a wrong term cannot hide in rounding."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def batch(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(6, 5, generator=generator, dtype=torch.float64)


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    """A loss of shape (6, 3), unlike in every element."""
    return (model(batch(seed)) - 0.3) ** 2


def plain_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *seeds: int,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Torch's own loop: one step on the gradients of the mean losses, summed."""
    for seed in seeds:
        loss = loss_of(model, seed).mean()
        (loss if scaler is None else scaler.scale(loss)).backward()
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
    optimizer.zero_grad()


def assert_same(model: nn.Module, truth: nn.Module, optimizer: Any = None) -> None:
    """Parameters (and optimizer state) agree to the last digits of fp64."""
    for (name, param), other in zip(model.named_parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(
            param, other, rtol=1e-12, atol=1e-14, msg=lambda text, name=name: f"{name}: {text}"
        )
    if optimizer is None:
        return
    ours = model.current_optimizer
    for param, other in zip(model.parameters(), truth.parameters(), strict=True):
        assert ours.state[param].keys() == optimizer.state[other].keys()
        for key, value in optimizer.state[other].items():
            torch.testing.assert_close(ours.state[param][key], value, rtol=1e-12, atol=1e-14)


def everything(*models: nn.Module) -> Any:
    """All that a failure must leave as it was, deeply copied: compare with `assert_untouched`."""
    return [
        (
            [param.detach().clone() for param in model.parameters()],
            [(param.grad, _clone(param.grad)) for param in model.parameters()],
            copy.deepcopy(model.current_optimizer.state_dict()),
        )
        for model in models
    ]


def assert_untouched(before: Any, *models: nn.Module) -> None:
    """Nothing differs from `everything`, to the bit; `.grad` are the very same tensors."""
    for (params, grads, state), model in zip(before, models, strict=True):
        for param, old in zip(model.parameters(), params, strict=True):
            assert torch.equal(param, old)
        for param, (grad, value) in zip(model.parameters(), grads, strict=True):
            assert param.grad is grad
            assert grad is None or torch.equal(grad, value)
        torch.testing.assert_close(
            model.current_optimizer.state_dict(), state, rtol=0, atol=0, equal_nan=True
        )


def _clone(value: torch.Tensor | None) -> torch.Tensor | None:
    return None if value is None else value.clone()


def scaler_of(scale: float = 2.0**10, **options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, **options)
