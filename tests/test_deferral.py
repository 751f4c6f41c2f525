# SPDX-License-Identifier: Apache-2.0
"""`defer=True`: what waits, who applies it, and that nothing is applied twice or lost."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from training import (
    CASES,
    Case,
    Unplanned,
    assert_same,
    assert_untouched,
    batch,
    everything,
    loss_of,
    plain_step,
)

import pyupdate
from pyupdate import update_model


@pytest.fixture(params=CASES)
def case(request):
    with request.param.on_backend():
        yield request.param


def scaler_of(scale: float = 2.0**10) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale)


def drain(deferred) -> None:
    for updates in deferred.values():
        for update in updates:
            assert update() is None


def test_nothing_changes_before_the_drain_which_makes_the_step(case: Case):
    model = case.model()
    truth, optimizer = case.twin(model)
    deferred: dict = {}
    for seed in range(3):
        before = [param.detach().clone() for param in model.parameters()]
        assert update_model(model, loss_of(model, seed), defer=True, deferred=deferred) is None
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
        assert list(deferred) == ["net"]
        assert len(deferred["net"]) == 1
        drain(deferred)
        plain_step(truth, optimizer, seed)
        assert_same(model, truth, optimizer)
        assert all(param.grad is None for param in model.parameters())
        if seed == 1:
            deferred.clear()  # with or without: a callable that was used is used again


def test_two_deferred_calls_are_one_step_on_the_sum(case: Case):
    model = case.model()
    truth, optimizer = case.twin(model)
    deferred: dict = {}
    for seed in (0, 1):
        update_model(model, loss_of(model, seed), defer=True, deferred=deferred)
    assert [len(updates) for updates in deferred.values()] == [1]
    drain(deferred)
    plain_step(truth, optimizer, 0, 1)
    assert_same(model, truth, optimizer)
    before = everything(model)
    drain(deferred)  # nothing is pending
    assert_untouched(before, model)


def test_deferred_gradients_add_to_the_users(case: Case):
    model = case.model()
    truth, optimizer = case.twin(model)
    deferred: dict = {}
    loss_of(model, 5).mean().backward()
    update_model(model, loss_of(model, 6), defer=True, deferred=deferred)
    drain(deferred)
    plain_step(truth, optimizer, 5, 6)
    assert_same(model, truth, optimizer)


@pytest.mark.parametrize("passed", [True, False])
def test_an_immediate_call_consumes_what_is_pending(case: Case, passed):
    model, other = case.model(0, "a"), case.model(1, "b")
    truth, optimizer = case.twin(model)
    other_truth, other_optimizer = case.twin(other)
    deferred: dict = {}
    update_model(model, loss_of(model, 0), defer=True, deferred=deferred)
    update_model(other, loss_of(other, 0), defer=True, deferred=deferred)
    kept = list(deferred["b"])
    update_model(model, loss_of(model, 1), deferred=deferred if passed else None)
    plain_step(truth, optimizer, 0, 1)
    assert_same(model, truth, optimizer)
    assert list(deferred) == (["b"] if passed else ["a", "b"])
    assert deferred["b"] == kept
    drain(deferred)
    plain_step(other_truth, other_optimizer, 0)
    assert_same(model, truth, optimizer)
    assert_same(other, other_truth, other_optimizer)


def test_entries_of_others_in_the_same_list_stay(case: Case):
    """Two models of one name, and a callable of the user's."""
    model, other = case.model(0, "net"), case.model(1, "net")
    truth, optimizer = case.twin(other)
    calls = []
    users = lambda: calls.append("user's")  # noqa: E731 - compared by identity below
    deferred: dict = {"net": [users], "empty": []}
    update_model(model, loss_of(model, 0), defer=True, deferred=deferred)
    update_model(other, loss_of(other, 0), defer=True, deferred=deferred)
    assert len(deferred["net"]) == 3
    update_model(model, loss_of(model, 1), deferred=deferred)
    assert len(deferred["net"]) == 2
    assert deferred["net"][0] is users
    assert deferred["empty"] == []
    drain(deferred)
    plain_step(truth, optimizer, 0)
    assert_same(other, truth, optimizer)
    assert calls == ["user's"]
    update_model(other, loss_of(other, 1), deferred=deferred)
    assert deferred == {"net": [users], "empty": []}


