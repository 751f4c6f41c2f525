# SPDX-License-Identifier: Apache-2.0
"""`drain`: what it takes out of the dict, and what stays when something fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from waiting import Deferred, assert_same, one_by_one, pending, settled

from pyupdate import drain, update_model


def test_what_a_callable_puts_into_the_dict_stays(backend):
    (model,) = settled(1)
    deferred = pending([model])
    calls: list[str] = []

    def again():
        calls.append("again")
        deferred.setdefault("later", []).append(again)

    deferred["users"] = [again]
    deferred["empty"] = []
    drain(deferred)
    assert deferred == {"later": [again]}
    assert calls == ["again"]


def test_leftover_callables_do_nothing(backend):
    models = settled(3)
    deferred = pending(models)
    leftover = dict(deferred)
    drain(deferred)
    before = [param.detach().clone() for model in models for param in model.parameters()]
    loss = models[0].loss(3)
    loss.backward()
    grad = models[0].a.grad
    drain(leftover)
    assert leftover == {}
    assert models[0].a.grad is grad
    assert all(map(torch.equal, before, (p for model in models for p in model.parameters())))


@pytest.mark.parametrize("what", ["gradient", "optimizer", "scaler"])
def test_a_failure_in_the_middle(what, backend):
    models, truths = settled(5), settled(5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    deferred: Deferred = {}
    for i, model in enumerate(models):
        given = scaler if i == 2 and what == "scaler" else None
        update_model(model, model.loss(1), scaler=given, defer=True, deferred=deferred)
    bad = models[2]
    kept = bad.a.grad, bad.current_optimizer
    if what == "gradient":
        bad.a.grad = bad.a.grad.to_sparse()
        error: Any = (TypeError, "'a'")
    elif what == "optimizer":
        bad.current_optimizer = None
        error = (ValueError, "'net 2' has no optimizer")
    else:
        scaler.update(2.0)
        error = (ValueError, "'net 2'.*carry the scale 4.0")
    before = [param.detach().clone() for model in models[2:] for param in model.parameters()]
    with pytest.raises(error[0], match=error[1]):
        drain(deferred)
    assert list(deferred) == ["net 2", "net 3", "net 4"]
    after = (param for model in models[2:] for param in model.parameters())
    assert all(map(torch.equal, before, after))
    one_by_one(pending(truths))
    assert_same(models[:2], truths[:2])
    bad.a.grad, bad.current_optimizer = kept
    if what == "scaler":
        scaler.update(4.0)
    drain(deferred)
    assert deferred == {}
    if what != "scaler":
        assert_same(models, truths)


def test_a_foreign_callable_that_raises(backend):
    models, truths = settled(3), settled(3)
    deferred = pending(models)

    def refuse():
        raise KeyError("not today")

    deferred["net 0"].append(refuse)
    with pytest.raises(KeyError, match="not today"):
        drain(deferred)
    assert list(deferred) == ["net 0", "net 1", "net 2"]
    assert deferred["net 0"] == [refuse]
    deferred["net 0"].clear()
    drain(deferred)
    one_by_one(pending(truths))
    assert_same(models, truths)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (None, "deferred must be a dict, but is a NoneType"),
        ({"net": (print,)}, r"deferred\['net'\] must be a list of callables, but is a tuple"),
        ({"net": [3]}, r"deferred\['net'\] holds a int, which is no callable"),
    ],
)
def test_what_is_no_dict_of_lists_is_refused(wrong, words, backend):
    models = settled(1)
    before = [param.detach().clone() for param in models[0].parameters()]
    deferred = wrong if wrong is None else pending(models) | wrong
    with pytest.raises(ValueError, match=words):
        drain(deferred)
    assert all(map(torch.equal, before, models[0].parameters()))


def test_a_callable_that_drains_its_own_dict_is_refused(backend):
    waiting: dict[str, Any] = {}
    made: list[int] = []

    def drains_again() -> None:
        made.append(1)
        drain(waiting)

    waiting["mine"] = [lambda: made.append(0), drains_again, lambda: made.append(2)]
    with pytest.raises(RuntimeError, match="a dict that is being drained"):
        drain(waiting)
    assert made == [0, 1]
    waiting["mine"][0] = lambda: drain({})  # another dict's drain is nobody's concern
    drain(waiting)
    assert made == [0, 1, 2] and not waiting
