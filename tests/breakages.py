# SPDX-License-Identifier: Apache-2.0
"""Ways to break a parameter, its gradient or its state, how it is refused, how undone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from cases import Case
from torch import nn
from ways import optimizer_of

import pyupdate


class Net(nn.Module):
    """Parameters with qualified names; the last one is broken, so that others come before it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)


def grads_of(net: nn.Module, step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(p.shape, generator=generator) for p in net.parameters()]


def set_grads(net: nn.Module, step: int) -> None:
    for param, grad in zip(net.parameters(), grads_of(net, step), strict=True):
        param.grad = grad


def built(way: str, case: Case, max_norm: float | None) -> tuple[Net, torch.optim.Optimizer]:
    net = Net()
    optimizer = optimizer_of(way, case, net.parameters(), max_norm=max_norm)
    pyupdate.build(net, optimizer, model_name="net")
    return net, optimizer


Undo = Callable[[], None]
Break = Callable[[Net, torch.optim.Optimizer], Undo]


@dataclass(frozen=True)
class Breakage:
    """How to break something, and what the refusal must say."""

    name: str
    breaks: Break
    error: type[Exception]
    says: tuple[str, ...]
    needs_state: bool = False

    def __str__(self) -> str:
        return self.name


def param_data(make: Callable[[Net], torch.Tensor]) -> Break:
    def breaks(net: Net, optimizer: torch.optim.Optimizer) -> Undo:
        weight, before = net.head.weight, net.head.weight.data
        weight.data = make(net)

        def undo() -> None:
            weight.data = before

        return undo

    return breaks


def gradient(make: Callable[[Net, torch.optim.Optimizer], torch.Tensor]) -> Break:
    def breaks(net: Net, optimizer: torch.optim.Optimizer) -> Undo:
        weight, before = net.head.weight, net.head.weight.grad
        weight.grad = make(net, optimizer)

        def undo() -> None:
            weight.grad = before

        return undo

    return breaks


def state(key: str, make: Callable[[torch.Tensor, Net], Any]) -> Break:
    def breaks(net: Net, optimizer: torch.optim.Optimizer) -> Undo:
        inner = optimizer.state[net.head.weight]
        before = inner[key]
        inner[key] = make(before, net)
        if inner[key] is KeyError:
            del inner[key]

        def undo() -> None:
            inner[key] = before

        return undo

    return breaks


def twice(net: Net, optimizer: torch.optim.Optimizer) -> Undo:
    params = optimizer.param_groups[0]["params"]
    params.append(net.head.weight)

    def undo() -> None:
        del params[-1]

    return undo


def halves(net: Net, first: int, second: int) -> None:
    """Head and body weight as parts of one memory that meet by 16 - (second - first) elements."""
    base = torch.zeros(40)
    net.body.weight.data = base[first : first + 16].view(4, 4)
    net.head.weight.data = base[second : second + 16].view(4, 4)


def overlap_by_one(net: Net, optimizer: torch.optim.Optimizer) -> Undo:
    before = net.body.weight.data, net.head.weight.data
    halves(net, 3, 18)

    def undo() -> None:
        net.body.weight.data, net.head.weight.data = before

    return undo


def shared_state(net: Net, optimizer: torch.optim.Optimizer) -> Undo:
    inner = optimizer.state[net.head.weight]
    before = inner["exp_avg"]
    inner["exp_avg"] = optimizer.state[net.body.weight]["exp_avg"].detach()

    def undo() -> None:
        inner["exp_avg"] = before

    return undo


HEAD = "'head.weight'"
BODY = "'body.weight'"
OWN = "give each its own (tie weights by one Parameter, not by two)"
FITS = "load a state dict that fits"

