# SPDX-License-Identifier: Apache-2.0
"""Every sign and every comparison of the mathematics, turned in turn: the truths must notice each.

The truths are those of test_oracle.py: torch's own loop, and numbers worked out by hand. Mutants run
on the numpy oracle, which test_bitwise.py ties to every back end.
"""

from __future__ import annotations

import ast
import importlib.util
import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from bits import initial_state
from cases import CASES, HANDS, Case

from pyupdate.kernels import language, oracle, rules, scalar

# Any of these makes a statement about the element or the step another one.
_TURNED: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}

STEPS = 3

EQUIVALENT: dict[str, str] = {}
"""Mutants that compute the same, with the reason: `place` of the mutant -> why."""


# ----- the mutants --------------------------------------------------------------------------------


class Place:
    """One operator of a source file."""

    def __init__(self, module: ModuleType, function: str, line: int, column: int, name: str):
        self.module, self.line, self.column = module, line, column
        self.said = f"{module.__name__.rpartition('.')[2]}.{function}:{line}:{column}:{name}"

    def __str__(self) -> str:
        return self.said


def operators(tree: ast.AST) -> Iterator[tuple[Any, str, int | None]]:
    """Nodes that hold an operator, the attribute where, and its index in a list."""
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp):
            yield node, "op", None
        elif isinstance(node, ast.Compare):
            yield from ((node, "ops", i) for i in range(len(node.ops)))


def operator_at(node: Any, attribute: str, index: int | None) -> Any:
    value = getattr(node, attribute)
    return value if index is None else value[index]


def places(module: ModuleType, *functions: str) -> list[Place]:
    """Every sign and comparison in functions of a module; in all of its functions if none is named."""
    found = []
    for top in ast.parse(Path(module.__file__).read_text()).body:
        if not isinstance(top, ast.FunctionDef) or (functions and top.name not in functions):
            continue
        for node, attribute, index in operators(top):
            operator = operator_at(node, attribute, index)
            if type(operator) in _TURNED:
                name = type(operator).__name__
                found.append(Place(module, top.name, node.lineno, node.end_col_offset, name))
    return found


def turned(place: Place, folder: Path) -> ModuleType:
    """The module with that operator turned, loaded from a file so that its text can be read."""
    tree = ast.parse(Path(place.module.__file__).read_text())
    hits = 0
    for node, attribute, index in operators(tree):
        operator = operator_at(node, attribute, index)
        here = (node.lineno, node.end_col_offset) == (place.line, place.column)
        if here and place.said.endswith(f":{type(operator).__name__}"):
            other = _TURNED[type(operator)]()
            if index is None:
                setattr(node, attribute, other)
            else:
                getattr(node, attribute)[index] = other
            hits += 1
    assert hits == 1, place
    name = f"{place.module.__package__}.turned_{place.module.__name__.rpartition('.')[2]}"
    path = folder / "turned.py"
    path.write_text(ast.unparse(tree))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ----- the truths of the rules --------------------------------------------------------------------


@cache
def problem(case: Case) -> tuple[Any, list[Any], list[dict[str, Any]]]:
    """Start, gradients, and after each step what torch's loop has."""
    rng = np.random.default_rng(91)
    start = np.append(rng.standard_normal(50), [0.0, 1.0])
    # Falling sizes, so that amsgrad's maximum is not simply the last.
    grads = [rng.standard_normal(52) * 4.0**-t for t in range(STEPS)]
    param = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = case.truth([param])
    after = []
    for grad in grads:
        param.grad = torch.from_numpy(grad.copy())
        optimizer.step()
        state = {name: optimizer.state[param][name] for name in case.rule.state}
        kept = {"param": param.detach(), **state}
        after.append({name: value.numpy().copy() for name, value in kept.items()})
    return start, grads, after


