# SPDX-License-Identifier: Apache-2.0
"""LARS, LAMB, NovoGrad, StableAdamW: by hand, by their papers' formulas in fp64, on every back end.

A tensor's norm decides about all of its elements, so tensors are stepped here as they are, not laid
end to end as the elementwise rules' are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from bits import array_of, assert_same_bits, random_values, torch_steps
from cases import DTYPES, name_of

import pyupdate
from pyupdate.kernels import oracle
from pyupdate.kernels.language import Rule
from pyupdate.kernels.rules import RULES
from pyupdate.pytorch.engines import ROWS
from pyupdate.pytorch.rows import numbers_of

STEPS = 5
SIZES = (0, 1, 2, 31, 2_047, 2_049, 16_384, 16_385, 100_003)


# ----- the papers' formulas, whole tensors in fp64 ------------------------------------------------


def lars(
    p: Any, grads: Sequence[Any], *, lr: float, momentum: float = 0.9, dampening: float = 0.0,
    weight_decay: float = 0.0, nesterov: bool = False, trust_coefficient: float = 1e-3,
    adapt: bool = True,
) -> dict[str, Any]:  # fmt: skip
    b = np.zeros_like(p)
    for g in grads:
        weight, grad = np.linalg.norm(p), np.linalg.norm(g)
        g = g + weight_decay * p
        if adapt and weight > 0 and grad + weight_decay * weight > 0:
            g = g * trust_coefficient * weight / (grad + weight_decay * weight)
        b = momentum * b + (1 - dampening) * g
        p = p - lr * (g if momentum == 0 else g + momentum * b if nesterov else b)
    return {"param": p} if momentum == 0 else {"param": p, "momentum_buffer": b}


def lamb(
    p: Any, grads: Sequence[Any], *, lr: float, betas: Any = (0.9, 0.999), eps: float = 1e-6,
    weight_decay: float = 0.0, bias_correction: bool = True, max_weight_norm: float = np.inf,
    adapt: bool = True,
) -> dict[str, Any]:  # fmt: skip
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        c1, c2 = (1 - beta**t if bias_correction else 1.0 for beta in betas)
        u = (m / c1) / (np.sqrt(v / c2) + eps) + weight_decay * p
        weight, move = min(np.linalg.norm(p), max_weight_norm), np.linalg.norm(u)
        p = p - lr * (weight / move if adapt and weight > 0 and move > 0 else 1.0) * u
    return {"param": p, "exp_avg": m, "exp_avg_sq": v}


def novograd(
    p: Any, grads: Sequence[Any], *, lr: float, betas: Any = (0.95, 0.98), eps: float = 1e-8,
    weight_decay: float = 0.0, grad_averaging: bool = False,
) -> dict[str, Any]:  # fmt: skip
    m, v = np.zeros_like(p), 0.0
    for t, g in enumerate(grads, 1):
        v = np.sum(g**2) if t == 1 else betas[1] * v + (1 - betas[1]) * np.sum(g**2)
        g = g / (np.sqrt(v) + eps) + weight_decay * p
        m = g if t == 1 else betas[0] * m + (1 - betas[0] if grad_averaging else 1.0) * g
        p = p - lr * m
    return {"param": p, "exp_avg": m, "second_moment": v}


def stable_adamw(
    p: Any, grads: Sequence[Any], *, lr: float, betas: Any = (0.9, 0.99), eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> dict[str, Any]:  # fmt: skip
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        b1, b2 = (beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in betas)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        rms = np.sqrt(np.mean(g**2 / np.maximum(v, eps**2))) if p.size else 0.0
        rate = lr / max(1.0, rms)
        p = p - rate * weight_decay * p - rate * m / (np.sqrt(v) + eps)
    return {"param": p, "exp_avg": m, "exp_avg_sq": v}


@dataclass(frozen=True)
class Case:
    """A rule, its class, the options it is made with, and the paper's formula."""

    rule: str
    kind: str
    formula: Callable[..., dict[str, Any]]
    options: dict[str, Any]
    maximize: bool = False

    def __str__(self) -> str:
        said = [f"{k}={v}" for k, v in self.options.items() if k != "lr"]
        return "-".join([self.rule, *said, *(["maximize"] if self.maximize else [])])

    def ours(self, params: Any) -> Any:
        made: Any = getattr(pyupdate.optim, self.kind)
        return made(params, **self.options, maximize=self.maximize)

    def on_numpy(
        self,
        param: Any,
        grads: Sequence[Any],
        multiplier: float = 1.0,
        scalar: Any = np.float32,
        rule: Rule | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        rule = RULES[self.rule] if rule is None else rule
        group = self.ours([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
        sign, *numbers = numbers_of(rule, group)
        like = oracle.load(param)
        state = {name: oracle.store(np.zeros_like(like), param) for name in rule.state}
        state |= {name: np.asarray(0.0, scalar) for name in rule.scalars}
        for count, grad in enumerate(grads, 1):
            param, state = oracle.step(
                rule, param, grad, state, numbers, count=count, multiplier=sign * multiplier
            )
        return param, state


_lars = {"lr": 0.5, "trust_coefficient": 0.25}
CASES = (
    Case("lars", "LARS", lars, {**_lars, "momentum": 0.0}),
    Case("lars", "LARS", lars, {**_lars, "momentum": 0.0, "weight_decay": 0.1}, maximize=True),
    Case("lars", "LARS", lars, {**_lars, "momentum": 0.0, "weight_decay": 0.1, "adapt": False}),
    Case("lars_momentum", "LARS", lars, {**_lars, "weight_decay": 0.1, "dampening": 0.25}),
    Case("lars_momentum", "LARS", lars, {**_lars, "nesterov": True}),
    Case("lamb", "LAMB", lamb, {"lr": 0.125, "weight_decay": 0.1}),
    Case("lamb", "LAMB", lamb, {"lr": 0.125, "bias_correction": False, "max_weight_norm": 2.0}),
    Case("lamb", "LAMB", lamb, {"lr": 0.125, "adapt": False, "weight_decay": 0.1}, maximize=True),
    Case("novograd", "NovoGrad", novograd, {"lr": 0.125}),
    Case("novograd", "NovoGrad", novograd, {"lr": 0.125, "weight_decay": 0.1}, maximize=True),
    Case("novograd", "NovoGrad", novograd, {"lr": 0.125, "grad_averaging": True}),
    Case("stable_adamw", "StableAdamW", stable_adamw, {"lr": 0.125}),
    Case("stable_adamw", "StableAdamW", stable_adamw, {"lr": 0.125, "betas": (0.5, 0.9375)}),
    Case("stable_adamw", "StableAdamW", stable_adamw, {"lr": 0.125, "eps": 0.5}, maximize=True),
)
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
LAYERWISE = {name for name, rule in RULES.items() if len(rule.stages) > 1}
first_cases = pytest.mark.parametrize(
    "case", [next(c for c in CASES if c.rule == name) for name in sorted(LAYERWISE)], ids=str
)


def test_every_rule_of_several_stages_stands_here():
    assert {case.rule for case in CASES} == LAYERWISE


@every_case
def test_a_row_says_which_rule_its_options_mean(case):
    optimizer = case.ours([torch.nn.Parameter(torch.ones(1))])
    assert ROWS[type(optimizer)].rule(optimizer.param_groups[0]) is RULES[case.rule]


# ----- by hand ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hand:
    """Steps of a tensor of two elements whose norms are whole numbers."""

    kind: str
    options: dict[str, Any]
    param: tuple[float, float]
    grads: tuple[tuple[float, float], ...]
    after: tuple[float, float]
    state: dict[str, Any]


HANDS = (
    # |p| = 5, |g| = 10: trust 0.5 * 5 / 10 = 0.25, so b = (1.5, 2) and p = (3, 4) - 0.5 b
    Hand(
        "LARS",
        {"lr": 0.5, "momentum": 0.5, "trust_coefficient": 0.5},
        (3.0, 4.0),
        ((6.0, 8.0),),
        (2.25, 3.0),
        {"momentum_buffer": [1.5, 2.0]},
    ),
    # with decay 0.5: trust 0.5 * 5 / (10 + 2.5) = 0.2; g + wd p = (7.5, 10); b = (1.5, 2)
    Hand(
        "LARS",
        {"lr": 0.5, "momentum": 0.5, "trust_coefficient": 0.5, "weight_decay": 0.5},
        (3.0, 4.0),
        ((6.0, 8.0),),
        (2.25, 3.0),
        {"momentum_buffer": [1.5, 2.0]},
    ),
    # m = 0.5 g = (3, 4), v = 0.25 g^2 = (9, 16), no correction: u = m / (sqrt(v) + 0) = (1, 1);
    # with decay 1: u = (1 + 3, 1 - 1) = (4, 0); |p| = sqrt(10) held to 2: p - 0.5 * 2 / 4 * u
    Hand(
        "LAMB",
        {
            "lr": 0.5,
            "betas": (0.5, 0.75),
            "eps": 0.0,
            "weight_decay": 1.0,
            "bias_correction": False,
            "max_weight_norm": 2.0,
        },
        (3.0, -1.0),
        ((6.0, 8.0),),
        (2.0, -1.0),
        {"exp_avg": [3.0, 4.0], "exp_avg_sq": [9.0, 16.0]},
    ),
    # v = 100, m = (6, 8) / 10; then v = 0.75 * 100 + 0.25 * 4 * 81 = 156.25 - 0.25: with
    # |g|^2 = 325 it is 75 + 81.25 = 156.25, whose root is 12.5; m = m / 2 + (10, 15) / 12.5
    Hand(
        "NovoGrad",
        {"lr": 1.0, "betas": (0.5, 0.75), "eps": 0.0},
        (0.0, 0.0),
        ((6.0, 8.0), (10.0, 15.0)),
        (-0.6 - 0.3 - 0.8, -0.8 - 0.4 - 1.2),
        {"exp_avg": [0.3 + 0.8, 0.4 + 1.2], "second_moment": 156.25},
    ),
    # step 1: both betas are 0 after correction: m = g, v = g^2, rms 1: p = 1 - 0.5 (1 - 0.5 decay)
    #         (1, 1) (1 - 0.25) - 0.5 = 0.25
    Hand(
        "StableAdamW",
        {"lr": 0.5, "betas": (0.5, 0.75), "eps": 0.0, "weight_decay": 0.5},
        (1.0, 1.0),
        ((2.0, 4.0),),
        (0.25, 0.25),
        {"exp_avg": [2.0, 4.0], "exp_avg_sq": [4.0, 16.0]},
    ),
)


@pytest.mark.parametrize("hand", HANDS, ids=lambda hand: hand.kind)
def test_steps_worked_out_by_hand(hand, backend):
    made: Any = getattr(pyupdate.optim, hand.kind)
    param = torch.nn.Parameter(torch.tensor(hand.param, dtype=torch.float64))
    optimizer = made([param], **hand.options)
    for grad in hand.grads:
        param.grad = torch.tensor(grad, dtype=torch.float64)
        optimizer.step()
    assert param.tolist() == pytest.approx(list(hand.after), rel=1e-15, abs=1e-15)
    for name, value in hand.state.items():
        assert optimizer.state[param][name].tolist() == pytest.approx(value, rel=1e-15)


# ----- the formulas -------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("size", [1, 5, 16_385, 40_000])
def test_the_papers_formula_in_fp64(case, size, backend):
    rng = np.random.default_rng(81)
    start = rng.standard_normal(size)
    grads = [rng.standard_normal(size) for _ in range(STEPS)]
    torch.set_default_dtype(torch.float64)  # what a scalar is kept in
    try:
        param = torch.nn.Parameter(torch.tensor(start))
        optimizer = case.ours([param])
        torch_steps(optimizer, [param], [[torch.tensor(grad)] for grad in grads])
    finally:
        torch.set_default_dtype(torch.float32)
    sign = -1.0 if case.maximize else 1.0
    truth = case.formula(start, [sign * grad for grad in grads], **case.options)
    found = {"param": param.detach(), **optimizer.state[param]}
    for name, expected in truth.items():
        # The order of a sum moves a norm by some eps; nothing here magnifies that.
        np.testing.assert_allclose(
            found[name].numpy(), expected, rtol=1e-12, atol=1e-13, err_msg=name
        )


@every_case
def test_fp32_is_within_rounding_of_the_formula(case, backend):
    rng = np.random.default_rng(82)
    start = rng.uniform(-2, 2, 30_000).astype(np.float32)
    grads = [rng.uniform(-1, 1, start.size).astype(np.float32) for _ in range(STEPS)]
    param = torch.nn.Parameter(torch.tensor(start))
    optimizer = case.ours([param])
    torch_steps(optimizer, [param], [[torch.tensor(grad)] for grad in grads])
    sign = -1.0 if case.maximize else 1.0
    wide = [sign * grad.astype(np.float64) for grad in grads]
    truth = case.formula(start.astype(np.float64), wide, **case.options)
    eps = np.finfo(np.float32).eps
    for name, expected in truth.items():
        found = (param.detach() if name == "param" else optimizer.state[param][name]).numpy()
        # A step may be 8 eps off (the bound of one elementwise step), and a later one carries it.
        scale = np.maximum(np.abs(expected), 1.0)
        assert np.max(np.abs(found - expected) / scale) <= 8 * STEPS * eps, name


# ----- every back end -----------------------------------------------------------------------------


def check(case: Case, dtypes: Sequence[torch.dtype], what: str) -> None:
    """Steps of one optimizer with tensors of every size, tensor k being of dtype k mod n."""
    rng = np.random.default_rng(83)
    kinds = [dtypes[k % len(dtypes)] for k in range(len(SIZES))]
    start = [random_values(rng, n, kind) for n, kind in zip(SIZES, kinds, strict=True)]
    grads = [
        [random_values(rng, n, kind) for n, kind in zip(SIZES, kinds, strict=True)]
        for _ in range(STEPS)
    ]
    params = [torch.nn.Parameter(value.clone()) for value in start]
    optimizer = case.ours(params)
    torch_steps(optimizer, params, grads)
    for i, param in enumerate(params):
        of_param = [array_of(row[i]) for row in grads]
        expected, states = case.on_numpy(array_of(start[i]), of_param)
        assert_same_bits(param, expected, f"{what}, size {SIZES[i]}")
        for name, state in states.items():
            found = optimizer.state[param][name]
            assert_same_bits(found, state, f"{what}, size {SIZES[i]}, {name}")


@every_dtype
@every_case
def test_reference_gives_the_bits_of_numpy(case, dtype):
    with pyupdate.use_backend("reference"):
        check(case, [dtype], "reference")


@every_dtype
@first_cases
def test_compiled_gives_the_bits_of_numpy(case, dtype, isas, threads, compiled):
    for isa, n in product(isas, threads):
        compiled.use_isa(isa)
        torch.set_num_threads(n)
        check(case, [dtype], f"{isa}, {n} threads")


@every_case
def test_all_dtypes_in_one_plan(case, compiled):
    check(case, DTYPES, "mixed")


@first_cases
@pytest.mark.parametrize("max_norm", [None, 1e9])
def test_rows_of_several_waves(case, max_norm, threads, compiled):
    """More than the 2^19 elements that are taken through all stages together, also backwards."""
    rng = np.random.default_rng(86)
    sizes = (5, 300_000, 400_000, 17, 0, 600_000, 100_000, 3)
    start = [random_values(rng, n, torch.float32) for n in sizes]
    grads = [[random_values(rng, n, torch.float32) for n in sizes] for _ in range(2)]
    truths = [
        case.on_numpy(array_of(value), [array_of(row[i]) for row in grads])
        for i, value in enumerate(start)
    ]
    for n in threads:
        torch.set_num_threads(n)
        params = [torch.nn.Parameter(value.clone()) for value in start]
        made: Any = getattr(pyupdate.optim, case.kind)
        optimizer = made(params, **case.options, maximize=case.maximize, max_norm=max_norm)
        torch_steps(optimizer, params, grads)
        for param, (expected, states) in zip(params, truths, strict=True):
            assert_same_bits(param, expected, f"{n} threads, size {param.numel()}")
            for name, state in states.items():
                what = f"{n} threads, size {param.numel()}, {name}"
                assert_same_bits(optimizer.state[param][name], state, what)


@first_cases
def test_a_scaler_and_a_clip_come_before_the_norms(case, backend):
    rng = np.random.default_rng(84)
    start, grad = (random_values(rng, 20_000, torch.float32) for _ in range(2))
    param = torch.nn.Parameter(start.clone())
    made: Any = getattr(pyupdate.optim, case.kind)
    optimizer = made([param], **case.options, maximize=case.maximize, max_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    torch_steps_scaled = [grad * 1024.0]
    param.grad = torch_steps_scaled[0]
    scaler.step(optimizer)
    last = pyupdate.last_update(optimizer)
    assert last is not None
    assert last.norm == pytest.approx(float(grad.double().norm()), rel=1e-6)
    expected, _ = case.on_numpy(array_of(start), [array_of(grad * 1024.0)], last.multiplier)
    assert_same_bits(param, expected, "scaled and clipped")


@first_cases
def test_a_skipped_step_moves_nothing(case, backend):
    param = torch.nn.Parameter(torch.ones(3_000))
    optimizer = case.ours([param])
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    param.grad = torch.ones(3_000)
    scaler.step(optimizer)
    scaler.update()
    before = param.detach().clone(), {k: v.clone() for k, v in optimizer.state[param].items()}
    param.grad = torch.ones(3_000)
    param.grad[2_999] = float("inf")
    scaler.step(optimizer)
    assert torch.equal(param, before[0])
    for name, value in before[1].items():
        assert torch.equal(optimizer.state[param][name], value), name


@first_cases
def test_a_state_dict_goes_on_where_it_was_saved(case, backend):
    rng = np.random.default_rng(85)
    start = random_values(rng, 3_000, torch.float32)
    grads = [random_values(rng, 3_000, torch.float32) for _ in range(6)]
    whole, first, second = (torch.nn.Parameter(start.clone()) for _ in range(3))
    torch_steps(case.ours([whole]), [whole], [[grad] for grad in grads])
    saved = case.ours([first])
    torch_steps(saved, [first], [[grad] for grad in grads[:3]])
    with torch.no_grad():
        second.copy_(first)
    loaded = case.ours([second])
    loaded.load_state_dict(saved.state_dict())
    torch_steps(loaded, [second], [[grad] for grad in grads[3:]])
    assert torch.equal(second, whole)
