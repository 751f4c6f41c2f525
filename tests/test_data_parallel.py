# SPDX-License-Identifier: Apache-2.0
"""Two processes that train one model: with DistributedDataParallel, and sharded by FSDP.

The truth is one process that takes the mean of both losses, by torch's own optimizer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from ranks import answers_of, distributed
from torch import nn

import pyupdate
from pyupdate import update_model

RANKS = 2
STEPS = 3
SCALE = 2.0**10
CLIP = 0.1


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def loss_of(model: nn.Module, rank: int, step: int, part: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + 10 * part + rank)
    x = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    return model(x).square().mean()


def weights(model: nn.Module) -> list[float]:
    return torch.cat([param.detach().flatten() for param in model.parameters()]).tolist()


def optimizer_of(params: Any, **options: Any) -> torch.optim.Optimizer:
    return pyupdate.optim.SGD(params, lr=0.1, momentum=0.9, **options)


def truth(parts: int, *, mean: bool, max_norm: float | None = None) -> list[float]:
    """What every rank must come to: each step on the sum, or mean, of so many micro-batches."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(parts):
            for rank in range(RANKS):
                loss = loss_of(model, rank, step, part) / RANKS
                (loss / parts if mean else loss).backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
    return weights(model)


# ----- what a rank does ---------------------------------------------------------------------------


def accumulate_by_hand(model: Any, rank: int, step: int) -> None:
    with model.no_sync():
        loss_of(model, rank, step, 0).backward()
    update_model(model, loss_of(model, rank, step, 1), retain_graph=False)


def accumulate_in_a_window(model: Any, rank: int, step: int) -> None:
    with model.no_sync():
        update_model(model, loss_of(model, rank, step, 0))
    update_model(model, loss_of(model, rank, step, 1))


def synchronise_all_of_a_window(model: Any, rank: int, step: int) -> None:
    update_model(model, loss_of(model, rank, step, 0))
    update_model(model, loss_of(model, rank, step, 1))


def scale_a_window(model: Any, rank: int, step: int) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=10**6)
    with model.no_sync():
        update_model(model, loss_of(model, rank, step, 0), scaler=scaler)
    update_model(model, loss_of(model, rank, step, 1), scaler=scaler)


def defer_all(model: Any, rank: int, step: int) -> None:
    waiting: dict[str, Any] = {}
    with model.no_sync():
        update_model(model, loss_of(model, rank, step, 0), defer=True, deferred=waiting)
    update_model(model, loss_of(model, rank, step, 1), defer=True, deferred=waiting)
    pyupdate.drain(waiting)


def loop_of_ones_own(model: Any, rank: int, step: int) -> None:
    for part in range(2):
        with model.no_sync() if part == 0 else nullcontext():
            loss_of(model, rank, step, part).backward()
        model.current_optimizer.step()
        model.current_optimizer.zero_grad()


def be_refused_first(model: Any, rank: int, step: int) -> None:
    with model.no_sync():
        loss_of(model, rank, step, 0).backward()
    before = [(param.grad, param.grad.clone()) for param in model.parameters()]
    handle = model.current_optimizer.register_step_pre_hook(_refuse)
    try:
        update_model(model, loss_of(model, rank, step, 1))
    except TypeError:
        pass  # as it should; the values below are looked at
    else:
        raise AssertionError("the hook did not refuse")
    finally:
        handle.remove()
    for param, (grad, value) in zip(model.parameters(), before, strict=True):
        assert param.grad is grad
        assert torch.equal(grad, value)
    update_model(model, loss_of(model, rank, step, 1))


def _refuse(*_: Any) -> None:
    raise TypeError("not today")


WINDOW = {"accumulation_steps": 2}
WAYS: dict[str, tuple[Callable[[Any, int, int], None], dict[str, Any]]] = {
    "by hand": (accumulate_by_hand, {}),
    "window": (accumulate_in_a_window, WINDOW),
    "window, all synchronised": (synchronise_all_of_a_window, WINDOW),
    "window, scaled": (scale_a_window, WINDOW),
    "deferred": (defer_all, {}),
    "own loop": (loop_of_ones_own, WINDOW),
    "refused first": (be_refused_first, {}),
}


def replicate(rank: int, way: str, view: bool) -> list[float]:
    take, options = WAYS[way]
    inner = network()
    model = nn.parallel.DistributedDataParallel(inner, gradient_as_bucket_view=view)
    pyupdate.build(model, lambda params: optimizer_of(params, **options))
    for step in range(STEPS):
        take(model, rank, step)
    return weights(inner)


