# SPDX-License-Identifier: Apache-2.0
"""The rules against independent truths: hand-worked steps, the rule in fp64, torch's own loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from bits import array_of, assert_same_bits, initial_state, oracle_steps, random_values
from cases import CASES, FULL, FULL_OTHERS, HANDS, OTHERS, Case, Hand, in_each, name_of

from pyupdate.kernels import oracle
from pyupdate.kernels.rules import RULES
from pyupdate.kernels.scalar import integer_power
from pyupdate.pytorch.engines import ROWS

every_case = pytest.mark.parametrize("case", CASES + OTHERS, ids=str)
full_precision = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)


# ----- the table ----------------------------------------------------------------------------------


def test_every_rule_has_its_rows():
    elementwise = {name for name, rule in RULES.items() if len(rule.stages) == 1}
    for cases in (CASES + OTHERS, FULL + FULL_OTHERS, [hand.case for hand in HANDS]):
        # What has a file of its own: test_schedulefree.py, test_muon.py, test_adafactor.py.
        assert {case.name for case in cases} == elementwise - {
            "schedulefree_adamw",
            "muon",
            "adafactor",
        }


@every_case
def test_a_row_says_which_rule_its_options_mean(case: Case):
    group = case.ours([torch.nn.Parameter(torch.ones(1))]).param_groups[0]
    row = ROWS[case.torch_class]
    assert row.rule(group) is case.rule
    assert row.counts_steps == case.step_is_counted


# ----- by hand ------------------------------------------------------------------------------------


@pytest.mark.parametrize("hand", HANDS, ids=lambda hand: str(hand.case))
def test_steps_worked_out_by_hand(hand: Hand, backend):
    param = torch.nn.Parameter(torch.tensor([hand.param, hand.param], dtype=torch.float64))
    optimizer = hand.case.ours([param])
    for grad, after in zip(hand.grads, hand.params, strict=True):
        param.grad = torch.full_like(param, grad)
        optimizer.step()
        assert param.tolist() == pytest.approx([after] * 2, rel=4e-16, abs=0.0)
    state = {name: optimizer.state[param][name].tolist() for name in hand.case.rule.state}
    assert state == {name: [value] * 2 for name, value in hand.state.items()}


@pytest.mark.parametrize("hand", HANDS, ids=lambda hand: str(hand.case))
def test_the_numpy_oracle_by_hand(hand: Hand):
    start = np.array([hand.param])
    grads = [np.array([grad]) for grad in hand.grads]
    param, state = oracle_steps(hand.case, start, grads)
    assert param.item() == pytest.approx(hand.params[-1], rel=4e-16, abs=0.0)
    assert {name: state[name].item() for name in hand.case.rule.state} == hand.state


# ----- within rounding of fp64 and of torch -------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """What an error is measured by, beside the value itself."""

    grad: np.ndarray
    """What enters the averages: for ADOPT the largest normed gradient."""
    squared: np.ndarray
    """What enters the average of squares: Adan adds a part of a difference, whose rounding stays
    where the sum cancels."""
    move: float
    """Of a parameter, the largest of the step: lr, where the rule divides by what it averages from
    its first step on."""
    lr: float


def sizes(case: Case, grad: np.ndarray, moved: np.ndarray, count: int) -> Sizes:
    lr = case.options["lr"]
    entering = np.full_like(grad, float(count) ** 0.25) if case.name == "adopt" else grad
    bias_corrected = case.name.startswith(("sgd", "adam_", "adamw")) or case.name == "adam"
    squared = np.abs(entering)
    if case.name == "adan":  # gradients are of at most 1, so a difference of |grad| + 1
        beta2 = dict(zip(case.rule.numbers, case.numbers()[1], strict=True))["beta2"]
        squared = squared + (1.0 - beta2) * (squared + 1.0)
    move = lr if bias_corrected else float(np.abs(moved).max())
    return Sizes(entering, squared, move, lr)


def bounds(name: str, value: np.ndarray, of: Sizes, eps: float) -> np.ndarray:
    """How far a value may be off, eps being the compute type's: 8 and 2 are the contract's."""
    size, grad = np.abs(value), np.abs(of.grad)
    if name == "param":
        return 8 * eps * np.maximum(size, of.move)
    if name == "momentum_buffer":
        # A sum, not an average, so momentum * buffer may be twice the larger of the two below. Half
        # an eps each: two roundings of it, four of the decayed gradient's term, one of the sum.
        # (RMSprop's sums what is divided already, of which lr times the largest is a move.)
        return 4.5 * eps * np.maximum(size, np.maximum(grad, of.move / of.lr))
    if name in ("exp_avg", "grad_avg", "exp_avg_slow"):
        return 2 * eps * np.maximum(size, grad)
    if name == "exp_avg_diff":  # of differences of two gradients of at most 1
        return 2 * eps * np.maximum(size, 2.0)
    if name in ("prev", "step_size", "previous_grad"):  # a copy and one product
        return eps * size
    if name == "ax":  # the parameter, or between it and what it was
        return 8 * eps * np.maximum(size, of.lr)
    if name in ("sum", "exp_inf"):
        # All terms are positive, so relative errors do not grow: twice 1.5 halves of the decayed
        # gradient's square, its own half and the sum's; without the square it is less.
        return 2.5 * eps * size
    if name == "acc_delta":
        # As well: a delta has 5 halves of what it divides by and 3 of the gradient, its square
        # twice that and 1, its product with 1 - rho 1, the sum 1.
        return 9.5 * eps * size
    assert name in ("exp_avg_sq", "max_exp_avg_sq", "square_avg")
    return 2 * eps * np.maximum(value, of.squared * of.squared)


class Beta(float):
    """A beta whose power torch takes as we do.

    In fp64 the last bit of beta2 ** t decides about 1 - beta2 ** t, which magnifies it by 167 at
    step 6: 40 eps of lr between two right answers. The power itself is held to exact arithmetic in
    test_language.py; everything else of torch's loop stays as it is.
    """

    def __pow__(self, exponent: float) -> float:  # type: ignore[override]
        return integer_power(float(self), float(exponent))


def assert_within_bounds(
    found: dict[str, np.ndarray],
    truth: dict[str, np.ndarray],
    of: Sizes,
    eps: float,
    what: str,
    decided: np.ndarray,
) -> None:
    for name, value in truth.items():
        bound = bounds(name, value, of, eps)
        excess = np.where(decided, np.abs(found[name] - value) - bound, 0.0)
        worst = int(excess.argmax())
        assert excess[worst] <= 0.0, (
            f"{what}: {name}[{worst}] is {found[name][worst]!r} instead of {value[worst]!r}, "
            f"{np.abs(found[name] - value)[worst] / bound[worst]:.2f} of the bound"
        )


def values_of(param: torch.Tensor, inner: dict[str, Any], case: Case) -> dict[str, np.ndarray]:
    tensors = {"param": param, **{name: inner[name] for name in case.rule.state}}
    return {name: array_of(tensor).astype(np.float64) for name, tensor in tensors.items()}


def gradient(rng: np.random.Generator, size: int, case: Case) -> np.ndarray:
    """Gradients for which the bounds can hold: of unit size, and no decay cancels them.

    Where grad + weight_decay * param is a small difference, its relative error has no bound, and
    Adam divides by its size; so there the gradient is twice the decay or more.
    """
    values = rng.uniform(-1.0, 1.0, size)
    if case.options.get("weight_decay", 0.0) == 0.0 or case.decay_is_decoupled:
        return values
    return np.copysign(0.5 + 0.5 * np.abs(values), values)


def decided(case: Case, grad: np.ndarray, state: dict[str, np.ndarray], eps: float) -> np.ndarray:
    """Where a rule's choice does not hang on a rounding: the sign that Lion takes."""
    if case.name != "lion":
        return np.ones(grad.shape, bool)
    _, (_, beta1, *_) = case.numbers()
    mixed = beta1 * state["exp_avg"] + (1.0 - beta1) * grad * case.numbers()[0]
    return np.abs(mixed) > 2 * eps