BREAKAGES = [
    Breakage(
        "expanded",
        param_data(lambda net: torch.ones(4, 1).expand(4, 4)),
        ValueError,
        (f"parameter {HEAD} is expanded or overlaps itself", ".clone()"),
    ),
    Breakage(
        "overlaps-itself",
        param_data(lambda net: torch.ones(7).as_strided((4, 4), (1, 1))),
        ValueError,
        (f"parameter {HEAD} is expanded or overlaps itself", ".clone()"),
    ),
    Breakage(
        "same-memory",
        param_data(lambda net: net.body.weight.data),
        ValueError,
        (HEAD, BODY, "shares memory with", OWN),
    ),
    Breakage(
        "same-memory-transposed",
        param_data(lambda net: net.body.weight.data.t()),
        ValueError,
        (HEAD, BODY, "shares memory with", OWN),
    ),
    Breakage(
        "one-element-shared", overlap_by_one, ValueError, (HEAD, BODY, "shares memory with", OWN)
    ),
    Breakage("twice", twice, ValueError, (f"parameter {HEAD} stands", "twice", "leave one out")),
    Breakage(
        "gradient-is-the-parameter",
        gradient(lambda net, _: net.head.weight.detach()),
        ValueError,
        (f"the gradient of {HEAD} lies in the memory of parameter {HEAD}", OWN),
    ),
    Breakage(
        "gradient-is-its-parameter-transposed",
        gradient(lambda net, _: net.head.weight.detach().t()),
        ValueError,
        (f"the gradient of {HEAD} lies in the memory of parameter {HEAD}", OWN),
    ),
    Breakage(
        "gradient-is-another-parameter",
        gradient(lambda net, _: net.body.weight.detach()),
        ValueError,
        (f"the gradient of {HEAD} lies in the memory of parameter {BODY}", OWN),
    ),
    Breakage(
        "gradient-is-a-part-of-another-parameter",
        gradient(lambda net, _: net.body.weight.detach()[1, 1].expand(4, 4)),
        ValueError,
        (f"the gradient of {HEAD} lies in the memory of parameter {BODY}", OWN),
    ),
    Breakage(
        "gradient-is-its-state",
        gradient(lambda net, optimizer: optimizer.state[net.head.weight]["exp_avg"]),
        ValueError,
        (f"the gradient of {HEAD} lies in the memory of state 'exp_avg' of {HEAD}", OWN),
        needs_state=True,
    ),
    Breakage(
        "gradient-is-another's-state",
        gradient(lambda net, optimizer: optimizer.state[net.body.weight]["exp_avg_sq"]),
        ValueError,
        (f"the gradient of {HEAD} lies in the memory of state 'exp_avg_sq' of {BODY}", OWN),
        needs_state=True,
    ),
    Breakage(
        "sparse-gradient",
        gradient(lambda net, _: torch.eye(4).to_sparse()),
        TypeError,
        (f"the gradient of {HEAD} is sparse", "sparse=False", "torch.optim.SparseAdam"),
    ),
    Breakage(
        "gradient-of-another-dtype",
        param_data(lambda net: net.head.weight.data.double()),
        TypeError,
        (f"the gradient of {HEAD} has dtype torch.float32", "torch.float64", "set .grad"),
    ),
    Breakage(
        "gradient-of-another-shape",
        param_data(lambda net: torch.ones(2, 8)),
        ValueError,
        (f"the gradient of {HEAD} has shape (4, 4)", "(2, 8)", "set .grad"),
    ),
    Breakage(
        "gradient-of-another-size",
        param_data(lambda net: torch.ones(3)),
        ValueError,
        (f"the gradient of {HEAD} has shape (4, 4)", "(3,)", "set .grad"),
    ),
    Breakage(
        "became-complex",
        param_data(lambda net: torch.ones(4, 4, dtype=torch.complex64)),
        TypeError,
        (f"parameter {HEAD} is complex", "torch.view_as_real"),
    ),
    Breakage(
        "became-float8",
        param_data(lambda net: torch.ones(4, 4).to(torch.float8_e5m2)),
        TypeError,
        (f"parameter {HEAD} has dtype torch.float8_e5m2", "accepted are"),
    ),
    Breakage(
        "state-of-another-dtype",
        state("exp_avg", lambda value, _: value.double()),
        TypeError,
        (f"state 'exp_avg' of {HEAD} has dtype torch.float64", "torch.float32", FITS),
        needs_state=True,
    ),
    Breakage(
        "state-of-another-shape",
        state("exp_avg_sq", lambda value, _: value.reshape(2, 8)),
        ValueError,
        (f"state 'exp_avg_sq' of {HEAD} has shape (2, 8)", "(4, 4)", FITS),
        needs_state=True,
    ),
    Breakage(
        "state-on-another-device",
        state("exp_avg", lambda value, _: value.to("meta")),
        TypeError,
        (f"state 'exp_avg' of {HEAD} is on the meta device",),
        needs_state=True,
    ),
    Breakage(
        "state-is-no-tensor",
        state("exp_avg", lambda value, _: value.tolist()),
        TypeError,
        (f"state 'exp_avg' of {HEAD} is list, not a tensor", FITS),
        needs_state=True,
    ),
    Breakage(
        "state-is-sparse",
        state("exp_avg", lambda value, _: value.to_sparse()),
        TypeError,
        (f"state 'exp_avg' of {HEAD} is sparse",),
        needs_state=True,
    ),
    Breakage(
        "state-is-expanded",
        state("exp_avg", lambda value, _: torch.zeros(1).expand(4, 4)),
        ValueError,
        (f"state 'exp_avg' of {HEAD} is expanded", ".clone()"),
        needs_state=True,
    ),
    Breakage(
        "state-is-another's",
        shared_state,
        ValueError,
        (HEAD, BODY, "state 'exp_avg'", "shares memory with"),
        needs_state=True,
    ),
    Breakage(
        "state-is-the-parameter",
        state("exp_avg", lambda _, net: net.head.weight.detach()),
        ValueError,
        (f"state 'exp_avg' of {HEAD}", f"parameter {HEAD}", "shares memory with"),
        needs_state=True,
    ),
    Breakage(
        "state-is-missing",
        state("exp_avg_sq", lambda value, _: KeyError),
        ValueError,
        (f"state of {HEAD} lacks ['exp_avg_sq']", "load a state dict", "delete"),
        needs_state=True,
    ),
    Breakage(
        "state-is-none",
        state("exp_avg", lambda value, _: None),
        ValueError,
        (f"state of {HEAD} lacks ['exp_avg']", "load a state dict", "delete"),
        needs_state=True,
    ),
    Breakage(
        "step-is-missing",
        state("step", lambda value, _: KeyError),
        ValueError,
        (f"state of {HEAD} lacks ['step']", "load a state dict", "delete"),
        needs_state=True,
    ),
    *(
        Breakage(
            f"step-is-{count}",
            state("step", lambda value, _, count=count: torch.tensor(count)),
            ValueError,
            (f"state 'step' of {HEAD} must be a whole number from 0 on",),
            needs_state=True,
        )
        for count in (float("nan"), -1.0, 1.5, float("inf"), -float("inf"), 2.0**54)
    ),
    Breakage(
        "step-is-two-numbers",
        state("step", lambda value, _: torch.tensor([1.0, 1.0])),
        ValueError,
        (f"state 'step' of {HEAD} must hold one number", "(2,)"),
        needs_state=True,
    ),
    Breakage(
        "step-is-an-integer-tensor",
        state("step", lambda value, _: torch.tensor(1)),
        TypeError,
        (f"state 'step' of {HEAD} must be a tensor of float32 or float64", "torch.int64"),
        needs_state=True,
    ),
    Breakage(
        "step-is-words",
        state("step", lambda value, _: "one"),
        TypeError,
        (f"state 'step' of {HEAD} must be a tensor of float32 or float64", "str"),
        needs_state=True,
    ),
]
