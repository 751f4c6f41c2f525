# SPDX-License-Identifier: Apache-2.0
"""Scalers that find inf and nan in a way of their own, as ``ShardedGradScaler`` does over ranks.

The truth is torch's own ``scaler.step`` around ``torch.optim``'s ``foreach=False`` loop, and what
every rank must come to: the same skip and the same scale.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from ranks import answers_of, distributed
from torch import nn

import pyupdate
from pyupdate import drain, last_update, update_model
from pyupdate.pytorch.engines import engine_of

SCALE = 2.0**7
RANKS = 2
WAYS = ("scaler.step", "update_model", "drain", "window")
KINDS = ("ours", "accelerated", "stock", "subclass")


class OwnUnscale(torch.amp.GradScaler):
    """It must be called, and finds a 13 bad that is neither inf nor nan."""

    calls = 0

    def unscale_(self, optimizer):
        self.calls += 1
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        bad = any(bool((g == 13.0 * SCALE).any()) for g in grads if g is not None)
        super().unscale_(optimizer)
        if bad:
            self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = {
                torch.device("cpu"): torch.ones(())
            }


class OwnGrads(torch.amp.GradScaler):
    calls = 0

    def _unscale_grads_(self, *args: Any):
        self.calls += 1
        return super()._unscale_grads_(*args)


class OwnDecision(torch.amp.GradScaler):
    calls = 0

    def unscale_(self, optimizer):
        self.calls += 1
        super().unscale_(optimizer)

    def _maybe_opt_step(self, optimizer, state, *args: Any, **kwargs: Any):
        return super()._maybe_opt_step(optimizer, state, *args, **kwargs)


class OwnStep(pyupdate.optim.AdamW):
    """A user's class, whose step takes no scaler."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        return super().step(closure)


class OwnStepAgain(OwnStep):
    def step(self, *args: Any, **kwargs: Any):
        return super().step(*args, **kwargs)


class EverySecond(pyupdate.optim.AdamW):
    calls = 0

    def step(self, closure=None):
        self.calls += 1
        return super().step(closure) if self.calls % 2 == 0 else None


SCALERS = [OwnUnscale, OwnGrads, OwnDecision]


def optimizer_of(kind: str, params: Any, **options: Any) -> torch.optim.Optimizer:
    if kind == "ours":
        return pyupdate.optim.AdamW(params, lr=0.1, **options)
    if kind == "subclass":
        return OwnStepAgain(params, lr=0.1, **options)
    stock = torch.optim.AdamW(params, lr=0.1, foreach=False)
    return pyupdate.accelerate(stock, **options) if kind == "accelerated" else stock


