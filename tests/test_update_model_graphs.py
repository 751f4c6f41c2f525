# SPDX-License-Identifier: Apache-2.0
"""`update_model` and the graph of a loss: kept, freed, searched, and gone."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from training import (
    CASES,
    Case,
    assert_untouched,
    batch,
    everything,
    loss_of,
)

import pyupdate
from pyupdate import update_model
from pyupdate.pytorch import reentrant

every_case = pytest.mark.parametrize("case", CASES)
pytestmark = pytest.mark.usefixtures("backend_of_case")


# ----- graphs -------------------------------------------------------------------------------------


@every_case
def test_retain_graph(case: Case):
    model = case.model()
    x = batch(0)
    hidden = (x * model[0].bias.sum()).sum()  # a graph that needs no weight that the step writes
    model.current_optimizer = case.make([model[2].weight])
    update_model(model, hidden + model[2].weight.sum())
    update_model(model, hidden + model[2].weight.sum(), retain_graph=False)
    before = everything(model)
    with pytest.raises(RuntimeError, match="backward through the graph a second time") as caught:
        update_model(model, hidden + model[2].weight.sum())
    assert "defer" not in str(caught.value)  # torch's own words
    assert_untouched(before, model)


@every_case
def test_a_loss_that_needs_old_weights_names_its_model(case: Case):
    """Also a test of version counters: compiled kernels write behind autograd's back."""
    generator = case.model(0, "generator")
    critic = nn.Linear(3, 2).double()
    critic.current_optimizer = case.make(critic.parameters())
    critic.model_name = "critic"
    fake = generator(batch(0))
    score = critic(fake)
    update_model(critic, score**2)
    before = everything(generator, critic)
    with pytest.raises(RuntimeError, match=r"'generator'.*defer=True") as caught:
        update_model(generator, -score)
    assert "modified by an inplace operation" in str(caught.value.__cause__)
    assert_untouched(before, generator, critic)


@every_case
def test_the_same_model_twice_on_one_graph_is_refused(case: Case):
    model = case.model()
    loss = loss_of(model, 0)
    update_model(model, loss)
    before = everything(model)
    with pytest.raises(RuntimeError, match=r"'net'.*defer=True"):
        update_model(model, loss)
    assert_untouched(before, model)


def test_reentrant_checkpoints_never_hide_parameters():
    block, head = nn.Linear(3, 3), nn.Linear(3, 1)
    model = nn.ModuleDict({"block": block, "head": head})
    pyupdate.build(model, "sgd", model_name="net")
    x = torch.ones(2, 3)
    ways = {
        "module": lambda x: checkpoint(block, x, use_reentrant=True),
        "lambda": lambda x: checkpoint(lambda y: block(y), x, use_reentrant=True),
        "method": lambda x: checkpoint(block.forward, x, use_reentrant=True),
    }
    for run in ways.values():
        for _ in range(2):  # what was judged once is judged again
            before = everything(model)
            with pytest.raises(ValueError, match=r"'block\.weight' of 'net'.*use_reentrant=False"):
                update_model(model, head(run(x.clone().requires_grad_())))
            assert_untouched(before, model)
    with pytest.raises(ValueError, match="use_reentrant=True"):
        update_model(model, checkpoint(block, x.clone().requires_grad_(), use_reentrant=True))
    # Another model's checkpoint is none of this one's business, whatever this one leaves unused.
    critic = nn.ModuleDict({"used": nn.Linear(3, 1), "unused": nn.Linear(1, 1)})
    pyupdate.build(critic, "sgd")
    weight = critic["used"].weight.detach().clone()
    fake = checkpoint(block, x.clone().requires_grad_(), use_reentrant=True)
    update_model(critic, critic["used"](fake))
    assert not torch.equal(critic["used"].weight, weight)
    # use_reentrant=False trains the block
    weight = block.weight.detach().clone()
    update_model(model, head(checkpoint(block, x, use_reentrant=False)))
    assert not torch.equal(block.weight, weight)


def test_the_graph_is_searched_once_for_a_set_of_unreached_parameters(monkeypatch):
    model = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
    pyupdate.build(model, "sgd")
    searched = []
    monkeypatch.setattr(reentrant, "_checkpointed", lambda loss: searched.append(loss) or ())
    for _ in range(3):
        update_model(model, model[0](torch.ones(1, 2)))
    assert len(searched) == 1
    update_model(model, model[1](torch.ones(1, 2)))
    assert len(searched) == 2
    update_model(model, model[2](model[1](model[0](torch.ones(1, 2)))))
    assert len(searched) == 2


class _Runs:
    """A callable that shows nothing of what it runs."""

    def __init__(self, block):
        self.run = {"block": block}

    def __call__(self, x):
        return self.run["block"](x)


@pytest.mark.parametrize("dynamo", ["as it is", "imported"])
def test_a_reentrant_checkpoint_of_nobody_knows_what_warns_once(dynamo):
    if dynamo == "imported":  # then updates are called through a function of its
        importlib.import_module("torch._dynamo")
    model = nn.ModuleDict({"block": nn.Linear(3, 3), "head": nn.Linear(3, 1)})
    pyupdate.build(model, "sgd", model_name="net")
    x = torch.ones(2, 3, requires_grad=True)
    run = _Runs(model["block"])
    with pytest.warns(RuntimeWarning, match=r"'net'.*use_reentrant=False") as caught:
        update_model(model, model["head"](checkpoint(run, x, use_reentrant=True)))
    assert caught[0].filename == __file__
    update_model(model, model["head"](checkpoint(run, x, use_reentrant=True)))
