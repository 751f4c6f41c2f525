# SPDX-License-Identifier: Apache-2.0
"""Constructors of the classes that torch has: its arguments, and what it makes of their values."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch

import pyupdate
from pyupdate.optim.planned import DROP_INS
from pyupdate.options import PARAMETERS

OPTIONS = [parameter.name for parameter in PARAMETERS]
MORE = {"Muon": ["flatten_trailing"]}
"""What ours take besides."""

every_class = pytest.mark.parametrize("stock", DROP_INS, ids=lambda kind: kind.__name__)


def arguments_of(kind: Any) -> list[inspect.Parameter]:
    """Those that are torch's."""
    more = [*OPTIONS, *MORE.get(kind.__name__, ())]
    return [p for p in inspect.signature(kind).parameters.values() if p.name not in more]


def params_of() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(2, 2))]


def made(kind: Any, *given: Any, **named: Any) -> Any:
    """The numbers of its only group, or what was raised."""
    try:
        group = dict(kind(params_of(), *given, **named).param_groups[0])
    except Exception as error:  # whatever torch raises is what ours has to
        return type(error).__name__, str(error)
    del group["params"]
    return group


def same(ours: Any, theirs: Any) -> bool:
    """Whether two groups hold equal numbers of the same types."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[k], theirs[k]) for k in theirs)
    if isinstance(theirs, tuple | list):
        return (
            type(ours) is type(theirs) and len(ours) == len(theirs) and all(map(same, ours, theirs))
        )
    if type(ours) is not type(theirs):
        return False
    if isinstance(theirs, torch.Tensor | np.ndarray):
        return ours.shape == theirs.shape and bool((ours == theirs).all())
    return bool(ours == theirs)


def test_these_are_the_classes_that_are_shared():
    assert len(DROP_INS) == 13


@every_class
def test_names_order_kinds_and_defaults_are_torchs(stock):
    ours, theirs = (
        [(p.name, p.kind, p.default) for p in arguments_of(kind)]
        for kind in (DROP_INS[stock], stock)
    )
    assert ours == theirs
    assert same(made(DROP_INS[stock]), made(stock))


@every_class
def test_what_is_given_by_place_is_given_as_to_torch(stock):
    given: list[Any] = []
    for argument in arguments_of(stock)[1:]:
        if argument.kind is argument.KEYWORD_ONLY:
            break
        given.append(argument.default)
        ours, theirs = (made(kind, *given) for kind in (DROP_INS[stock], stock))
        assert same(ours, theirs), given
    assert given
    first = made(stock, 0.125)
    assert first["lr"] == 0.125 and same(made(DROP_INS[stock], 0.125), first)


def values_for(default: Any) -> list[Any]:
    """What users give for an argument of this default, right and wrong."""
    if isinstance(default, tuple):
        half = tuple(0.5 for _ in default)
        kinds: list[Any] = [np.float64, np.float32, torch.tensor, int]
        made_of = [tuple(map(kind, half)) for kind in kinds]
        mixed = (torch.tensor(0.5), *half[1:])
        return [half, list(half), *made_of, mixed, half[:1], None, 0.5, "half", (-1.0, *half[1:])]
    if isinstance(default, bool):
        return [True, False, None, 1]
    numbers: list[Any] = [1, 0.5, np.float32(0.5), np.float64(0.5), np.int64(1)]
    tensors = [torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([0.5, 0.5]), torch.tensor(1)]
    return [*numbers, *tensors, -1.0, float("nan"), None, "0.5", True, np.array(0.5)]


@every_class
def test_every_argument_takes_and_refuses_what_torchs_does(stock):
    tried = 0
    for argument in arguments_of(stock)[1:]:
        for value in values_for(argument.default):
            ours, theirs = (
                made(kind, **{argument.name: value}) for kind in (DROP_INS[stock], stock)
            )
            nan = isinstance(value, float) and value != value
            fits = repr(ours) == repr(theirs) if nan else same(ours, theirs)
            assert fits, f"{argument.name}={value!r}: {ours}, but torch {theirs}"
            tried += 1
    assert tried > 20


def test_a_class_of_ones_own_shows_what_it_hands_on():
    class Mine(pyupdate.optim.AdamW):
        def __init__(self, *args: Any, extra: float = 1.0, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.extra = extra

    class Other(pyupdate.optim.AdamW):
        def __init__(self, model: torch.nn.Module, **kwargs: Any) -> None:
            super().__init__(model.parameters(), **kwargs)

    stock = [p.name for p in arguments_of(torch.optim.AdamW)]
    assert [*inspect.signature(Mine).parameters] == [*stock, "extra", *OPTIONS]
    assert [*inspect.signature(Other).parameters] == ["model", *OPTIONS, "kwargs"]