def model_of(kind: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    model.current_optimizer = optimizer_of(kind, model.parameters(), **options)
    model.model_name = "net"
    return model


def loss_of(model: nn.Module, seed: int, factor: float = 1.0) -> torch.Tensor:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    return model(x).square().mean() * factor


def iterate(model: nn.Module, scaler: Any, way: str, seed: int, factor: float) -> None:
    """One iteration, whose ``scaler.update()`` is the caller's."""
    if way == "update_model":
        update_model(model, loss_of(model, seed, factor), scaler=scaler)
    elif way == "drain":
        waiting: dict = {}
        loss = loss_of(model, seed, factor)
        update_model(model, loss, scaler=scaler, defer=True, deferred=waiting)
        drain(waiting)
    else:
        scaler.scale(loss_of(model, seed, factor)).backward()
        scaler.step(model.current_optimizer)
        if way == "scaler.step":
            model.zero_grad()
        else:
            model.current_optimizer.zero_grad()


@pytest.mark.all_pairs
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS[:3])
@pytest.mark.parametrize("make", SCALERS)
def test_its_own_check_runs_once_a_step_and_decides(make, way, kind, backend):
    model, truth = model_of(kind), model_of("stock")
    scaler = make("cpu", init_scale=SCALE, growth_interval=2)
    plain = make("cpu", init_scale=SCALE, growth_interval=2)
    for seed in range(6):
        factor = float("inf") if seed == 3 else 1.0
        before = scaler.calls
        iterate(model, scaler, way, seed, factor)
        assert scaler.calls == before + 1
        scaler.update()
        plain.scale(loss_of(truth, seed, factor)).backward()
        plain.step(truth.current_optimizer)
        plain.update()
        truth.zero_grad()
        assert scaler.get_scale() == plain.get_scale()
        if way != "scaler.step":
            assert last_update(model).skipped is (seed == 3)
        for ours, theirs in zip(model.parameters(), truth.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_what_only_it_finds_bad_is_skipped(kind, backend):
    param = nn.Parameter(torch.ones(3))
    optimizer = optimizer_of(kind, [param])
    scaler = OwnUnscale("cpu", init_scale=SCALE)
    scaler.scale((param * torch.tensor([1.0, 13.0, 2.0])).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert param.tolist() == [1.0, 1.0, 1.0]
    assert scaler.get_scale() == SCALE / 2


@pytest.mark.parametrize("way", WAYS[:3])
def test_a_clip_is_of_the_unscaled_gradients(way, backend):
    """With the bits of a step without a scaler: the scale is a power of two."""
    model, truth = model_of("ours", max_norm=0.01), model_of("ours", max_norm=0.01)
    scaler = OwnUnscale("cpu", init_scale=SCALE)
    for seed in range(3):
        iterate(model, scaler, way, seed, 1.0)
        scaler.update()
        update_model(truth, loss_of(truth, seed))
        assert float(last_update(model).norm or 0.0) == float(last_update(truth).norm or 0.0)
    for ours, theirs in zip(model.parameters(), truth.parameters(), strict=True):
        assert_same_bits(ours, theirs, way)


@pytest.mark.parametrize("defer", [False, True])
def test_a_refused_step_leaves_gradients_and_scaler(defer, backend):
    """The gradient that was there already, of a parameter that the loss does not reach, too."""
    model = model_of("ours")
    model.bias.grad = torch.full((2,), SCALE)
    kept = model.bias.grad
    optimizer: Any = model.current_optimizer
    optimizer.state[model.weight]["step"] = torch.tensor(1.0)
    optimizer.state[model.weight]["exp_avg"] = torch.zeros(5)  # of another shape
    optimizer.state[model.weight]["exp_avg_sq"] = torch.zeros(2, 3)
    scaler = OwnUnscale("cpu", init_scale=SCALE)
    waiting: dict = {}
    loss = model.weight.sum()
    if defer:
        update_model(model, loss, scaler=scaler, defer=True, deferred=waiting)
    with pytest.raises(ValueError, match="exp_avg"):
        drain(waiting) if defer else update_model(model, loss, scaler=scaler)
    assert model.bias.grad is kept
    assert kept.tolist() == [SCALE, SCALE]
    assert (model.weight.grad is not None) is defer
    optimizer.state.clear()
    drain(waiting) if defer else update_model(model, loss, scaler=scaler)
    assert model.bias.grad is None
    scaler.update()
    assert scaler.get_scale() == SCALE


def test_other_models_of_the_optimizer_keep_their_scaled_gradients(backend):
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = pyupdate.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)
    first.current_optimizer = optimizer
    scaler = OwnUnscale("cpu", init_scale=SCALE)
    scaler.scale(second.weight.sum()).backward()
    update_model(first, loss_of(first, 0), scaler=scaler)
    assert (second.weight.grad == SCALE).all()


def test_no_gradients_are_no_step_and_no_failure(backend):
    optimizer = pyupdate.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    scaler = OwnUnscale("cpu", init_scale=SCALE)
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == SCALE


# ----- a user's class -------------------------------------------------------------------------


@pytest.mark.parametrize("make", [torch.amp.GradScaler, *SCALERS])
def test_a_step_of_ones_own_has_the_bits_of_ours(make, backend):
    models = [model_of(kind, max_norm=0.01) for kind in ("subclass", "ours")]
    for seed in range(4):
        for model in models:
            scaler = make("cpu", init_scale=SCALE)
            iterate(model, scaler, "scaler.step", seed, float("inf") if seed == 2 else 1.0)
            scaler.update()
        first, second = (last_update(model) for model in models)
        assert first is not None and repr(first) == repr(second)  # a norm may be nan
        assert first.skipped is (seed == 2)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_same_bits(one, other, "a step of one's own")
    assert models[0].current_optimizer.steps == 4


def test_torchs_own_pass_does_not_run_for_a_step_of_ones_own(backend, monkeypatch):
    model = model_of("subclass")
    passes: list[Any] = []
    monkeypatch.setattr(
        torch.amp.GradScaler, "_unscale_grads_", lambda *args: passes.append(args) or {}
    )
    iterate(model, torch.amp.GradScaler("cpu", init_scale=SCALE), "scaler.step", 0, 1.0)
    assert not passes
    assert engine_of(model.current_optimizer).handed is None


def test_a_step_that_is_left_out_is_no_failure_with_torchs_scaler(backend):
    param = nn.Parameter(torch.ones(2))
    optimizer = EverySecond([param], lr=0.1)
    for factor, scale in ((1.0, SCALE), (1.0, SCALE), (float("inf"), SCALE / 2)):
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        optimizer.zero_grad()
        scaler.scale((param * factor).sum()).backward()
        before = param.tolist()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale
        assert (param.tolist() != before) is (optimizer.calls == 2)


def test_a_step_that_is_left_out_is_refused_where_ranks_could_part(backend):
    param = nn.Parameter(torch.ones(2))
    optimizer = EverySecond([param], lr=0.1)
    scaler = OwnUnscale("cpu", init_scale=SCALE)
    scaler.scale(param.sum()).backward()
    with pytest.raises(RuntimeError, match=r"EverySecond did not call super\(\).step\(\)"):
        scaler.step(optimizer)
    assert engine_of(optimizer).handed is None
    assert param.tolist() == [1.0, 1.0]


# ----- two processes ------------------------------------------------------------------------------

TOGETHER = [
    (way, kind, clip, backend)
    for backend in (None, "reference")
    for way in WAYS
    for kind in KINDS
    for clip in (None, 0.5)
    if kind != "stock" or (way != "window" and clip is None)  # torch's own has neither option
]


def on_rank(rank: int) -> dict[Any, Any]:
    """Everything that two ranks do together: for each (way, kind) what one of them comes to."""
    return {key: ranks_agree(rank, *key) for key in TOGETHER}


def ranks_agree(rank: int, way: str, kind: str, clip: float | None, backend: str | None) -> Any:
    """Iterations with an inf on rank 0 only, on rank 1 only, on both, on none."""
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    length = 2 if way == "window" else 1
    options: dict[str, Any] = {} if clip is None else {"max_norm": clip}
    if length > 1:
        options["accumulation_steps"] = length
    model = model_of(kind, **options)
    scaler = ShardedGradScaler("cpu", init_scale=SCALE)
    moved = []
    with nullcontext() if backend is None else pyupdate.use_backend(backend):
        for seed, bad in enumerate([(), (0,), (1,), (0, 1), ()]):
            before = model.weight.detach().clone()
            for part in range(length):
                last = part == length - 1
                factor = float("inf") if rank in bad and last else 1.0
                iterate(model, scaler, way, 10 * seed + part, factor)
                scaler.update()
            moved.append((not torch.equal(before, model.weight), scaler.get_scale()))
    return moved


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return answers_of(on_rank, RANKS, tmp_path_factory.mktemp("ranks"))


@distributed
@pytest.mark.parametrize("key", TOGETHER, ids=str)
def test_ranks_agree_to_skip(key, ranks):
    skips = [(False, SCALE / 2), (False, SCALE / 4), (False, SCALE / 8)]
    expected = [(True, SCALE), *skips, (True, SCALE / 8)]
    assert ranks[0][key] == expected
    assert ranks[1][key] == expected
