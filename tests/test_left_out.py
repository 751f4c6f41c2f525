# SPDX-License-Identifier: Apache-2.0
"""Parameters that no back end can step: left alone without a gradient, as torch does it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import pyupdate
from pyupdate import optim
from pyupdate.pytorch import checks

FROZEN = {
    "int8": lambda: torch.ones(3, dtype=torch.int8),
    "bool": lambda: torch.ones(3, dtype=torch.bool),
    "float8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "meta": lambda: torch.ones(3, device="meta"),
    "sparse": lambda: torch.ones(3).to_sparse(),
    "expanded": lambda: torch.ones(1).expand(3),
}
MAKERS = {
    "ours": lambda params: optim.AdamW(params, lr=0.1, max_norm=10.0),
    "accelerate": lambda params: pyupdate.accelerate(torch.optim.AdamW(params, lr=0.1)),
    "averages": lambda params: optim.AdamW(params, lr=0.1, ema_decay=0.9),
    "Adafactor": lambda params: optim.Adafactor(params, lr=0.1),
}


def _frozen(kind, requires_grad=False):
    return nn.Parameter(FROZEN[kind](), requires_grad=requires_grad)


def _truth(make, steps):
    param = nn.Parameter(torch.ones(4))
    optimizer = make([param])
    for _ in range(steps):
        param.grad = torch.full((4,), 0.5)
        optimizer.step()
    return param


@pytest.mark.all_pairs
@pytest.mark.parametrize("made", MAKERS)
@pytest.mark.parametrize("kind", FROZEN)
@pytest.mark.parametrize("first", [True, False])
def test_a_step_leaves_it_alone(kind, made, first, backend):
    frozen, param = _frozen(kind), nn.Parameter(torch.ones(4))
    optimizer = MAKERS[made]([frozen, param] if first else [param, frozen])
    for _ in range(3):
        param.grad = torch.full((4,), 0.5)
        optimizer.step()
    assert torch.equal(param, _truth(MAKERS[made], 3))
    assert frozen not in optimizer.state


@pytest.mark.parametrize("kind", FROZEN)
def test_update_model_leaves_it_alone(kind, backend):
    def model_with(extra):
        model = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            model.weight.fill_(1.0)
        if extra is not None:
            model.register_parameter("codes", extra)
        return pyupdate.build(model, lambda p: torch.optim.AdamW(p, lr=0.1))

    model, truth = model_with(_frozen(kind)), model_with(None)
    for _ in range(2):
        for some in (model, truth):
            pyupdate.update_model(some, some(torch.ones(3, 2)))
    assert torch.equal(model.weight, truth.weight)


def test_with_a_gradient_it_is_refused_by_its_name(backend):
    for kind, found in (("complex", r"complex"), ("meta", "meta device"), ("expanded", "expanded")):
        frozen, param = _frozen(kind, requires_grad=True), nn.Parameter(torch.ones(4))
        optimizer = optim.AdamW([("codes", frozen), ("scale", param)], lr=0.1)
        param.grad = torch.ones(4)
        optimizer.step()
        before = param.detach().clone(), copy.deepcopy(optimizer.state[param])
        frozen.grad = torch.ones_like(frozen).clone()
        for _ in range(2):
            with pytest.raises((TypeError, ValueError), match=f"'codes'.*{found}"):
                optimizer.step()
        assert torch.equal(param, before[0])
        assert all(torch.equal(optimizer.state[param][k], v) for k, v in before[1].items())
        frozen.grad = None
        optimizer.step()
        assert optimizer.state[param]["step"] == 2.0


def test_a_frozen_one_that_becomes_trainable_is_stepped(backend):
    frozen, param = _frozen("float8"), nn.Parameter(torch.ones(4))
    optimizer = optim.AdamW([frozen, param], lr=0.1)
    for step in range(4):
        if step == 2:
            frozen.data = torch.ones(4)
        param.grad = torch.full((4,), 0.5)
        frozen.grad = param.grad.clone() if step >= 2 else None
        optimizer.step()
    assert torch.equal(frozen, _truth(MAKERS["ours"], 2))
    assert torch.equal(param, _truth(MAKERS["ours"], 4))


@pytest.mark.parametrize("made", ["ours", "accelerate", "averages"])
def test_a_lazy_module_is_stepped_from_its_first_forward_on(made, backend):
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1))
    optimizer = MAKERS[made](model.parameters())
    model[1].weight.grad = torch.zeros(1, 3)
    optimizer.step()
    assert optimizer.state[model[1].weight]["step"] == 1.0
    model(torch.ones(2, 4)).sum().backward()
    truth = copy.deepcopy(model)
    loaded = torch.optim.AdamW(truth.parameters(), lr=0.1, foreach=False)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for param, other in zip(model.parameters(), truth.parameters(), strict=True):
        other.grad = param.grad.clone()
    optimizer.step()
    loaded.step()
    for param, other in zip(model.parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-6)
    assert optimizer.state[model[0].weight]["step"] == 1.0


def test_update_model_of_a_lazy_module(backend):
    model = pyupdate.build(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1)), "adamw")
    for _ in range(2):
        pyupdate.update_model(model, model(torch.ones(2, 4)))
    assert model.current_optimizer.state[model[0].weight]["step"] == 2.0


def test_what_a_lazy_parameter_needs_is_said():
    with pytest.raises(TypeError, match=r"'0\.weight' is uninitialised: run a forward pass"):
        checks.check_parameter(nn.LazyLinear(3).weight, "0.weight")


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Adafactor"])
def test_errors_use_the_names_that_torch_was_given(kind, backend):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    optimizer = getattr(optim, kind)(
        [
            {"params": list(model[0].named_parameters(prefix="body"))},
            {"params": list(model[1].named_parameters(prefix="head"))},
        ],
        lr=0.1,
    )
    model[1].bias.grad = torch.ones(1).to_sparse()
    with pytest.raises(TypeError, match=r"'head\.bias' is sparse"):
        optimizer.step()