def test_two_dicts_hold_one_update(case: Case):
    model = case.model()
    truth, optimizer = case.twin(model)
    first: dict = {}
    second: dict = {}
    update_model(model, loss_of(model, 0), defer=True, deferred=first)
    update_model(model, loss_of(model, 1), defer=True, deferred=second)
    assert len(first["net"]) == len(second["net"]) == 1
    drain(second)
    plain_step(truth, optimizer, 0, 1)
    assert_same(model, truth, optimizer)
    drain(first)
    assert_same(model, truth, optimizer)


def test_models_without_a_name_get_one_each(case: Case):
    models = [case.model(seed, None) for seed in range(3)]
    truths = [case.twin(model) for model in models]
    deferred: dict = {}
    for _ in range(2):
        for model in models:
            update_model(model, loss_of(model, 0), defer=True, deferred=deferred)
    assert len(deferred) == 3
    assert [len(updates) for updates in deferred.values()] == [1, 1, 1]
    drain(deferred)
    for model, (truth, optimizer) in zip(models, truths, strict=True):
        plain_step(truth, optimizer, 0, 0)
        assert_same(model, truth, optimizer)


def test_defer_lets_two_models_share_a_graph(case: Case):
    """What deferral is for: the second loss needs the first model's old weights."""
    generator = case.model(0, "generator")
    critic = nn.Linear(3, 2).double()
    critic.current_optimizer = case.make(critic.parameters())
    critic.model_name = "critic"
    truths = copy.deepcopy(generator), copy.deepcopy(critic)
    optimizers = [case.truth(truth.parameters()) for truth in truths]
    for seed in range(3):
        deferred: dict = {}
        score = critic(generator(batch(seed)))
        update_model(critic, score**2, defer=True, deferred=deferred)
        update_model(generator, -score, deferred=deferred)
        assert list(deferred) == ["critic"]
        drain(deferred)
        score = truths[1](truths[0](batch(seed)))
        of_critic = torch.autograd.grad(
            (score**2).mean(), list(truths[1].parameters()), retain_graph=True
        )
        of_generator = torch.autograd.grad(-score.mean(), list(truths[0].parameters()))
        for truth, optimizer, grads in zip(
            truths, optimizers, (of_generator, of_critic), strict=True
        ):
            for param, grad in zip(truth.parameters(), grads, strict=True):
                param.grad = grad
            optimizer.step()
        assert_same(generator, truths[0])
        assert_same(critic, truths[1])


def test_the_optimizer_attached_at_the_drain_is_used(case: Case):
    model = case.model()
    truth, _ = case.twin(model)
    first = model.current_optimizer
    deferred: dict = {}
    update_model(model, loss_of(model, 0), defer=True, deferred=deferred)
    model.current_optimizer = Unplanned(model.parameters(), lr=0.5)
    drain(deferred)
    plain_step(truth, torch.optim.Adagrad(truth.parameters(), lr=0.5, foreach=False), 0)
    assert_same(model, truth)
    # Adagrad makes its state, with step 0, when it is constructed; the others make none.
    assert all(state["step"] == 0.0 for state in first.state.values())


def test_no_dict_or_a_wrong_one_is_refused_before_any_gradient(case: Case):
    model = case.model()
    loss = loss_of(model, 0)
    before = everything(model)
    wrong = {"net": (print,)}
    for deferred, words in (
        (None, r"defer=True for 'net' needs a dict"),
        ([], "deferred must be a dict"),
        (wrong, r"deferred\['net'\] must be a list"),
    ):
        with pytest.raises(ValueError, match=words):
            update_model(model, loss, retain_graph=False, defer=True, deferred=deferred)
        assert_untouched(before, model)
    assert wrong == {"net": (print,)}
    update_model(model, loss, retain_graph=False)  # the graph is still there