def shard(kind: str) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        FullyShardedDataParallel,
        MixedPrecision,
        ShardingStrategy,
        fully_shard,
    )

    model = network()
    cpu = torch.device("cpu")
    if kind == "flat":
        return FullyShardedDataParallel(model, device_id=cpu)
    if kind == "whole":
        whole = ShardingStrategy.NO_SHARD
        return FullyShardedDataParallel(model, device_id=cpu, sharding_strategy=whole)
    if kind == "narrow in part":
        precision = MixedPrecision(param_dtype=torch.float32)
        model[2] = FullyShardedDataParallel(model[2], device_id=cpu, mixed_precision=precision)
        return model
    if kind == "original":
        return FullyShardedDataParallel(model, device_id=cpu, use_orig_params=True)
    if kind == "original in part":
        model[2] = FullyShardedDataParallel(model[2], device_id=cpu, use_orig_params=True)
        return model
    fully_shard(
        model[2] if kind == "two in part" else model, mesh=init_device_mesh("cpu", (RANKS,))
    )
    return model


def train_sharded(rank: int, kind: str, how: str) -> list[float] | str:
    """The weights, whole; or what is refused."""
    makes: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "plain": optimizer_of,
        "clipped": lambda params: optimizer_of(params, max_norm=CLIP),
        "judged": lambda params: optimizer_of(params, skip_nonfinite=True),
        "scaled": optimizer_of,
        "layer-wise": lambda params: pyupdate.optim.LAMB(params, lr=0.1),
        "factored": lambda params: pyupdate.optim.Adafactor(params, lr=0.1),
    }
    model: Any = shard(kind)
    pyupdate.build(model, makes[how], model_name="net")
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE) if how == "scaled" else None
    try:
        for step in range(STEPS):
            update_model(model, loss_of(model, rank, step), retain_graph=False, scaler=scaler)
    except ValueError as error:
        return str(error)
    with type(model).summon_full_params(model):
        return weights(model)


STEPPED = [("flat", "plain"), ("whole", "plain"), ("whole", "clipped")]
REPLICATED = [(way, view) for way in WAYS for view in (False, True)]
REFUSED = {
    ("original", "plain"): r"'net' are sharded by .*use_orig_params=True",
    ("original in part", "plain"): r"module '2' of 'net' are sharded by .*use_orig_params",
    ("two", "plain"): "the parameters of 'net' are sharded by fully_shard",
    ("two in part", "plain"): "module '2' of 'net' are sharded by fully_shard",
    ("narrow in part", "plain"): r"module '2' of 'net' are sharded by .*param_dtype=torch.float32",
    ("flat", "clipped"): r"is a shard of .* max_norm=0.1 needs all gradients",
    ("flat", "judged"): r"is a shard of .* skip_nonfinite=True needs all gradients",
    ("flat", "scaled"): r"is a shard of .* a scaler that does not ask the other ranks",
    ("flat", "layer-wise"): "is a shard of .* lamb takes norms of whole parameters",
    ("flat", "factored"): "is a shard of .* Adafactor takes norms of whole parameters",
}


def on_rank(rank: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {key: replicate(rank, *key) for key in REPLICATED}
    return found | {key: train_sharded(rank, *key) for key in [*REFUSED, *STEPPED]}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    return answers_of(on_rank, RANKS, tmp_path_factory.mktemp("ranks"))


# ----- what it comes to ---------------------------------------------------------------------------


@distributed
@pytest.mark.parametrize("key", REPLICATED, ids=str)
def test_gradients_that_were_there_are_reduced_too(key: tuple[str, bool], ranks: dict[int, Any]):
    expected = truth(2, mean=bool(WAYS[key[0]][1]))
    assert ranks[0][key] == ranks[1][key]
    assert ranks[0][key] == pytest.approx(expected, rel=1e-11, abs=1e-13)


@distributed
@pytest.mark.parametrize("key", STEPPED, ids=str)
def test_flat_parameters_are_stepped(key: tuple[str, str], ranks: dict[int, Any]):
    expected = truth(1, mean=False, max_norm=CLIP if key[1] == "clipped" else None)
    for rank in range(RANKS):
        assert ranks[rank][key] == pytest.approx(expected, rel=1e-11, abs=1e-13)


@distributed
@pytest.mark.parametrize("key", REFUSED, ids=str)
def test_what_a_rank_cannot_judge_is_refused(key: tuple[str, str], ranks: dict[int, Any]):
    for rank in range(RANKS):
        assert isinstance(ranks[rank][key], str), "it was trained"
        assert re.search(REFUSED[key], ranks[rank][key])


def test_a_hook_on_a_gradient_sees_what_was_there_before():
    model = network()
    pyupdate.build(model, optimizer_of)
    seen: list[torch.Tensor] = []
    handles = [
        param.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        for param in model.parameters()
    ]
    loss_of(model, 0, 0, 0).backward()
    seen.clear()
    update_model(model, loss_of(model, 0, 0, 1))
    for handle in handles:
        handle.remove()
    twin = network()
    (loss_of(twin, 0, 0, 0) + loss_of(twin, 0, 0, 1)).backward()
    for param, value in zip(reversed(list(twin.parameters())), seen, strict=True):
        torch.testing.assert_close(value, param.grad, rtol=1e-12, atol=1e-15)
