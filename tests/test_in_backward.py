# SPDX-License-Identifier: Apache-2.0
"""`build(..., in_backward=True)`: the ordinary run's bits, a small part of its gradients.

The truth is the same model, built without, on the same back end.
"""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
from deep import LAYERS, OPTIMIZERS, WIDTH, assert_same, loss_of, mlp, optimizers, pair, update
from torch import nn

import pyupdate
from pyupdate import build, update_model
from pyupdate.pytorch.engines import engine_of

# ----- results ------------------------------------------------------------------------------------


@optimizers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_bits_of_the_ordinary_run(make, dtype, backend):
    model, twin = pair(make, dtype=dtype)
    for seed in range(3):
        for each in (model, twin):
            update(each, loss_of(each, seed))
        assert_same(model, twin)
    assert len(engine_of(model.current_optimizer).plans) == LAYERS // 2


def test_groups_schedulers_step_hooks_and_counts(backend):
    def make(params):
        return pyupdate.optim.AdamW(
            [{"params": params[::2], "lr": 0.1}, {"params": params[1::2], "weight_decay": 0.3}]
        )

    model, twin = pair(make)
    calls: list[str] = []
    schedulers = []
    for each in (model, twin):
        optimizer = each.current_optimizer
        schedulers.append(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
        optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a scheduler that is stepped before its optimizer warns
        for seed in range(3):
            for each, scheduler in zip((model, twin), schedulers, strict=True):
                update(each, loss_of(each, seed))
                scheduler.step()
                assert calls == ["pre", "post"]
                calls.clear()
            assert_same(model, twin)
    counts = {float(state["step"]) for state in model.current_optimizer.state.values()}
    assert counts == {3.0}
    assert pyupdate.last_update(model) == pyupdate.last_update(twin)
    assert not pyupdate.last_update(model).skipped


def test_the_users_own_gradients_are_part_of_the_step(backend):
    model, twin = pair(OPTIMIZERS["momentum"])
    for each in (model, twin):
        loss_of(each, 7).mean().backward()
        # Of a parameter that the loss below does not reach, too.
        each.late = nn.Parameter(torch.ones(3))
        each.late.grad = torch.full((3,), 2.0)
        each.current_optimizer.add_param_group({"params": [each.late]})
        update(each, loss_of(nn.Sequential(*list(each)[:LAYERS]), 0))
    assert_same(model, twin)
    assert torch.equal(model.late, torch.full((3,), 0.8))


def test_what_is_frozen_unreached_or_not_held(backend):
    def make(params):
        return pyupdate.optim.AdamW(params[2:], lr=0.1)

    model, twin = pair(make)
    before = [param.detach().clone() for param in model.parameters()]
    for each in (model, twin):
        each[1][0].bias.requires_grad_(False)
        each.unused = nn.Linear(2, 2)
        each.current_optimizer.add_param_group({"params": list(each.unused.parameters())})
        for seed in range(2):
            update(each, loss_of(nn.Sequential(*list(each)[:LAYERS]), seed))
    twin.unused.load_state_dict(model.unused.state_dict())  # they began with other numbers
    assert_same(model, twin)
    params = list(model.parameters())
    assert all(torch.equal(params[i], before[i]) for i in (0, 1, 3))
    assert not any(param in model.current_optimizer.state for param in model.unused.parameters())


def test_gradients_that_arrive_in_another_order_than_was_learnt(backend):
    class Switched(nn.Module):
        """Its blocks do not depend on one another: the order is that of the call."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks = mlp(16)
            self.order = list(range(16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for index in self.order:
                x = self.blocks[index](x)
            return x

    model = build(Switched(), OPTIMIZERS["adamw"], in_backward=True)
    twin = build(Switched(), OPTIMIZERS["adamw"])
    seen = Waiting(model)
    apart = [*range(0, 16, 2), *range(1, 16, 2)]  # the first of every bucket, then the second
    for seed, order in enumerate(([*range(16)], [*range(15, -1, -1)], apart, [2])):
        for each in (model, twin):
            each.order = order
            update(each, loss_of(each, seed))
        assert_same(model, twin)
    layer = sum(param.nbytes for param in model.blocks[0].parameters())
    assert seen.most <= 4 * layer  # not nine: twice a bucket, and the one that came


# ----- memory -------------------------------------------------------------------------------------


class Waiting:
    """The largest sum of the bytes of `.grad` that hooks of autograd see."""

    def __init__(self, model: nn.Module) -> None:
        self.most = 0
        self._params = list(model.parameters())
        for param in self._params:
            param.register_post_accumulate_grad_hook(self._look)

    def _look(self, _: torch.Tensor) -> None:
        grads = [param.grad for param in self._params if param.grad is not None]
        self.most = max(self.most, sum(grad.nbytes for grad in grads))


def test_peak_gradient_memory_is_below_a_fifth(backend):
    model, twin = pair(OPTIMIZERS["sgd"], layers=24, width=256)
    ours, ordinary = Waiting(model), Waiting(twin)
    for seed in range(2):  # while the order is learnt, and afterwards
        ours.most = 0
        for each in (model, twin):
            update(each, loss_of(each, seed, 256))
        assert 0 < ours.most < 0.2 * ordinary.most
        assert ordinary.most == sum(param.nbytes for param in twin.parameters())
    assert_same(model, twin)


def test_tiny_tensors_share_plans(backend):
    model = nn.Module()
    model.items = nn.ParameterList([nn.Parameter(torch.ones(16)) for _ in range(300)])
    build(model, "sgd", in_backward=True)
    for _ in range(2):
        update(model, sum(param.sum() for param in model.items))
    assert len(engine_of(model.current_optimizer).plans) == 1


def test_more_buckets_than_plans_are_kept_otherwise(backend):
    model = build(mlp(12, 256), "sgd", in_backward=True)
    optimizer = model.current_optimizer
    update(model, loss_of(model, 0, 256))
    update(model, loss_of(model, 1, 256))
    before = dict(engine_of(optimizer).plans)
    assert len(before) > 8 or len(before) == 12
    update(model, loss_of(model, 2, 256))
    assert engine_of(optimizer).plans == before  # none was made anew


def test_the_model_can_be_collected(backend):
    model = build(mlp(2), "adamw", in_backward=True)
    update(model, loss_of(model, 0))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


# ----- what is kept, and for how long -------------------------------------------------------------


def test_copies_keep_it_and_building_again_ends_it(backend):
    model, twin = pair(OPTIMIZERS["adamw"])
    model, twin = copy.deepcopy(model), copy.deepcopy(twin)
    for each in (model, twin):
        update(each, loss_of(each, 0))
    assert_same(model, twin)
    assert len(engine_of(model.current_optimizer).plans) > 1
    with pytest.raises(ValueError, match="retain_graph=False"):
        update_model(model, loss_of(model, 1))
    build(model, model.current_optimizer)
    for each in (model, twin):
        update_model(each, loss_of(each, 1))
    assert_same(model, twin)
    assert "update_in_backward" not in vars(twin)  # which was never asked for


def test_the_users_own_backward_is_left_alone(backend):
    model = build(mlp(2), "adamw", in_backward=True)
    update(model, loss_of(model, 0))
    before = [param.detach().clone() for param in model.parameters()]
    loss_of(model, 1).mean().backward()
    assert all(map(torch.equal, model.parameters(), before))
    assert all(param.grad is not None for param in model.parameters())


def test_deferred_updates_of_other_models_wait(backend):
    model, twin = pair(OPTIMIZERS["adamw"])
    other = build(nn.Linear(WIDTH, 1), "sgd", model_name="other")
    start = other.weight.detach().clone()
    deferred: dict = {}
    x = torch.ones(4, WIDTH)
    score = other(model(x))
    update_model(other, score, defer=True, deferred=deferred)
    update(model, -score, deferred=deferred)
    assert list(deferred) == ["other"]
    assert torch.equal(other.weight, start)
    update(twin, -other(twin(x)))
    assert_same(model, twin)