def check_against_truths(case: Case, dtype: torch.dtype, size: int, steps: int) -> None:
    rng = np.random.default_rng(41)
    eps = torch.finfo(dtype).eps
    sign, numbers = case.numbers()
    param = torch.nn.Parameter(torch.from_numpy(rng.uniform(-2.0, 2.0, size)).to(dtype))
    twin = torch.nn.Parameter(param.detach().clone())
    ours, truth = case.ours([param]), case.truth([twin])
    for group in truth.param_groups:
        if "betas" in group:
            group["betas"] = tuple(map(Beta, group["betas"]))
    before = oracle.load(array_of(param)).astype(np.float64)
    state = initial_state(case, before)
    for count in range(1, steps + 1):
        grad = torch.from_numpy(gradient(rng, size, case)).to(dtype)
        wide = array_of(grad).astype(np.float64)
        param.grad, twin.grad = grad, grad.clone()
        ours.step()
        truth.step()
        found = values_of(param, ours.state[param], case)
        of_torch = values_of(twin, truth.state[twin], case)
        in_fp64, after = oracle.step(
            case.rule, before, wide, state, numbers, count=count, multiplier=sign
        )
        exact = {"param": in_fp64, **after}
        if case.rule.scalars:
            scalars = {n: float(truth.state[twin][n]) for n in case.rule.scalars}
            ours_scalars = {n: float(ours.state[param][n]) for n in case.rule.scalars}
            assert ours_scalars == pytest.approx(scalars, rel=4 * eps)
            exact = {name: exact[name] for name in ("param", *case.rule.state)}
        of = sizes(case, wide, in_fp64 - before, count)
        sure = decided(case, wide, state, eps)
        assert sure.mean() > 0.999
        assert_within_bounds(found, exact, of, eps, f"fp64 oracle, step {count}", sure)
        assert_within_bounds(found, of_torch, of, eps, f"torch, step {count}", sure)
        # All go on from ours.
        before = found["param"]
        state |= {name: found[name] for name in case.rule.state}
        state |= {n: array_of(ours.state[param][n]).copy() for n in case.rule.scalars}
        with torch.no_grad():
            twin.copy_(param)
            for name in (*case.rule.state, *case.rule.scalars):
                truth.state[twin][name].copy_(ours.state[param][name])