def rules_hold(found: ModuleType) -> None:
    """Each rule of a rules module steps as torch's loop does, and as by hand."""
    for case in CASES:
        start, grads, after = problem(case)
        param, state = start, initial_state(case, start)
        sign, numbers = case.numbers()
        for count, (grad, truth) in enumerate(zip(grads, after, strict=True), 1):
            param, state = oracle.step(
                found.RULES[case.name], param, grad, state, numbers, count=count, multiplier=sign
            )
            for name, expected in truth.items():
                value = param if name == "param" else state[name]
                np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-15, err_msg=name)
    for hand in HANDS:
        param = np.array([hand.param])
        state = initial_state(hand.case, param)
        sign, numbers = hand.case.numbers()
        for count, (grad, after) in enumerate(zip(hand.grads, hand.params, strict=True), 1):
            param, state = oracle.step(
                found.RULES[hand.case.name],
                *(param, np.array([grad]), state, numbers),
                count=count,
                multiplier=sign,
            )
            assert param.item() == pytest.approx(after, rel=4e-16, abs=0.0)


def reductions_hold(found: ModuleType) -> None:
    """The norm's summand, the finite check, and the clip of torch's clip_grad_norm_."""
    assert found.squared(3.0) == 9.0
    for value in (0.0, -1.5, 1e308, 5e-324):
        assert found.nonfinite(value) == 0.0
    for value in (math.inf, -math.inf, math.nan):
        assert found.nonfinite(value) == 1.0
    for norm in (0.0, 1e-7, 0.5, 4.0, math.inf, math.nan):
        for max_norm in (0.0, 0.5, 100.0):
            clip = (max_norm / (torch.tensor(norm, dtype=torch.float64) + 1e-6)).clamp(max=1.0)
            expected = 0.25 * clip.item()
            given = found.multiplier(norm, 0.25, max_norm)
            assert given == pytest.approx(expected, rel=1e-14, abs=0.0, nan_ok=True)
        assert found.multiplier(norm, 0.25, -1.0) == 0.25


def powers_hold(found: ModuleType) -> None:
    for base, exponent in ((0.5, 10), (3.0, 5), (2.0, 0), (1.5, 13), (-2.0, 7), (1.0, 2**53 - 1)):
        assert found.integer_power(base, float(exponent)) == base**exponent


def extremes_hold(found: ModuleType) -> None:
    values = (-2.0, 0.0, 1.0, math.inf, -math.inf)
    for a in values:
        assert math.isnan(found.maximum(a, math.nan))
        assert math.isnan(found.maximum(math.nan, a))
        assert math.isnan(found.minimum(a, math.nan))
        assert math.isnan(found.minimum(math.nan, a))
        for b in values:
            assert (found.maximum(a, b), found.minimum(a, b)) == (max(a, b), min(a, b))


def everything_holds(found: ModuleType) -> None:
    reductions_hold(found)
    rules_hold(found)


# ----- each mutant must be noticed ----------------------------------------------------------------

Truth = Callable[[ModuleType], None]

MUTANTS: list[tuple[Place, Truth]] = [
    *((place, everything_holds) for place in places(rules)),
    *((place, powers_hold) for place in places(scalar)),
    *((place, extremes_hold) for place in places(language, "maximum", "minimum")),
]


@pytest.mark.parametrize("truth", [everything_holds, powers_hold, extremes_hold])
def test_the_text_as_it_stands_holds(truth):
    module = {everything_holds: rules, powers_hold: scalar, extremes_hold: language}[truth]
    truth(module)


@pytest.mark.parametrize(("place", "truth"), MUTANTS, ids=lambda value: str(value)[:60])
def test_a_turned_operator_is_noticed(place, truth, tmp_path):
    mutant = turned(place, tmp_path)
    if str(place) in EQUIVALENT:
        truth(mutant)
        return
    with pytest.raises((AssertionError, language.RuleError)) as caught:
        truth(mutant)
    assert not isinstance(caught.value, language.RuleError), "a mutant must stay in the language"


def test_every_function_of_the_mathematics_is_turned():
    """None is left out because it has another shape."""
    text = Path(rules.__file__).read_text()
    total = sum(type(operator_at(*where)) in _TURNED for where in operators(ast.parse(text)))
    assert len(places(rules)) == total
    assert len(MUTANTS) >= 40