def test_with_a_scaler(case: Case):
    model = case.model()
    truth, optimizer = case.twin(model)
    ours, theirs = scaler_of(), scaler_of()
    deferred: dict = {}
    for step in range(4):
        for seed in (2 * step, 2 * step + 1):
            loss = loss_of(model, seed)
            if step == 1:
                loss = loss * float("nan")
            update_model(model, loss, scaler=ours, defer=True, deferred=deferred)
        before = [param.detach().clone() for param in model.parameters()]
        drain(deferred)
        if step == 1:
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
            theirs.scale(loss_of(truth, 0).mean() * float("nan")).backward()
            theirs.step(optimizer)
            optimizer.zero_grad()
        else:
            plain_step(truth, optimizer, 2 * step, 2 * step + 1, scaler=theirs)
        ours.update()
        theirs.update()
        assert ours.state_dict() == theirs.state_dict()
        assert_same(model, truth)
    assert_same(model, truth, optimizer)


def test_another_scale_than_the_pending_gradients_carry_is_refused(case: Case):
    model = case.model()
    truth, optimizer = case.twin(model)
    scaler, other = scaler_of(), scaler_of()
    deferred: dict = {}
    update_model(model, loss_of(model, 0), scaler=scaler, defer=True, deferred=deferred)
    before = everything(model)
    entries = list(deferred["net"])
    for wrong in (None, other, torch.amp.GradScaler("cpu", enabled=False)):
        for defer in (False, True):
            with pytest.raises(ValueError, match=r"'net'.*wait.*scale"):
                update_model(model, loss_of(model, 1), scaler=wrong, defer=defer, deferred=deferred)
            assert_untouched(before, model)
            assert deferred == {"net": entries}
    scaler.scale(torch.ones(()))
    grown = scaler.state_dict()
    scaler.update(2.0**4)
    for attempt in (
        lambda: drain(deferred),
        lambda: update_model(model, loss_of(model, 1), scaler=scaler),
    ):
        with pytest.raises(ValueError, match=r"'net'.*carry the scale 1024\.0.*now 16\.0"):
            attempt()
        assert_untouched(before, model)
    scaler.load_state_dict(grown)  # an update that leaves the scale as it was does no harm
    scaler.update(2.0**10)
    drain(deferred)
    plain_step(truth, optimizer, 0)
    assert_same(model, truth, optimizer)


def test_pending_without_a_scaler_and_then_with_one(case: Case):
    model = case.model()
    deferred: dict = {}
    update_model(model, loss_of(model, 0), defer=True, deferred=deferred)
    before = everything(model)
    with pytest.raises(ValueError, match="without a scaler"):
        update_model(model, loss_of(model, 1), scaler=scaler_of())
    assert_untouched(before, model)


