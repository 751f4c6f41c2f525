# SPDX-License-Identifier: Apache-2.0
"""What Adafactor refuses, before anything is written."""

from __future__ import annotations

import pytest
import torch
from adafactor_cases import give
from torch import nn

import pyupdate
from pyupdate.optim import Adafactor


@pytest.mark.parametrize(
    "arguments",
    [
        {"lr": -1.0},
        {"lr": torch.ones(2)},
        {"beta2_decay": 0.5},
        {"eps": (-1.0, 1e-3)},
        {"eps": (None, -1.0)},
        {"d": 0.5},
        {"weight_decay": -0.5},
    ],
    ids=str,
)
def test_bad_arguments_have_torchs_words(arguments):
    said = []
    for kind in (Adafactor, torch.optim.Adafactor):
        with pytest.raises(ValueError, match=r"should be|must be") as caught:
            kind([nn.Parameter(torch.ones(2))], **arguments)
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_what_cannot_be_had_is_refused_by_name():
    param = nn.Parameter(torch.ones(2, 2))
    param.grad = torch.ones(2, 2)
    words = "Adafactor cannot be had with stochastic_rounding"
    with pytest.raises(ValueError, match=words):
        Adafactor([param], stochastic_rounding=True)
    with pytest.raises(ValueError, match=words):
        pyupdate.accelerate(torch.optim.Adafactor([param]), stochastic_rounding=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"row_var": torch.ones(2, 2)}, "state 'row_var' of 'group 0, parameter 0'"),
        ({"col_var": torch.ones(1, 2).double()}, "state 'col_var' of 'group 0, parameter 0'"),
        ({"col_var": None}, r"lacks \['col_var'\]"),
        ({"row_var": 1.0}, "is float, not a tensor"),
    ],
    ids=str,
)
def test_state_that_does_not_fit_is_refused_before_anything_is_written(change, words, backend):
    param = nn.Parameter(torch.ones(2, 2))
    param.grad = torch.ones(2, 2)
    optimizer = Adafactor([param])
    optimizer.step()
    optimizer.state[param].update(change)
    before = param.detach().clone()
    with pytest.raises((TypeError, ValueError), match=words):
        optimizer.step()
    assert torch.equal(param, before)
    assert float(optimizer.state[param]["step"]) == 1.0


@pytest.mark.parametrize(
    "change",
    [{"eps": None}, {"eps": (None, None)}, {"eps": 1e-3}, {"d": None}, {"d": "one"}],
    ids=str,
)
def test_numbers_of_a_group_that_are_none_are_refused_before_anything_is_written(change, backend):
    params = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    optimizer = Adafactor([{"params": [param]} for param in params])
    for param in params:
        param.grad = torch.ones(2, 2)
    optimizer.step()
    state = [{k: v.clone() for k, v in optimizer.state[param].items()} for param in params]
    before = [param.detach().clone() for param in params]
    optimizer.param_groups[1].update(change)
    (key,) = change
    with pytest.raises(ValueError, match=rf"'{key}'.* of parameter group 1 .*set them to what"):
        optimizer.step()
    for param, values, kept in zip(params, before, state, strict=True):
        assert torch.equal(param, values)
        assert all(torch.equal(optimizer.state[param][k], v) for k, v in kept.items())


@pytest.mark.parametrize("key", ["row_var", "col_var"])
@pytest.mark.parametrize("other", ["state", "parameter", "gradient", "itself"])
def test_state_that_shares_memory_is_refused_before_anything_is_written(key, other, backend):
    params = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    optimizer = Adafactor(params)
    for param in params:
        param.grad = torch.ones(2, 2)
    optimizer.step()
    state = optimizer.state[params[0]]
    shape, strides = state[key].shape, state[key].stride()
    of = {
        "state": optimizer.state[params[1]][key],
        "parameter": params[1].detach(),
        "gradient": params[0].grad,
        "itself": torch.ones(1).expand(2),
    }[other]
    assert of is not None
    kept = state[key]
    state[key] = of.as_strided(shape, (0, 0) if other == "itself" else strides)
    before = [param.detach().clone() for param in params]
    words = "overlaps itself" if other == "itself" else "shares memory with|lies in the memory of"
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    assert [float(optimizer.state[param]["step"]) for param in params] == [1.0, 1.0]
    state[key] = kept
    optimizer.step()
    assert float(optimizer.state[params[0]]["step"]) == 2.0


def test_a_gradient_that_moves_into_the_memory_of_state_is_refused(backend):
    room = torch.zeros(12)
    params = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    optimizer = Adafactor(params)
    give(params, [torch.ones(2, 2)] * 2)
    optimizer.step()
    optimizer.state[params[1]]["row_var"] = room[4:6].view(2, 1)
    for start in (0, 6, 8):  # two of them beside it
        give(params, [torch.ones(2, 2)] * 2)
        optimizer.step()
        params[0].grad = room[start : start + 4].view(2, 2)
        optimizer.step()
    before = [param.detach().clone() for param in params]
    for start in (1, 2, 3, 4, 5):
        params[0].grad = room[start : start + 4].view(2, 2)
        with pytest.raises(ValueError, match="lies in the memory of"):
            optimizer.step()
    assert all(map(torch.equal, params, before))
