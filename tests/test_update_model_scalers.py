# SPDX-License-Identifier: Apache-2.0
"""`update_model` with a `torch.amp.GradScaler`, against torch's own steps."""

from __future__ import annotations

import pytest
import torch
from training import (
    CASES,
    Case,
    assert_same,
    assert_untouched,
    everything,
    loss_of,
    network,
    plain_step,
    scaler_of,
)

import pyupdate
from pyupdate import last_update, update_model

every_case = pytest.mark.parametrize("case", CASES)
pytestmark = pytest.mark.usefixtures("backend_of_case")


# ----- scalers ------------------------------------------------------------------------------------


@every_case
def test_with_a_scaler_steps_skips_and_scales_are_torchs(case: Case):
    model = case.model()
    truth, optimizer = case.twin(model)
    ours, theirs = scaler_of(growth_interval=2), scaler_of(growth_interval=2)
    for seed in range(8):
        loss = loss_of(model, seed)
        expected = loss_of(truth, seed).mean()
        if seed in (0, 4):
            loss = loss * torch.tensor([[1.0, 1.0, float("inf")]])
            expected = expected * float("inf")
        before = everything(model)
        update_model(model, loss, scaler=ours)
        assert last_update(model).skipped == (seed in (0, 4))
        theirs.scale(expected).backward()
        theirs.step(optimizer)
        optimizer.zero_grad()
        if seed in (0, 4):
            assert_untouched(before, model)
        ours.update()
        theirs.update()
        assert ours.get_scale() == theirs.get_scale()
        assert ours.state_dict() == theirs.state_dict()
        assert_same(model, truth)
    assert_same(model, truth, optimizer)


@every_case
def test_a_second_step_before_update_raises_torchs_error(case: Case):
    model = case.model()
    scaler = scaler_of()
    update_model(model, loss_of(model, 0), scaler=scaler)
    before = everything(model)
    loss = loss_of(model, 1)
    with pytest.raises(RuntimeError, match=r"step\(\) has already been called since the last"):
        update_model(model, loss, scaler=scaler, retain_graph=False)
    assert_untouched(before, model)
    scaler.update()
    update_model(model, loss, scaler=scaler)  # neither was the graph used up


@every_case
def test_scaled_gradients_of_the_user_are_included(case: Case):
    model = case.model()
    truth, optimizer = case.twin(model)
    ours, theirs = scaler_of(), scaler_of()
    ours.scale(loss_of(model, 0).mean()).backward()
    update_model(model, loss_of(model, 1), scaler=ours)
    plain_step(truth, optimizer, 0, 1, scaler=theirs)
    assert_same(model, truth, optimizer)


@every_case
def test_gradients_that_were_unscaled_already_are_refused(case: Case):
    model = case.model()
    scaler = scaler_of()
    scaler.scale(loss_of(model, 0).mean()).backward()
    scaler.unscale_(model.current_optimizer)
    before = everything(model)
    for defer in (False, True):
        with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called.*'net'"):
            update_model(model, loss_of(model, 1), scaler=scaler, defer=defer, deferred={})
        assert_untouched(before, model)


@every_case
def test_two_models_share_a_scaler(case: Case):
    models = [case.model(0, "a"), case.model(1, "b")]
    truths = [case.twin(model) for model in models]
    ours, theirs = scaler_of(), scaler_of()
    for seed in range(3):
        for model, (truth, optimizer) in zip(models, truths, strict=True):
            update_model(model, loss_of(model, seed), scaler=ours)
            plain_step(truth, optimizer, seed, scaler=theirs)
        ours.update()
        theirs.update()
    for model, (truth, optimizer) in zip(models, truths, strict=True):
        assert_same(model, truth, optimizer)


@every_case
def test_a_disabled_scaler_acts_as_none(case: Case):
    model = case.model()
    truth, optimizer = case.twin(model)
    scaler = scaler_of(enabled=False)
    for seed in range(2):  # no update() between: None has none
        update_model(model, loss_of(model, seed), scaler=scaler)
        plain_step(truth, optimizer, seed)
    assert_same(model, truth, optimizer)


@every_case
def test_a_subclass_of_the_scaler(case: Case):
    class Loud(torch.amp.GradScaler):
        pass

    model = case.model()
    truth, optimizer = case.twin(model)
    update_model(model, loss_of(model, 0), scaler=Loud("cpu"))
    plain_step(truth, optimizer, 0)
    assert_same(model, truth)


@every_case
def test_with_a_scaler_nothing_that_the_optimizer_holds_has_a_gradient(case: Case):
    model = case.model()
    model.current_optimizer = case.make(model[0].parameters())
    before = [param.detach().clone() for param in model.parameters()]
    update_model(model, model[2].bias, scaler=scaler_of())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert all(param.grad is None for param in model.parameters())


def test_a_scaler_of_another_kind_is_refused():
    model = pyupdate.build(network(), "sgd", model_name="net")
    with pytest.raises(ValueError, match=r"scaler must be a torch\.amp\.GradScaler.*float"):
        update_model(model, loss_of(model, 0), scaler=2.0)
