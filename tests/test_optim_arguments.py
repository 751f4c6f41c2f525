# SPDX-License-Identifier: Apache-2.0
"""What the constructors of the optimizers that torch has not refuse, argument by argument.

The arguments are read from the signatures, so that a new one, or a new class, is tried here too.
"""

from __future__ import annotations

import inspect
import math
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch

from pyupdate.optim import CLASSES
from pyupdate.optim.planned import DROP_INS
from pyupdate.options import PARAMETERS

OWN = [kind for kind in CLASSES.values() if kind not in DROP_INS.values()]
OPTIONS = {parameter.name for parameter in PARAMETERS}
ANY_SIGN = {("LARS", "dampening")}
"""Numbers that may be negative, as torch's SGD has it."""


def arguments_of(kind: Any) -> dict[str, Any]:
    """By name the defaults of what is the class's own."""
    shown = inspect.signature(kind).parameters.values()
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {p.name: p.default for p in shown if p.kind not in kinds and p.name not in OPTIONS}


ARGUMENTS = [
    (kind, name, default)
    for kind in OWN
    for name, default in arguments_of(kind).items()
    if name != "params"
]

NO_NUMBERS: list[tuple[Any, type[Exception]]] = [
    (None, TypeError),
    ("0.1", TypeError),
    ("a", TypeError),
    (b"1", TypeError),
    (True, TypeError),
    ([0.5], TypeError),
    ({}, TypeError),
    (0.5j, TypeError),
    (10**400, TypeError),
    (torch.tensor([0.5, 0.25]), ValueError),
    (torch.empty(0), ValueError),
    (torch.tensor(0.5, device="meta"), TypeError),
    (np.array([0.5, 0.25]), TypeError),
]
OUT_OF_RANGE: list[Any] = [math.nan, np.float32("nan"), torch.tensor(math.nan)]
BELOW: list[Any] = [-1.0, -math.inf, np.float64(-0.5), torch.tensor(-0.5)]
NO_FLAGS: list[Any] = [None, "yes", 0, 1.0, torch.tensor(True)]
NO_RATES: list[Any] = [None, 0.9, "0.9", "ab", "abc", {0.5, 0.75}, {"a": 0.5, "b": 0.5}, iter(())]


def rows() -> list[Any]:
    """(class, argument, what is given, what is raised, what the message calls it)."""
    found: list[Any] = []
    for kind, name, default in ARGUMENTS:
        if isinstance(default, bool):
            found += [(kind, name, value, TypeError, name) for value in NO_FLAGS]
        elif isinstance(default, tuple):
            found += [(kind, name, value, TypeError, name) for value in NO_RATES]
            for wrong in (default[:-1], (*default, 0.5), (), torch.full((5,), 0.5)):
                found.append((kind, name, wrong, ValueError, name))
            for index in range(len(default)):
                of_one = [*NO_NUMBERS, *((v, ValueError) for v in (*OUT_OF_RANGE, *BELOW, 1.0, 2))]
                for value, error in of_one:
                    betas = (*default[:index], value, *default[index + 1 :])
                    found.append((kind, name, betas, error, f"{name}[{index}]"))
        else:
            found += [(kind, name, value, error, name) for value, error in NO_NUMBERS]
            below = [] if (kind.__name__, name) in ANY_SIGN else BELOW
            found += [(kind, name, value, ValueError, name) for value in (*OUT_OF_RANGE, *below)]
    return found


ROWS = rows()


def test_all_classes_and_arguments_are_tried():
    assert {kind.__name__ for kind in OWN} == {
        *("Lion", "AdEMAMix", "ADOPT", "Adan", "ScheduleFreeAdamW"),
        *("LARS", "LAMB", "NovoGrad", "StableAdamW"),
    }
    assert {(kind, name) for kind, name, *_ in ROWS} == {(k, name) for k, name, _ in ARGUMENTS}
    for kind in OWN:
        assert {"lr", "weight_decay", "maximize"} <= arguments_of(kind).keys()


@pytest.mark.parametrize("kind", OWN, ids=lambda kind: kind.__name__)
def test_what_an_argument_cannot_be_is_refused_by_name_value_and_mend(kind):
    for row_kind, name, value, error, called in ROWS:
        if row_kind is not kind:
            continue
        params = [torch.nn.Parameter(torch.ones(2))]
        given = value[int(called[-2])] if called.endswith("]") else value
        with pytest.raises((TypeError, ValueError)) as caught:
            kind(params, **{name: value})
        said = str(caught.value)
        place = f"{kind.__name__}({name}={value!r})"
        assert type(caught.value) is error, f"{place}: {said}"
        assert said.startswith(f"{called} must be "), f"{place}: {said}"
        assert repr(given) in said, f"{place}: {said}"
        assert ": give " in said, f"{place}: {said}"


@pytest.mark.parametrize(
    "as_given", [np.float32, torch.tensor, np.array, Decimal], ids=lambda kind: kind.__name__
)
@pytest.mark.parametrize("kind", OWN, ids=lambda kind: kind.__name__)
def test_numbers_of_other_kinds_step_as_pythons_do(kind, as_given, backend):
    numbers = {"lr": 0.25, "weight_decay": 0.5}
    betas = arguments_of(kind).get("betas")
    if betas is not None:
        numbers["betas"] = (0.5, 0.75, 0.875)[: len(betas)]  # exact in each kind
    stepped = []
    for make in (float, as_given):
        param = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        given = {
            name: tuple(map(make, value)) if isinstance(value, tuple) else make(value)
            for name, value in numbers.items()
        }
        optimizer = kind([param], **given)
        for _ in range(3):
            param.grad = torch.tensor([0.5, 1.0, -4.0])
            optimizer.step()
        stepped.append(param.detach())
    assert torch.equal(*stepped)
    assert not torch.equal(stepped[0], torch.tensor([1.0, -2.0, 3.0]))
