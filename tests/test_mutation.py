# SPDX-License-Identifier: Apache-2.0
"""Every sign and every comparison of the mathematics, turned in turn: the truths must notice each.

The truths are those of test_oracle.py: torch's own loop, and numbers worked out by hand. Mutants
run on the numpy oracle, which test_bitwise.py ties to every back end.
"""

from __future__ import annotations

import ast
import importlib.util
import math
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import test_layerwise
import test_schedulefree
import torch
from bits import initial_state
from cases import CASES, HANDS, OTHERS, Case
from scalar_truths import log_pairs, points

from pyupdate.kernels import families, language, oracle, rules, scalar
from pyupdate.kernels.language import Rule
from pyupdate.pytorch.rows import numbers_of

# Each operator's mutants: the opposite, and for an order also the same with the other edge.
_TURNED: dict[type, tuple[type, ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Lt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
}

STEPS = 7  # of which RAdam rectifies the last two


# ----- the mutants --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutant:
    """One operator of a source file, and what it is turned into."""

    module: ModuleType
    function: str
    index: int
    """Of the operator, among all of the file."""
    line: int
    other: type

    def __str__(self) -> str:
        file = Path(str(self.module.__file__)).stem
        return f"{file}.{self.function}:{self.line}:{self.index}:{self.other.__name__}"


def operators(tree: ast.AST) -> list[tuple[Any, str, int]]:
    """Every operator of a tree that can be turned: the node, the attribute, its index there."""
    found: list[tuple[Any, str, int]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and type(node.op) in _TURNED:
            found.append((node, "op", -1))
        elif isinstance(node, ast.Compare):
            found += [(node, "ops", i) for i, op in enumerate(node.ops) if type(op) in _TURNED]
    return found


def operator_at(node: Any, attribute: str, index: int) -> Any:
    return getattr(node, attribute) if index < 0 else getattr(node, attribute)[index]


def tree_of(module: ModuleType) -> ast.Module:
    return ast.parse(Path(str(module.__file__)).read_text())


def mutants(module: ModuleType, *functions: str) -> list[Mutant]:
    """Of some functions of a module; of the whole file if none is named."""
    tree = tree_of(module)
    owner = {
        id(node): top.name
        for top in tree.body
        if isinstance(top, ast.FunctionDef)
        for node in ast.walk(top)
    }
    found = []
    for i, place in enumerate(operators(tree)):
        name = owner.get(id(place[0]), "")
        if not functions or name in functions:
            others = _TURNED[type(operator_at(*place))]
            found += [Mutant(module, name, i, place[0].lineno, other) for other in others]
    return found


def turned(mutant: Mutant, folder: Path) -> ModuleType:
    """The module with that operator turned."""
    tree = tree_of(mutant.module)
    node, attribute, index = operators(tree)[mutant.index]
    if index < 0:
        setattr(node, attribute, mutant.other())
    else:
        getattr(node, attribute)[index] = mutant.other()
    path = folder / "turned.py"
    path.write_text(ast.unparse(tree))  # a file, so that its text can be read
    with modules_put_back():
        return loaded(mutant.module.__name__, path)


def loaded(name: str, path: Path) -> ModuleType:
    """A module of that name from that file, which is what others then import by the name."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def modules_put_back() -> Iterator[None]:
    before = dict(sys.modules)
    try:
        yield
    finally:
        sys.modules.clear()
        sys.modules.update(before)


# ----- the families -------------------------------------------------------------------------------


def leans_on(family: ModuleType) -> set[str]:
    """The names of the families whose functions a family calls."""
    used = {getattr(value, "__module__", "") for value in vars(family).values()}
    return {name for name in used if name.startswith(f"{families.__name__}.")} - {family.__name__}


def rules_in(family: ModuleType) -> dict[str, Rule]:
    return {name: entry for name, entry in vars(family).items() if isinstance(entry, Rule)}


_FOUND = {
    (name := f"{families.__name__}.{found.name}"): importlib.import_module(name)
    for found in pkgutil.iter_modules(families.__path__)
}
_ORDER = TopologicalSorter({name: leans_on(family) for name, family in _FOUND.items()})
FAMILIES = [_FOUND[name] for name in _ORDER.static_order()]
"""Each after those that it leans on."""


def rules_of(mutant: Mutant, module: ModuleType) -> dict[str, Rule]:
    """The rules of a turned family, and those of the families that lean on it, made anew."""
    found = rules_in(module)
    changed = {module.__name__}
    with modules_put_back():
        sys.modules[module.__name__] = module
        for family in FAMILIES:
            if leans_on(family) & changed and family is not mutant.module:
                found |= rules_in(loaded(family.__name__, Path(str(family.__file__))))
                changed.add(family.__name__)
    return found


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


@contextmanager
def scalars_in_fp64() -> Iterator[None]:
    """Torch keeps a parameter's scalars, such as NAdam's mu_product, in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@scalars_in_fp64()
def rules_hold(found: Mapping[str, Rule]) -> None:
    """Each of these rules steps as torch's loop does, and as by hand."""
    for case in CASES + OTHERS:
        if case.name not in found:
            continue
        start, grads, after = problem(case)
        param, state = start, initial_state(case, start)
        sign, numbers = case.numbers()
        for count, (grad, truth) in enumerate(zip(grads, after, strict=True), 1):
            param, state = oracle.step(
                found[case.name], param, grad, state, numbers, count=count, multiplier=sign
            )
            for name, expected in truth.items():
                value = param if name == "param" else state[name]
                np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-15, err_msg=name)
    for hand in HANDS:
        if hand.case.name not in found:
            continue
        param = np.array([hand.param])
        state = initial_state(hand.case, param)
        sign, numbers = hand.case.numbers()
        for count, (grad, after) in enumerate(zip(hand.grads, hand.params, strict=True), 1):
            param, state = oracle.step(
                found[hand.case.name],
                *(param, np.array([grad]), state, numbers),
                count=count,
                multiplier=sign,
            )
            assert param.item() == pytest.approx(after, rel=4e-16, abs=0.0)
    layerwise_hold(found)
    if "schedulefree_adamw" in found:
        schedulefree_holds(found["schedulefree_adamw"])
    if "muon" in found:
        _, state = oracle.step(
            found["muon"],
            *map(np.array, ([1.0], [3.0])),
            {"momentum_buffer": np.ones(1)},
            [0.75],
            count=2,
        )
        assert state["momentum_buffer"].item() == 1.0 + (3.0 - 1.0) * 0.25
    if "adafactor" in found:
        hypers, _ = found["adafactor"].prepared(16, [0.5, -0.75, 0.25], {})
        assert hypers == {"decay": 0.875, "rho": 0.25, "one_minus_beta2": 0.125}


def schedulefree_holds(found: Rule) -> None:
    """Against the paper's three sequences."""
    rng = np.random.default_rng(93)
    for options in test_schedulefree.OPTIONS:
        param = rng.standard_normal(20)
        grads = [rng.standard_normal(20) for _ in range(STEPS)]
        truth = test_schedulefree.formula(param, grads, **options)
        group = test_schedulefree.made([torch.nn.Parameter(torch.zeros(1))], **options).param_groups
        _, *numbers = numbers_of(found, group[0])
        state = {"z": param, "exp_avg_sq": np.zeros(20)}
        state |= {name: np.zeros(()) for name in found.scalars}
        for count, grad in enumerate(grads, 1):
            param, state = oracle.step(found, param, grad, state, numbers, count=count)
        for name, value in {"param": param, **state}.items():
            np.testing.assert_allclose(value, truth[name], rtol=1e-9, atol=1e-15, err_msg=name)


def layerwise_hold(found: Mapping[str, Rule]) -> None:
    """Rules of several stages, on whole tensors, against the papers' formulas."""
    rng = np.random.default_rng(92)
    for case in test_layerwise.CASES:
        if case.rule not in found:
            continue
        for param in (rng.standard_normal(20), np.zeros(20)):
            grads = [rng.standard_normal(20), np.zeros(20), rng.standard_normal(20)]
            sign = -1.0 if case.maximize else 1.0
            truth = case.formula(param, [sign * grad for grad in grads], **case.options)
            after, state = case.on_numpy(param, grads, scalar=np.float64, rule=found[case.rule])
            for name, value in {"param": after, **state}.items():
                np.testing.assert_allclose(value, truth[name], rtol=1e-9, atol=1e-15, err_msg=name)


def reductions_hold(found: ModuleType) -> None:
    """The norm's summand, the finite check, and the clip of torch's clip_grad_norm_."""
    assert found.squared(3.0) == 9.0
    for value in (0.0, -0.0, -1.5, 1e308, 5e-324, -math.inf):
        assert str(found.magnitude(value)) == str(abs(value))  # the sign of a zero too
    assert found.averaged(3.0, 7.0, 0.25) == 4.0
    for value in (0.0, 0.5, -0.5, 0.75, -0.75, math.inf, -math.inf):
        assert found.clipped(value, 0.5) == min(max(value, -0.5), 0.5)
    assert str(found.clipped(-0.0, 0.0)) == "-0.0"
    assert str(found.clipped(0.0, 0.0)) == "0.0"
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
    for a, b in ((1.0, 2.0**-60), (0.1, 0.7), (-3.3, 1e-9), (1e-9, -3.3), (1e17, -1.25)):
        total, rest = found.two_sum(a, b)
        assert total == a + b
        assert Fraction(total) + Fraction(rest) == Fraction(a) + Fraction(b)
        product, rest = found.two_product(a, b)
        assert product == a * b
        assert Fraction(product) + Fraction(rest) == Fraction(a) * Fraction(b)
    for x, exact, rest in log_pairs(40):
        log_x, log_rest = found.log_pair(x)
        assert log_x == exact
        assert abs(log_rest - rest) <= 2.0**-61 * abs(exact)
    for point in points(40):
        assert point.error(getattr(found, point.name)(*point.arguments)) <= point.bound, point
    special_powers_hold(found)


def special_powers_hold(found: ModuleType) -> None:
    inf, nan = math.inf, math.nan
    for x, expected in ((inf, inf), (-inf, 0.0), (nan, nan), (1e300, inf), (-1e300, 0.0)):
        assert found.exp(x) == pytest.approx(expected, nan_ok=True)
    for x, expected in ((inf, inf), (0.0, -inf), (-1.0, nan), (-inf, nan), (nan, nan)):
        assert found.log(x) == pytest.approx(expected, nan_ok=True)
    for exponent, *expected in (  # of 0, inf, -2, nan, 0.5, 2 and 1
        (0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
        (2.0, 0.0, inf, nan, nan, 0.25, 4.0, 1.0),
        (-1.0, inf, 0.0, nan, nan, 2.0, 0.5, 1.0),
        (inf, 0.0, inf, nan, nan, 0.0, inf, 1.0),
        (-inf, inf, 0.0, nan, nan, inf, 0.0, 1.0),
        (nan, *[nan] * 7),
    ):
        for base, truth in zip((0.0, inf, -2.0, nan, 0.5, 2.0, 1.0), expected, strict=True):
            assert found.power(base, exponent) == pytest.approx(truth, nan_ok=True)


def extremes_hold(found: ModuleType) -> None:
    values = (-2.0, 0.0, 1.0, math.inf, -math.inf)
    for a in values:
        assert math.isnan(found.maximum(a, math.nan))
        assert math.isnan(found.maximum(math.nan, a))
        assert math.isnan(found.minimum(a, math.nan))
        assert math.isnan(found.minimum(math.nan, a))
        for b in values:
            assert (found.maximum(a, b), found.minimum(a, b)) == (max(a, b), min(a, b))
    for extreme in (found.maximum, found.minimum):  # of equals the second
        assert math.copysign(1.0, extreme(0.0, -0.0)) == -1.0
        assert math.copysign(1.0, extreme(-0.0, 0.0)) == 1.0
    for x in (*values, 5e-324, -5e-324):
        assert (found.absolute(x), found.sign(x)) == (abs(x), math.copysign(1.0, x) if x else x)
    assert math.copysign(1.0, found.absolute(-0.0)) == math.copysign(1.0, found.absolute(0.0)) == 1
    assert math.copysign(1.0, found.sign(-0.0)) == -1.0
    assert math.isnan(found.absolute(math.nan)) and math.isnan(found.sign(math.nan))


# ----- each mutant must be noticed ----------------------------------------------------------------

Truth = Callable[[Any], None]

_EXTREMES = ("maximum", "minimum", "absolute", "sign")

MUTANTS: list[tuple[Mutant, Truth]] = [
    *((mutant, rules_hold) for family in FAMILIES for mutant in mutants(family)),
    *((mutant, reductions_hold) for mutant in mutants(rules)),
    *((mutant, powers_hold) for mutant in mutants(scalar)),
    *((mutant, extremes_hold) for mutant in mutants(language, *_EXTREMES)),
]


def test_the_text_as_it_stands_holds():
    rules_hold(rules.RULES)
    reductions_hold(rules)
    powers_hold(scalar)
    extremes_hold(language)


EQUAL = {
    # A number at the edge is scaled up and down again, or both branches agree there.
    ("log_pair", "x > 0.0", "GtE"),
    ("log_pair", f"m < {2.0**64}", "LtE"),
    ("exp_pair", "x < -746.0", "LtE"),
    ("exp_pair", "x > 710.0", "GtE"),
    ("exp_pair", "n < 0.0", "LtE"),
    ("power", f"exponent > {2.0**64}", "GtE"),
    ("power", f"y < -{2.0**64}", "LtE"),
    # An exponent of zero never gets so far.
    ("power", "exponent > 0.0", "GtE"),
    ("power", "exponent < 0.0", "LtE"),
    # The length that RAdam asks for is never met to the last digit.
    ("prepare_radam", "rho > 5.0", "GtE"),
    # What is at a bound is the bound.
    ("adopt", "root < eps", "LtE"),
    ("adopt", "normed > largest", "GtE"),
    ("adopt", "normed < least", "LtE"),
    ("rprop", "step_size < step_size_min", "LtE"),
    ("prepare_schedulefree", "step < warmup_steps", "LtE"),
    ("rprop", "step_size > step_size_max", "GtE"),
    # 2^27 - 1 halves as well as 2^27 + 1, and what is left of a sum is too small to add.
    ("upper_half", "134217728.0 + 1.0", "Sub"),
    ("log", "log_x + log_rest", "Sub"),
}
"""Mutants that compute the same: function, expression, what it is turned into."""


def is_equal(mutant: Mutant) -> bool:
    node = operators(tree_of(mutant.module))[mutant.index][0]
    return (mutant.function, ast.unparse(node), mutant.other.__name__) in EQUAL


@pytest.mark.parametrize(("mutant", "truth"), MUTANTS, ids=[str(mutant) for mutant, _ in MUTANTS])
def test_a_turned_operator_is_noticed(mutant, truth, tmp_path):
    module = turned(mutant, tmp_path)
    found = rules_of(mutant, module) if truth is rules_hold else module
    if is_equal(mutant):
        truth(found)
        return
    with pytest.raises(AssertionError):
        truth(found)


def test_mutants_reach_every_function_with_an_operator():
    of_rules = {mutant.function for mutant, truth in MUTANTS if truth is rules_hold}
    assert {"coupled_decay", "prepare_adam", "adam_moments", "adam_move"} <= of_rules
    assert "" not in of_rules, "an operator stands outside of a function"
    assert {name for family in FAMILIES for name in rules_in(family)} == set(rules.RULES)
    assert len(MUTANTS) > 30