@pytest.fixture
def scalars_of(dtype: torch.dtype) -> Iterator[None]:
    """Scalars are of the default dtype: in fp64 they must not be the coarsest of all."""
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(torch.float32)


@in_each([torch.float32, torch.float64])
def test_within_rounding_of_fp64_and_of_torch(case, dtype, backend, scalars_of):
    check_against_truths(case, dtype, size=10_000, steps=20)


def slow_but_for(*names: str) -> list[Any]:
    """The full cases, of which these rules' are in `make test` too."""
    return [
        pytest.param(case, marks=() if case.name in names else pytest.mark.slow, id=str(case))
        for case in (*FULL, *FULL_OTHERS)
    ]


# What ten thousand show, a hundred times.
@full_precision
@pytest.mark.parametrize("case", slow_but_for("adamw"))
def test_a_million_elements_within_rounding_of_fp64_and_of_torch(case, dtype, compiled, scalars_of):
    check_against_truths(case, dtype, size=1_000_000, steps=20)


# ----- half precision is the rounding of fp32 -----------------------------------------------------


@pytest.mark.slow_reference
@in_each([torch.bfloat16, torch.float16])
def test_half_precision_is_the_fp32_rule_rounded_to_nearest_even(case, dtype, backend):
    size, rng = 50_000, np.random.default_rng(42)
    param = torch.nn.Parameter(random_values(rng, size, dtype))
    wide = torch.nn.Parameter(param.detach().float())
    half, full = case.ours([param]), case.ours([wide])
    for count in range(1, 21):
        # Everything from fp16's subnormals to where its results overflow.
        grad = random_values(rng, size, dtype) * 2.0 ** float(rng.integers(-10, 5))
        param.grad, wide.grad = grad, grad.float()
        half.step()
        full.step()
        pairs = {"param": (param, wide)}
        pairs |= {n: (half.state[param][n], full.state[wide][n]) for n in case.rule.state}
        for name, (narrow, from_fp32) in pairs.items():
            # Torch rounds to nearest even; test_storage.py holds both to numpy's conversion.
            rounded = from_fp32.detach().to(dtype)
            assert_same_bits(narrow, array_of(rounded), f"step {count}, {name}")
            with torch.no_grad():  # the fp32 twin goes on from what was stored
                from_fp32.copy_(rounded)
