# SPDX-License-Identifier: Apache-2.0
"""`build`: what is attached, what is refused, and that the model stays the model it was."""

from __future__ import annotations

import copy
import doctest
import pickle

import pytest
import torch
from torch import nn
from training import assert_same, loss_of, network, plain_step

import pyupdate
from pyupdate import build, update_model
from pyupdate.options import Options
from pyupdate.pytorch import engines

STOCK = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def updates_like(model: nn.Module, make, clip: float | None = None) -> None:
    """Three updates of the model are those of torch's loop with this optimizer."""
    truth = network()
    truth.load_state_dict(model.state_dict())
    optimizer = make(truth.parameters())
    if clip is not None:
        optimizer.register_step_pre_hook(
            lambda *_: torch.nn.utils.clip_grad_norm_(truth.parameters(), clip) and None
        )
    for seed in range(3):
        update_model(model, loss_of(model, seed))
        plain_step(truth, optimizer, seed)
        if clip is None:
            assert_same(model, truth)
        else:  # torch divides by norm + 1e-6 in another order
            torch.testing.assert_close(
                list(model.parameters()), list(truth.parameters()), rtol=1e-9, atol=1e-12
            )


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "AdamW"])
def test_names_are_our_classes_with_torchs_defaults(name):
    model = network()
    assert build(model, name) is model
    kind = STOCK[name.lower()]
    assert type(model.current_optimizer) is getattr(pyupdate.optim, kind.__name__)
    updates_like(model, lambda params: kind(params, foreach=False))


def test_a_callable_that_makes_the_model_and_one_that_makes_the_optimizer():
    seen = []

    def make(params):
        seen.append(params)
        return torch.optim.AdamW(params, lr=0.1, weight_decay=0.2)

    model = build(network, make, model_name="made")
    assert isinstance(model, nn.Sequential)
    assert [id(param) for param in seen[0]] == [id(param) for param in model.parameters()]
    assert type(model.current_optimizer) is torch.optim.AdamW
    assert model.model_name == "made"
    updates_like(
        model, lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.2, foreach=False)
    )


class Unplanned(torch.optim.Adagrad):
    """A user's own class, which nobody steps but itself."""


def test_an_optimizer_and_a_class():
    model = network()
    optimizer = Unplanned(model.parameters(), lr=0.1)
    assert build(model, optimizer).current_optimizer is optimizer
    updates_like(model, lambda params: torch.optim.Adagrad(params, lr=0.1, foreach=False))
    assert type(build(network(), torch.optim.RMSprop).current_optimizer) is torch.optim.RMSprop


@pytest.mark.parametrize(
    "optimizer",
    [
        "adamw",
        torch.optim.AdamW,
        lambda params: torch.optim.AdamW(params, lr=1e-3),
        lambda params: pyupdate.optim.AdamW(params, max_norm=100.0),
    ],
    ids=["name", "class", "stock", "ours"],
)
def test_max_norm_clips(optimizer):
    model = build(network(), optimizer, max_norm=0.01)
    updates_like(model, lambda params: torch.optim.AdamW(params, foreach=False), clip=0.01)
    assert pyupdate.last_update(model).norm > 0.01


def test_max_norm_makes_a_difference():
    """AdamW hardly sees the size of a gradient; plain SGD does."""
    model = build(network(), lambda params: torch.optim.SGD(params, lr=1.0), max_norm=0.25)
    before = [param.detach().clone() for param in model.parameters()]
    update_model(model, 100.0 * loss_of(model, 0))
    moved = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), before, strict=True)])
    assert torch.linalg.vector_norm(moved.detach()).item() == pytest.approx(0.25, rel=1e-5)


def test_max_norm_for_an_optimizer_without_a_rule_is_refused():
    model = network()
    with pytest.raises(TypeError, match="Unplanned"):
        build(model, Unplanned, max_norm=1.0)
    assert not hasattr(model, "current_optimizer")
    for wrong in (-1.0, "1"):
        with pytest.raises((TypeError, ValueError), match="max_norm"):
            build(model, "adamw", max_norm=wrong)


def test_names_of_models():
    first, second = build(nn.Linear(2, 2), "sgd"), build(nn.Linear(2, 2), "sgd")
    assert first.model_name.startswith("Linear")
    assert first.model_name != second.model_name
    build(first, "adam", model_name="mine")
    assert first.model_name == "mine"
    build(first, "adam")
    assert first.model_name == "mine"
    for wrong in ("", 3):
        with pytest.raises(ValueError, match="model_name must be a string"):
            build(first, "adam", model_name=wrong)