@pytest.mark.parametrize("with_scaler", [False, True])
def test_a_drain_that_raises_leaves_everything_pending(case: Case, with_scaler):
    model = case.model()
    truth, optimizer = case.twin(model)
    scaler = scaler_of() if with_scaler else None
    deferred: dict = {}
    update_model(model, loss_of(model, 0), scaler=scaler, defer=True, deferred=deferred)

    def refuse(*_):
        raise TypeError("not today")

    handle = model.current_optimizer.register_step_pre_hook(refuse)
    before = everything(model)
    for _ in range(2):
        with pytest.raises(TypeError, match="not today"):
            drain(deferred)
        assert_untouched(before, model)
    handle.remove()
    attached, model.current_optimizer = model.current_optimizer, None
    with pytest.raises(ValueError, match=r"'net'.*attach"):
        drain(deferred)
    model.current_optimizer = case.make([nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match=r"'net'.*none of its trainable parameters"):
        drain(deferred)
    model.current_optimizer = attached
    assert_untouched(before, model)
    drain(deferred)
    plain_step(truth, optimizer, 0)
    assert_same(model, truth, optimizer)


def test_a_drain_after_a_step_of_the_same_scaler_raises_torchs_error(case: Case):
    model = case.model()
    truth, optimizer = case.twin(model)
    scaler = scaler_of()
    deferred: dict = {}
    update_model(model, loss_of(model, 0), scaler=scaler)
    update_model(model, loss_of(model, 1), scaler=scaler, defer=True, deferred=deferred)
    before = everything(model)
    with pytest.raises(RuntimeError, match=r"step\(\) has already been called since"):
        drain(deferred)
    assert_untouched(before, model)
    plain_step(truth, optimizer, 0)
    scaler.update()
    drain(deferred)
    # The second loss was taken at the weights after the first step, in both.
    plain_step(truth, optimizer, 1)
    assert_same(model, truth)


def test_an_immediate_call_that_fails_leaves_what_is_pending(case: Case):
    model = case.model()
    truth, optimizer = case.twin(model)
    deferred: dict = {}
    update_model(model, loss_of(model, 0), defer=True, deferred=deferred)
    before = everything(model)
    entries = list(deferred["net"])
    with pytest.raises(ValueError, match="'net'"):
        update_model(model, torch.ones(3), deferred=deferred)
    assert_untouched(before, model)
    assert deferred == {"net": entries}
    drain(deferred)
    plain_step(truth, optimizer, 0)
    assert_same(model, truth, optimizer)


@pytest.mark.parametrize("applied_by", ["drain", "immediate call"])
def test_a_leftover_callable_leaves_the_users_own_gradients_alone(case: Case, applied_by):
    model = case.model()
    deferred: dict = {}
    update_model(model, loss_of(model, 0), defer=True, deferred=deferred)
    if applied_by == "drain":
        drain(deferred)
    else:
        update_model(model, loss_of(model, 1))
    loss_of(model, 2).mean().backward()
    before = everything(model)
    drain(deferred)
    assert_untouched(before, model)


def test_zero_grad_withdraws_what_is_pending_before_an_immediate_call(case: Case):
    model = case.model()
    truth, optimizer = case.twin(model)
    deferred: dict = {}
    update_model(model, loss_of(model, 0), scaler=scaler_of(), defer=True, deferred=deferred)
    model.zero_grad()
    update_model(model, loss_of(model, 1), deferred=deferred)
    assert deferred == {}
    plain_step(truth, optimizer, 1)
    assert_same(model, truth, optimizer)


def test_zero_grad_withdraws_what_is_pending(case: Case):
    model = case.model()
    deferred: dict = {}
    update_model(model, loss_of(model, 0), scaler=scaler_of(), defer=True, deferred=deferred)
    model.zero_grad()
    before = everything(model)
    drain(deferred)
    assert_untouched(before, model)
    truth, optimizer = case.twin(model)
    update_model(model, loss_of(model, 1))  # no word about the scaler
    plain_step(truth, optimizer, 1)
    assert_same(model, truth, optimizer)


def test_a_copy_has_nothing_pending(case: Case):
    model = case.model()
    deferred: dict = {}
    update_model(model, loss_of(model, 0), defer=True, deferred=deferred)
    twin = copy.deepcopy(model)
    for param in twin.parameters():
        param.grad = None
    truth, optimizer = case.twin(twin)
    update_model(twin, loss_of(twin, 1), deferred=deferred)
    assert len(deferred["net"]) == 1  # the original's
    plain_step(truth, optimizer, 1)
    assert_same(twin, truth, optimizer)


def test_the_dict_alone_keeps_a_model_alive(case: Case):
    model = case.model()
    truth, optimizer = case.twin(model)
    deferred: dict = {}
    update_model(model, loss_of(model, 0), defer=True, deferred=deferred)
    gone = weakref.ref(model)
    weight = model[0].weight
    del model
    gc.collect()
    assert gone() is not None
    drain(deferred)
    plain_step(truth, optimizer, 0)
    torch.testing.assert_close(weight, truth[0].weight, rtol=1e-12, atol=1e-14)
    deferred.clear()
    gc.collect()
    assert gone() is None


def test_its_repr_names_the_model():
    model = pyupdate.build(nn.Linear(2, 2), "sgd", model_name="line")
    deferred: dict = {}
    update_model(model, model(torch.ones(1, 2)), defer=True, deferred=deferred)
    assert repr(deferred["line"]) == "[<deferred update of 'line'>]"
