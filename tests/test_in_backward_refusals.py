# SPDX-License-Identifier: Apache-2.0
"""`build(..., in_backward=True)`: what fails, what it leaves, and what is refused."""

from __future__ import annotations

import pytest
import torch
from bits import assert_same_bits
from deep import LAYERS, OPTIMIZERS, WIDTH, assert_same, loss_of, mlp, pair, update
from torch import nn

import pyupdate
from pyupdate import build, update_model

# ----- failures -----------------------------------------------------------------------------------


def test_a_backward_that_raises_leaves_stepped_what_was_stepped(backend):
    model, twin = pair(OPTIMIZERS["adamw"])
    for each in (model, twin):
        update(each, loss_of(each, 0))
    before = [param.detach().clone() for param in model.parameters()]
    users = torch.ones(WIDTH)
    first, third = model[0][0].bias, model[2][0].weight
    first.grad = users
    for each in (model, twin):
        each[LAYERS - 1][0].bias.grad = torch.ones(WIDTH)  # which is stepped with the rest

    def refuse(_):
        raise TypeError("in the middle")

    handle = third.register_hook(refuse)
    with pytest.raises(TypeError, match="in the middle"):
        update(model, loss_of(model, 1))
    handle.remove()
    assert first.grad is users
    assert torch.equal(users, torch.ones(WIDTH))
    update(twin, loss_of(twin, 1))
    names = [name for name, _ in model.named_parameters()]
    stepped = []
    for name, param, old, other in zip(
        names, model.parameters(), before, twin.parameters(), strict=True
    ):
        assert param is first or param.grad is None
        same_as_before = torch.equal(param, old)
        stepped.append(not same_as_before)
        if not same_as_before:
            assert_same_bits(param, other, name)
        state = model.current_optimizer.state[param]
        assert float(state["step"]) == (1.0 if same_as_before else 2.0)
    assert stepped == [False] * 8 + [True] * 4  # the last bucket alone, of two layers
    update(model, loss_of(model, 2))  # and it goes on
    assert all(param.grad is None for param in model.parameters())


def test_what_is_refused_before_anything_changes(backend):
    model = build(mlp(2), "adamw", in_backward=True)
    users = [torch.ones_like(param) for param in model.parameters()]
    for param, grad in zip(model.parameters(), users, strict=True):
        param.grad = grad
    before = [param.detach().clone() for param in model.parameters()]
    calls: list[str] = []
    model.current_optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    scaler = torch.amp.GradScaler("cpu")
    for more, words in (
        ({}, r"'.*'.*retain_graph=True \(the default\).*Give retain_graph=False"),
        ({"retain_graph": False, "scaler": scaler}, "a scaler.*Give scaler=None"),
        ({"retain_graph": False, "defer": True, "deferred": {}}, "defer=True"),
    ):
        with pytest.raises(ValueError, match=words):
            update_model(model, loss_of(model, 0), **more)
    with pytest.raises(ValueError, match="does not require gradients"):
        update(model, torch.ones(3))
    assert not calls
    with pytest.raises(ValueError, match="reaches none of its parameters"):
        update(model, torch.ones(3, requires_grad=True) * 2.0)
    for param, old, grad in zip(model.parameters(), before, users, strict=True):
        assert torch.equal(param, old)
        assert param.grad is grad
        assert torch.equal(grad, torch.ones_like(grad))
    assert not model.current_optimizer.state
    off = torch.amp.GradScaler("cpu", enabled=False)
    update(model, loss_of(model, 0), scaler=off)
    assert model.current_optimizer.state


NEEDS_ALL = {"max_norm": 1.0, "skip_nonfinite": True, "accumulation_steps": 2}


@pytest.mark.parametrize("option", list(NEEDS_ALL))
def test_options_that_need_all_gradients(option, backend):
    value = NEEDS_ALL[option]
    model = mlp(2)
    words = f"in_backward=True cannot be had with {option}={value!r}.*leave one of them out"
    with pytest.raises(ValueError, match=words):
        build(model, lambda p: pyupdate.optim.AdamW(p, **{option: value}), in_backward=True)
    assert not hasattr(model, "current_optimizer")
    build(model, "adamw", in_backward=True)
    model.current_optimizer = pyupdate.optim.AdamW(model.parameters(), **{option: value})
    with pytest.raises(ValueError, match=words):
        update(model, loss_of(model, 0))


def test_optimizers_without_a_rule():
    model = mlp(2)
    words = "in_backward=True needs an optimizer of pyupdate.optim.*is a LBFGS"
    with pytest.raises(TypeError, match=words):
        build(model, torch.optim.LBFGS, in_backward=True)
    assert not hasattr(model, "current_optimizer")


def test_tied_weights():
    model = mlp(3)
    model[2][0].weight = model[0][0].weight
    words = r"tied weights: '0\.0\.weight' and '2\.0\.weight' of '.*' are the same parameter"
    with pytest.raises(ValueError, match=words):
        build(model, "adamw", in_backward=True)
    model = build(mlp(3), "adamw", in_backward=True)
    model[2][0].weight = model[0][0].weight  # only afterwards
    with pytest.raises(ValueError, match=words):
        update(model, loss_of(model, 0))


def test_wrappers_that_reduce_over_processes():
    class DistributedDataParallel(nn.Module):  # torch's needs a process group
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    with pytest.raises(ValueError, match="DistributedDataParallel reduces gradients over"):
        build(DistributedDataParallel(mlp(2)), "adamw", in_backward=True)


class Reentrant(torch.autograd.Function):
    """Differentiates a function of its own in its backward, as a reentrant checkpoint does."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x)
        ctx.weight = weight
        return x * weight.detach()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            (x.detach() * ctx.weight).backward(grad)
        return grad * ctx.weight.detach(), None


def test_a_parameter_that_gets_its_gradient_twice(backend):
    model = nn.Linear(4, 4)
    model.gain = nn.Parameter(torch.ones(4))
    build(model, "sgd", model_name="net", in_backward=True)
    before = model.gain.detach().clone()
    out = Reentrant.apply(Reentrant.apply(model(torch.ones(2, 4)), model.gain), model.gain)
    with pytest.raises(RuntimeError, match="parameter 'gain' of 'net' got its gradient twice"):
        update(model, out)
    assert torch.equal(model.gain, before)
    assert model.gain.grad is None


def test_a_value_that_is_needed_once_more_is_told(backend):
    model = build(mlp(2, 300), "sgd", model_name="net", in_backward=True)
    weight = model[1][0].weight
    x = model[0](torch.ones(2, 300)) @ weight.detach()  # whose gradient needs the weight
    with pytest.raises(RuntimeError, match=r"'net'.*stepped during this backward pass.*detach"):
        update(model, model[1](x))


def test_a_weight_that_is_used_at_two_places_of_the_graph(backend):
    # Autograd adds its gradients up before it calls the hook.
    model, twin = pair(OPTIMIZERS["adamw"], layers=3)
    for each in (model, twin):
        for seed in range(2):
            update(each, loss_of(nn.Sequential(each[0], each[1], each[2], each[1], each[0]), seed))
    assert_same(model, twin)
