# SPDX-License-Identifier: Apache-2.0
"""Training loops under ``torch.compile``: split around the update, with the bits of a loop without.

Dynamo's back end "eager" runs what it captured as it is, so that forward and backward passes give
the same bits, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from torch import nn

import pyupdate
from pyupdate import drain, update_model

# Dynamo looks at every tensor of a frame that it resumes behind a graph break.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

STEPS = 4
KINDS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": pyupdate.optim.AdamW,
    "SGD": lambda params: pyupdate.optim.SGD(params, lr=0.1, momentum=0.9, max_norm=0.5),
    "average": lambda params: pyupdate.optim.Adam(params, lr=0.1, ema_decay=0.5),
    "window": lambda params: pyupdate.optim.Adam(params, lr=0.1, accumulation_steps=2),
    "LAMB": pyupdate.optim.LAMB,
    "ScheduleFreeAdamW": pyupdate.optim.ScheduleFreeAdamW,
    "Adafactor": pyupdate.optim.Adafactor,
    "accelerated": lambda params: pyupdate.accelerate(torch.optim.NAdam(params, lr=0.1)),
    "stock": lambda params: torch.optim.AdamW(params, lr=0.1, foreach=False),
}
WAYS = ("step", "update_model", "scaler.step", "update_model with a scaler", "drain")


@pytest.fixture(autouse=True)
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step_of(way: str, model: nn.Module, optimizer: Any) -> Callable[[torch.Tensor], Any]:
    """A user's train step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if "scaler" in way else None

    def train_step(x: torch.Tensor) -> torch.Tensor:
        loss = model(x).square().mean()
        if way.startswith("update_model"):
            update_model(model, loss, scaler=scaler)
        elif way == "drain":
            waiting: dict[str, Any] = {}
            update_model(model, loss, defer=True, deferred=waiting)
            drain(waiting)
        elif scaler is not None:
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
        else:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if scaler is not None:
            scaler.update()
        return loss

    return train_step


def trained(kind: str, way: str, *, compiled: bool) -> list[torch.Tensor]:
    """Parameters and their state after some steps."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    optimizer = model.current_optimizer = KINDS[kind](model.parameters())
    model.model_name = "net"
    train_step: Any = step_of(way, model, optimizer)
    if compiled:
        train_step = torch.compile(train_step, backend="eager")
    for seed in range(STEPS):
        train_step(torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)))
    state = [v for p in model.parameters() for v in optimizer.state[p].values()]
    return [*model.parameters(), *(v for v in state if isinstance(v, torch.Tensor))]


def assert_same(kind: str, way: str) -> None:
    plain, compiled = (trained(kind, way, compiled=flag) for flag in (False, True))
    assert len(plain) == len(compiled) >= 4
    for ours, theirs in zip(compiled, plain, strict=True):
        assert_same_bits(ours, theirs.detach().numpy(), f"{kind}, {way}")


EACH = [("step", kind) for kind in KINDS if kind != "stock"]  # whose step is torch's
EACH += [("update_model", kind) for kind in ("AdamW", "accelerated", "stock")]


@pytest.mark.slow_reference
@pytest.mark.parametrize(("way", "kind"), EACH)
def test_a_compiled_loop_has_the_bits_of_a_plain_one(way, kind, backend):
    assert_same(kind, way)


@pytest.mark.slow_reference
@pytest.mark.parametrize("kind", ["AdamW", "window"])
@pytest.mark.parametrize("way", WAYS[2:])
def test_so_has_one_with_a_scaler_or_a_deferred_dict(way, kind, backend):
    assert_same(kind, way)


@pytest.mark.slow_reference
def test_nothing_of_a_step_is_captured(backend):
    """Also with many optimizers through one compiled function: each would be compiled anew."""
    captured: list[str] = []

    def counting(graph: Any, _: Any) -> Any:
        captured.append(graph.code)
        return graph.forward

    @torch.compile(backend=counting)
    def step(optimizer: Any) -> None:
        optimizer.step()

    for index in range(12):
        param = nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        kind = (pyupdate.optim.AdamW, pyupdate.optim.SGD)[index % 2]
        step(kind([param], lr=0.5))
        assert param.tolist() != [1.0, 1.0, 1.0]
    assert not captured


def test_a_demand_for_one_graph_is_refused_with_what_to_do(backend):
    param = nn.Parameter(torch.ones(3))
    optimizer = pyupdate.optim.AdamW([param])
    param.grad = torch.ones(3)
    whole = torch.compile(lambda: optimizer.step(), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile with fullgraph=False"):
        whole()
    assert param.tolist() == [1.0, 1.0, 1.0]
