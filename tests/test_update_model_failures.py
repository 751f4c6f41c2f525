# SPDX-License-Identifier: Apache-2.0
"""`update_model` after a failure: parameters, gradients, state and counters are as they were."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from training import (
    CASES,
    Case,
    assert_same,
    assert_untouched,
    batch,
    everything,
    loss_of,
    network,
    plain_step,
    scaler_of,
)

from pyupdate import build, update_model

every_case = pytest.mark.parametrize("case", CASES)
pytestmark = pytest.mark.usefixtures("backend_of_case")


# ----- failures leave everything as it was --------------------------------------------------------


def _refuse(*_):
    raise TypeError("not today")


class _Breaks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ArithmeticError("broken in the middle")


@every_case
@pytest.mark.parametrize("with_grad", [False, True])
def test_a_backward_that_raises_in_the_middle(case: Case, with_grad):
    model = case.model()
    update_model(model, loss_of(model, 0))
    if with_grad:
        model[0].weight.grad = torch.ones_like(model[0].weight)
        model[2].bias.grad = torch.ones_like(model[2].bias)
    before = everything(model)
    hidden = _Breaks.apply(model[1](model[0](batch(0))))
    deferred: dict = {"other": [print]}
    for defer in (False, True):
        with pytest.raises(ArithmeticError, match="broken in the middle"):
            update_model(model, model[2](hidden), defer=defer, deferred=deferred)
        assert_untouched(before, model)
        assert deferred == {"other": [print]}


@every_case
@pytest.mark.parametrize("with_scaler", [False, True])
def test_a_step_that_is_refused(case: Case, with_scaler):
    model = case.model()
    update_model(model, loss_of(model, 0))
    loss_of(model, 1).mean().backward()
    handle = model.current_optimizer.register_step_pre_hook(_refuse)
    scaler = scaler_of() if with_scaler else None
    before = everything(model)
    with pytest.raises(TypeError, match="not today"):
        update_model(model, loss_of(model, 2), scaler=scaler)
    assert_untouched(before, model)
    handle.remove()
    model.zero_grad()
    truth, optimizer = case.twin(model)
    optimizer.load_state_dict(copy.deepcopy(model.current_optimizer.state_dict()))
    update_model(model, loss_of(model, 2), scaler=scaler)  # nor did the scaler change
    plain_step(truth, optimizer, 2)
    assert_same(model, truth)


def test_a_parameter_that_cannot_be_stepped_is_named_and_nothing_changes():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = nn.Parameter(torch.zeros(1, 1).expand(2, 2))
    model.current_optimizer = torch.optim.AdamW(model.parameters())
    model[0].bias.grad = torch.ones(2)
    before = everything(model)
    with pytest.raises((TypeError, ValueError), match=r"1\.weight"):
        update_model(model, model(torch.ones(1, 2)))
    assert_untouched(before, model)


@every_case
def test_losses_that_reach_nothing(case: Case):
    model, other = case.model(), case.model(1, "other")
    loss_of(model, 0).mean().backward()
    before = everything(model, other)
    with torch.no_grad():
        constant = loss_of(model, 0)
    for loss in (constant, loss_of(model, 0).detach(), torch.tensor(3), loss_of(other, 0)):
        with pytest.raises(ValueError, match=r"'net'.*depend.*use_reentrant=True"):
            update_model(model, loss)
        assert_untouched(before, model, other)
    with pytest.raises(ValueError, match=r"'net'.*no elements"):
        update_model(model, loss_of(model, 0)[:0])
    assert_untouched(before, model, other)
    loss = loss_of(model, 0)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'net'.*frozen"):
        update_model(model, loss)
    assert_untouched(before, model, other)


@every_case
def test_an_optimizer_of_other_parameters_is_refused(case: Case):
    model = case.model()
    model.current_optimizer = case.make(network().parameters())
    loss = loss_of(model, 0)
    with pytest.raises(ValueError, match=r"'net'.*none of its trainable parameters"):
        update_model(model, loss, retain_graph=False)
    loss.mean().backward()  # the graph was not used up


def _keras(kind: str, *bases: type) -> object:
    return type(kind, bases, {"__module__": "keras.src.models.model"})()


def _tensor() -> object:
    return type("EagerTensor", (), {"__module__": "tensorflow.python.framework.ops"})()


class _UsersKeras(type("Model", (), {"__module__": "keras.src.models.model"})):
    pass


def test_what_is_no_model_or_no_loss_is_refused_first():
    model = network()
    loss = torch.ones(1)
    for wrong in (3.0, None, [loss], "loss"):
        with pytest.raises(ValueError, match=r"loss must be a torch.Tensor or a tf.Tensor, but"):
            update_model(None, wrong, defer=True)
    with pytest.raises(ValueError, match=r"loss must be .*, but is tensorflow"):
        update_model(model, _tensor())
    for keras in (_keras("Model"), _keras("Model", nn.Module), _UsersKeras()):
        with pytest.raises(ValueError, match=r"the model is Keras's: give a tf\.Tensor"):
            update_model(keras, loss)
    for wrong, named in ((None, "NoneType"), (object(), "object"), (nn.Linear, "the class Linear")):
        with pytest.raises(
            ValueError, match=f"must be a torch.nn.Module or a Keras model, but is .*{named}"
        ):
            update_model(wrong, loss)
    with pytest.raises(ValueError, match=r"tape is a object: tapes are TensorFlow's"):
        update_model(model, loss, tape=object())


def test_a_model_without_optimizer_says_how_to_attach_one():
    model = network()
    with pytest.raises(ValueError, match=r"Sequential.*no optimizer.*pyupdate\.build"):
        update_model(model, loss_of(model, 0))
    for wrong in (None, 3, torch.optim.SGD):
        model.current_optimizer = wrong
        with pytest.raises(ValueError, match=r"Sequential.*attached.*pyupdate\.build"):
            update_model(model, loss_of(model, 0))
    assert all(param.grad is None for param in model.parameters())


def test_an_optimizer_that_needs_a_closure_is_refused_by_name():
    model = network()
    words = r"'lines' is a LBFGS, whose step needs a closure.*step it yourself with its closure"
    with pytest.raises(TypeError, match=words):
        build(model, torch.optim.LBFGS, model_name="lines")
    assert not hasattr(model, "current_optimizer")
    model.model_name = "lines"
    model.current_optimizer = torch.optim.LBFGS(model.parameters())
    before = everything(model)
    for defer in (False, True):
        deferred: dict = {}
        with pytest.raises(TypeError, match=words):
            update_model(model, loss_of(model, 0), defer=defer, deferred=deferred)
        assert deferred == {}
        assert_untouched(before, model)


@every_case
def test_a_complex_loss_is_refused_by_name(case: Case):
    model = case.model()
    update_model(model, loss_of(model, 0))
    before = everything(model)
    with pytest.raises(ValueError, match=r"'net' is complex \(torch\.complex64\).*loss\.abs\(\)"):
        update_model(model, loss_of(model, 1).to(torch.complex64))
    assert_untouched(before, model)
