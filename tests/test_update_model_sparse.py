# SPDX-License-Identifier: Apache-2.0
"""`update_model` where gradients are sparse, for optimizers that it steps as they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from training import (
    Unplanned,
    assert_same,
    assert_untouched,
    everything,
)

from pyupdate import update_model


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch's own Adagrad
@pytest.mark.parametrize("optimizer", ["stock", "adagrad"])
def test_sparse_gradients(optimizer):
    def make(sparse):
        torch.manual_seed(3)
        return nn.Embedding(6, 2, sparse=sparse).double()

    model = make(True)
    if optimizer == "stock":
        model.current_optimizer = torch.optim.AdamW(model.parameters())
        before = everything(model)
        with pytest.raises(TypeError, match=r"'weight' is sparse"):
            update_model(model, model(torch.tensor([1, 1, 4])))
        assert_untouched(before, model)
        return
    truth = make(True)
    model.current_optimizer = Unplanned(model.parameters(), lr=0.1)
    theirs = torch.optim.Adagrad(truth.parameters(), lr=0.1)
    update_model(model, model(torch.tensor([1, 1, 4])) ** 2)
    (truth(torch.tensor([1, 1, 4])) ** 2).mean().backward()
    theirs.step()
    assert_same(model, truth)


def _accumulated(first_sparse: bool, second_sparse: bool) -> torch.Tensor:
    weight = nn.Parameter(torch.arange(8.0, dtype=torch.float64).reshape(4, 2))
    model = nn.Module()
    model.weight = weight
    model.current_optimizer = torch.optim.SGD([weight], lr=1.0)
    model.current_optimizer.step = lambda: seen.append(weight.grad.to_dense().clone())
    seen: list[torch.Tensor] = []
    index = torch.tensor([1, 3])
    nn.functional.embedding(index, weight, sparse=first_sparse).pow(2).mean().backward()
    update_model(model, nn.functional.embedding(index[:1], weight, sparse=second_sparse).pow(2))
    return seen[0]


def test_sparse_and_dense_gradients_add_up():
    expected = _accumulated(False, False)
    assert bool((expected[1] == torch.tensor([2.0 + 1.0, 3.0 + 1.5])).all()), expected
    for first in (False, True):
        for second in (False, True):
            assert torch.equal(_accumulated(first, second), expected), (first, second)
