# SPDX-License-Identifier: Apache-2.0
"""What users do to parameters, gradients, state and groups between steps: as in torch's own loop.

Every edit is made to a model under test and to its twin under torch's ``foreach=False`` loop, in
fp64. A pointer, a step count or a list of parameters that went stale would show at once.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from bits import assert_same_bits
from cases import FULL, Case
from edits import EDITS, ONCE, Side
from torch import nn
from ways import optimizer_of, ways

import pyupdate

# One rule whose steps only the plan counts, and the one with the most state.
SOME = tuple(case for case in FULL if case.name in ("sgd_momentum", "adamw_amsgrad"))
cases = pytest.mark.parametrize("case", SOME, ids=str)


def sides(way: str, case: Case) -> tuple[Side, Side]:
    return Side(lambda params: optimizer_of(way, case, params)), Side(case.truth)


def step(side: Side, turn: int) -> None:
    side.set_grads(fresh=turn % 3 == 0)
    if turn % 4 == 3:
        side.params[1].grad = None
    side.optimizer.step()


def assert_alike(ours: Side, truth: Side, when: str) -> None:
    close = {"rtol": 1e-9, "atol": 1e-12}
    for i, (param, other) in enumerate(zip(ours.params, truth.params, strict=True)):
        said = f"parameter {i} {when}: "
        torch.testing.assert_close(param, other, **close, msg=lambda m, s=said: s + m)
        state, expected = ours.optimizer.state.get(param), truth.optimizer.state.get(other)
        assert (state or {}).keys() == (expected or {}).keys(), said
        for key, value in (expected or {}).items():
            if value is None:
                assert state[key] is None
                continue
            text = f"{said}{key}: "
            torch.testing.assert_close(state[key], value, **close, msg=lambda m, s=text: s + m)


@pytest.mark.all_pairs
@cases
@ways
@pytest.mark.parametrize("edit", list(EDITS))
def test_an_edit_between_steps(case: Case, way, edit, backend):
    ours, truth = sides(way, case)
    for turn in range(6):
        for side in (ours, truth):
            if turn in (2, 4) and not (edit in ONCE and turn == 4):
                EDITS[edit](side)
            step(side, turn)
        assert_alike(ours, truth, f"after step {turn}")


@cases
@pytest.mark.parametrize("seed", range(3))
def test_edits_in_any_order(case: Case, seed, backend):
    order = np.random.default_rng(seed).permutation([e for e in EDITS if e not in ONCE])
    ours, truth = sides(("ours", "accelerated")[seed % 2], case)
    for turn, edit in enumerate(order[:16]):
        for side in (ours, truth):
            EDITS[edit](side)
            step(side, turn)
        assert_alike(ours, truth, f"after {list(order[: turn + 1])}")


# ----- gradients that only look unusual -----------------------------------------------------------


def negated_of_complex(values: torch.Tensor) -> torch.Tensor:
    """The imaginary part of a conjugate: a view that is negated when it is read."""
    made = torch.complex(torch.zeros_like(values), -values).conj().imag
    assert made.is_neg()
    return made


GRADIENTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "neg_view": lambda values: torch._neg_view(-values),
    "conj_imag": negated_of_complex,
    "twice": lambda values: torch._neg_view(torch._neg_view(values)),
}


@pytest.mark.all_pairs
@cases
@ways
@pytest.mark.parametrize("kind", list(GRADIENTS))
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (2,), (5, 7)], ids=str)
@pytest.mark.parametrize("max_norm", [None, 0.5], ids=["plain", "max_norm"])
def test_lazily_negated_gradients(case: Case, way, kind, shape, max_norm, backend):
    torch.manual_seed(4)
    start = torch.randn(shape)
    param, plain = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours, truth = (optimizer_of(way, case, [p], max_norm=max_norm) for p in (param, plain))
    kept = []
    for _ in range(3):
        values = torch.randn(shape)
        given = GRADIENTS[kind](values)
        kept.append((given, given.clone()))
        param.grad, plain.grad = given, values.clone()
        ours.step()
        truth.step()
    assert_same_bits(param, plain, kind)
    for given, before in kept:
        assert torch.equal(given, before)


def test_a_dense_negated_gradient_in_the_object_of_the_last_one(backend):
    start = torch.randn(12)
    view = negated_of_complex(torch.randn(6))
    truth = view.as_strided((12,), (1,), 0).clone()
    known = set()
    for _ in range(20):
        param, plain = nn.Parameter(start.clone()), nn.Parameter(start.clone())
        ours, theirs = (pyupdate.optim.SGD([one], lr=0.5) for one in (param, plain))
        param.grad, plain.grad = torch.ones(12), torch.ones(12)
        ours.step()
        theirs.step()
        was = id(param.grad)
        param.grad = None
        param.grad = view.as_strided((12,), (1,), 0)
        plain.grad = truth.clone()
        known.add(id(param.grad) == was)
        assert param.grad.is_neg()
        ours.step()
        theirs.step()
        assert_same_bits(param, plain, "dense")
    assert True in known  # the interesting case


@cases
@ways
def test_lazily_zero_gradients(case: Case, way, backend):
    param, plain = (nn.Parameter(torch.linspace(-1, 1, 6)) for _ in range(2))
    ours, truth = (optimizer_of(way, case, [p], max_norm=0.5) for p in (param, plain))
    for turn in range(4):
        plain.grad = torch.zeros(6) if turn % 2 else torch.arange(6.0)
        param.grad = torch._efficientzerotensor((6,)) if turn % 2 else torch.arange(6.0)
        ours.step()
        truth.step()
    assert_same_bits(param, plain, "zeros")


@pytest.mark.parametrize("what", ["parameter", "parameter later", "state"])
def test_lazily_negated_memory_is_never_written(what, backend):
    # Its bytes are the opposite of its values.
    param = nn.Parameter(torch.ones(3))
    optimizer = pyupdate.optim.SGD([param], lr=0.5, momentum=0.5)
    opposite = torch.complex(torch.zeros(3), torch.ones(3)).conj().imag
    if what == "parameter":
        param.data = opposite
    param.grad = torch.ones(3)
    if what != "parameter":
        optimizer.step()
        if what == "state":
            optimizer.state[param]["momentum_buffer"] = opposite
        else:
            param.data = opposite
    before = param.detach().clone()
    with pytest.raises(TypeError, match=r"is lazily negated.*resolve_neg"):
        optimizer.step()
    assert torch.equal(param, before) and torch.equal(opposite, -torch.ones(3))


def test_inference_tensors_are_refused_outside_of_inference_mode(backend):
    with torch.inference_mode():
        param = nn.Parameter(torch.ones(3), requires_grad=False)
    param.grad = torch.ones(3)
    optimizer = pyupdate.optim.SGD([param], lr=0.5)
    with pytest.raises(TypeError, match=r"inference tensor.*inference_mode.*clone"):
        optimizer.step()
    assert torch.equal(param, torch.ones(3))
    with torch.inference_mode():
        optimizer.step()
    assert torch.equal(param, torch.full((3,), 0.5))


@ways
@pytest.mark.parametrize("number", [3, 3.0], ids=["int", "float"])
def test_plain_numbers_as_step_counters(way, number, backend):
    case = next(c for c in FULL if c.name == "adam")
    ours, truth = sides(way, case)
    for side in (ours, truth):
        step(side, 0)
        for inner in side.optimizer.state.values():
            inner["step"] = number if side is ours else torch.tensor(3.0)
    for turn in (1, 2):
        for side in (ours, truth):
            step(side, turn)
    assert_alike(ours, truth, "after")
    assert all(float(s["step"]) == 5.0 for s in ours.optimizer.state.values())


@cases
@ways
def test_a_group_that_was_empty(case: Case, way, backend):
    params = [nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]
    for make, param in ((lambda p: optimizer_of(way, case, p), params[0]), (case.truth, params[1])):
        optimizer = make([{"params": []}])
        optimizer.step()
        optimizer.param_groups[0]["params"].append(param)
        for turn in range(3):
            param.grad = torch.full_like(param, turn + 1.0)
            optimizer.step()
    assert float(params[0].detach()[0]) != 1.0
    torch.testing.assert_close(params[0], params[1], rtol=1e-11, atol=0)