def test_refusals_attach_nothing():
    model = network()
    other = network()
    for optimizer, words in (
        ("adamv", "'adamv' is unknown: give one of 'adadelta', .*'adam', .*'sgd'"),
        (3, "optimizer is a int"),
        (lambda params: "adam", "the callable given as optimizer returned a str"),
        (torch.optim.SGD(other.parameters(), lr=1.0), "holds none of the parameters"),
        (lambda params: torch.optim.SGD(other.parameters(), lr=1.0), "holds none of the"),
    ):
        with pytest.raises(ValueError, match=words):
            build(model, optimizer)
    assert not hasattr(model, "current_optimizer")
    assert not hasattr(model, "model_name")
    with pytest.raises(ValueError, match=r"ReLU.*no parameters"):
        build(nn.ReLU(), "adam")
    with pytest.raises(ValueError, match=r"model must be a torch\.nn\.Module or a Keras.* a int"):
        build(3, "adam")
    with pytest.raises(ValueError, match=r"the callable given as model made must be .*dict"):
        build(dict, "adam")


def test_state_dict_and_parameters_are_not_disturbed():
    model = network()
    keys, names = list(model.state_dict()), [name for name, _ in model.named_modules()]
    build(model, "adamw")
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == names
    assert "current_optimizer" not in repr(model)


@pytest.mark.parametrize("optimizer", ["adamw", torch.optim.AdamW, Unplanned])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_are_independent_and_go_on(optimizer, way):
    model = build(network(), optimizer, model_name="net")
    update_model(model, loss_of(model, 0))
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert twin.model_name == "net"
    assert twin.current_optimizer is not model.current_optimizer
    before = [param.detach().clone() for param in model.parameters()]
    update_model(twin, loss_of(twin, 1))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    update_model(model, loss_of(model, 1))
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("documented", [build, update_model, pyupdate.last_update])
def test_examples_in_docstrings_run(documented):
    (example,) = doctest.DocTestFinder(recurse=False).find(documented, documented.__name__)
    assert example.examples
    result = doctest.DocTestRunner().run(example)
    assert result.failed == 0


def test_build_alone_names_the_parameters():
    model = build(nn.Embedding(3, 2, sparse=True), "adamw")
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"'weight'"):
        model.current_optimizer.step()


def test_models_that_share_an_optimizer_are_named_once_each(monkeypatch):
    """Naming makes plans anew."""
    models = [nn.Linear(2, 2), nn.Linear(2, 2)]
    shared = pyupdate.optim.SGD([param for model in models for param in model.parameters()])
    calls = []
    set_names = engines.set_names

    def count(*given):
        calls.append(given)
        set_names(*given)

    monkeypatch.setattr(engines, "set_names", count)
    for model in models:
        model.current_optimizer = shared
    for _ in range(3):
        for model in models:
            update_model(model, model(torch.ones(1, 2)))
    assert len(calls) == 2
    assert calls[1][1] == {
        id(param): name for model in models for name, param in model.named_parameters()
    }


@pytest.mark.parametrize("attach", ["build", "by hand"])
def test_errors_name_parameters_as_the_model_does(attach):
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "table": nn.Embedding(3, 2, sparse=True)})
    other = build(nn.Linear(2, 2), "sgd")
    shared = torch.optim.AdamW([*model.parameters(), *other.parameters()])
    if attach == "build":
        build(model, shared)
        build(other, shared)
    else:
        model.current_optimizer = other.current_optimizer = shared
        update_model(other, other(torch.ones(1, 2)))
    with pytest.raises(TypeError, match=r"'table\.weight'"):
        update_model(model, model["body"](model["table"](torch.tensor([1]))))


def test_options_take_the_place_of_those_that_an_optimizer_of_ours_has():
    model = nn.Linear(3, 1)
    optimizer = pyupdate.optim.SGD(model.parameters(), lr=1.0, max_norm=0.5, clip_value=0.25)
    pyupdate.build(model, optimizer)
    assert optimizer.pyupdate_options == Options(max_norm=0.5, clip_value=0.25)
    pyupdate.build(model, optimizer, max_norm=None)
    assert optimizer.pyupdate_options == Options()
    stock = torch.optim.SGD(model.parameters(), lr=1.0)
    assert type(pyupdate.build(model, stock, max_norm=None).current_optimizer) is torch.optim.SGD
