# SPDX-License-Identifier: Apache-2.0
"""Rules of two and three stages with per-tensor sums: the same bits on numpy, reference and cpu."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from bits import array_of, assert_same_bits, random_values, torch_steps
from cases import DTYPES, name_of
from toy_rules import TOYS

import pyupdate
from pyupdate.backends import cpu as cpu_backend
from pyupdate.kernels import oracle
from pyupdate.kernels.language import Rule
from pyupdate.options import Options
from pyupdate.pytorch.engines import ROWS, engine_of, last_step
from pyupdate.pytorch.rows import OptimizerRow
from pyupdate.pytorch.step import step

NUMBERS = {"lr": 0.125, "momentum": 0.75}
STEPS = 4
SIZES = (0, 1, 2, 2_047, 2_049, 16_384, 16_385, 100_003, 7)

every_toy = pytest.mark.parametrize("rule", TOYS.values(), ids=lambda rule: rule.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


class Toy(torch.optim.Optimizer):
    """An optimizer for any rule with these numbers; torch has none, so numpy is the truth."""

    def __init__(self, params: Any, rule: Rule) -> None:
        super().__init__(params, {**NUMBERS, "rule": rule})

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return step(self, closure)


@pytest.fixture(autouse=True)
def toys_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry rows of the toy optimizer, for the length of a test."""
    row = OptimizerRow(lambda group: group["rule"], counts_steps=True)
    monkeypatch.setitem(ROWS, Toy, row)


@pytest.fixture(scope="module")
def toy_module(compiled: Any, toy_build: Any) -> Iterator[Any]:
    """The compiled toys, registered with the cpu back end while this file runs."""
    module = toy_build.module()
    cpu_backend.register_module(module)
    yield module
    cpu_backend._modules.remove(module)


# ----- the toys on numpy, against the mathematics written down once more --------------------------


def by_hand(name: str, param: Any, grads: Sequence[Any]) -> dict[str, Any]:
    """The toys in plain numpy and fp64, with numpy's own sums."""
    lr, momentum = NUMBERS.values()
    buffer, slow, spread = np.zeros_like(param), np.full_like(param, 0.25), np.zeros_like(param)
    start, average, level, product = param, np.full_like(param, lr), momentum, 1.0
    for t, grad in enumerate(grads, 1):
        rate = lr * t / (t + 1)
        if name == "toy_two":
            before = np.linalg.norm(param)
            buffer = momentum * buffer + grad
            param = param - rate * before / np.linalg.norm(buffer) * buffer
        elif name == "toy_turned":
            rate = lr * (1.5 - product)
            product = product * t / (t + momentum)
            start = 0.75 * start + 0.25 * param
            level = (1 - momentum) * level + momentum * np.mean(grad**2)
            taken = 1 / (np.sqrt(level) + 0.5)
            average = (1 - taken) * average + taken * grad
            param = param - rate * average * taken + rate * (start - param)
        else:
            slow = slow + rate * (param - slow)
            total = np.sum(grad + slow)
            spread = spread / 2 + (grad - total) ** 2
            squares = np.sum((grad - total) ** 2)
            scale = grad / (np.sqrt(spread) + np.sqrt(squares) + 1)
            param = param - rate * scale * (total - slow)
    if name == "toy_two":
        return {"param": param, "momentum_buffer": buffer}
    if name == "toy_turned":
        made = {"start": start, "slow": average, "level": level, "product": product}
        return {"param": param, **made}
    return {"param": param, "slow": slow, "spread": spread}


def on_numpy(
    rule: Rule,
    param: Any,
    grads: Sequence[Any],
    sign: float = 1.0,
    scalars: Any = np.float32,
    chance: tuple[int, int] | None = None,
) -> tuple[Any, dict[str, Any]]:
    like = oracle.load(param)

    def begin(initial: float | str) -> Any:
        return like if initial == "param" else np.full_like(like, NUMBERS.get(initial, initial))

    state = {name: oracle.store(begin(value), param) for name, value in rule.state.items()}
    state |= {name: np.asarray(NUMBERS.get(v, v), scalars) for name, v in rule.scalars.items()}
    for count, grad in enumerate(grads, 1):
        param, state = oracle.step(
            rule,
            param,
            grad,
            state,
            [*NUMBERS.values()],
            count=count,
            multiplier=sign,
            chance=chance,
        )
    return param, state


@every_toy
@pytest.mark.parametrize("size", [1, 5, 16_385, 40_000])
def test_numpy_runs_the_stages_in_order(rule, size):
    rng = np.random.default_rng(71)
    param = rng.standard_normal(size)
    grads = [rng.standard_normal(size) for _ in range(STEPS)]
    found, state = on_numpy(rule, param, grads, scalars=np.float64)
    for name, expected in by_hand(rule.name, param, grads).items():
        value = found if name == "param" else state[name]
        np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-12, err_msg=name)


# ----- every back end -----------------------------------------------------------------------------


def check(
    rule: Rule,
    dtypes: Sequence[torch.dtype],
    what: str,
    *,
    backends: tuple[str, ...],
    seed: int | None = None,
) -> None:
    """Steps of one optimizer with tensors of every size, tensor k being of dtype k mod n.

    With a seed, halves are rounded by chance.
    """
    rng = np.random.default_rng(72)
    kinds = [dtypes[k % len(dtypes)] for k in range(len(SIZES))]
    start = [random_values(rng, n, kind) for n, kind in zip(SIZES, kinds, strict=True)]
    grads = [
        [random_values(rng, n, kind) for n, kind in zip(SIZES, kinds, strict=True)]
        for _ in range(STEPS)
    ]
    params = [torch.nn.Parameter(value.clone()) for value in start]
    optimizer = Toy(params, rule)
    optimizer.pyupdate_options = Options(stochastic_rounding=seed is not None, seed=seed or 0)
    torch_steps(optimizer, params, grads)
    (plan,) = engine_of(optimizer).plans.values()
    assert plan.backends == backends
    for i, param in enumerate(params):
        of_param = [array_of(row[i]) for row in grads]
        chance = None if seed is None else (seed, i)
        expected, states = on_numpy(rule, array_of(start[i]), of_param, chance=chance)
        assert_same_bits(param, expected, f"{what}, size {SIZES[i]}")
        assert optimizer.state[param]["step"].item() == STEPS
        for name, state in states.items():
            found = optimizer.state[param][name]
            assert_same_bits(found, state, f"{what}, size {SIZES[i]}, {name}")


@every_dtype
@every_toy
def test_reference_gives_the_bits_of_numpy(rule, dtype):
    with pyupdate.use_backend("reference"):
        check(rule, [dtype], "reference", backends=("reference",))


@every_dtype
@every_toy
def test_compiled_gives_the_bits_of_numpy(rule, dtype, threads, toy_module):
    for isa, n in product(toy_module.isas(), threads):
        toy_module.use_isa(isa)
        torch.set_num_threads(n)
        check(rule, [dtype], f"{isa}, {n} threads", backends=("cpu",))


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=name_of)
@every_toy
def test_stages_that_round_by_chance_give_the_bits_of_numpy(rule, dtype, toy_module):
    for isa in toy_module.isas():
        toy_module.use_isa(isa)
        check(rule, [dtype], isa, backends=("cpu",), seed=5)
    with pyupdate.use_backend("reference"):
        check(rule, [dtype], "reference", backends=("reference",), seed=5)


@every_toy
def test_all_dtypes_in_one_plan(rule, toy_module):
    check(rule, DTYPES, "mixed", backends=("cpu",))


def test_rules_of_two_and_three_stages_in_one_plan(threads, toy_module):
    """A shorter rule sits out the later sweeps, and sums of one rule are not those of another."""
    rng = np.random.default_rng(73)
    rules = [TOYS["toy_three"], TOYS["toy_two"], TOYS["toy_three"]]
    sizes = (16_385, 33_000, 5)
    for n in threads:
        torch.set_num_threads(n)
        start = [random_values(rng, size, torch.float32) for size in sizes]
        grads = [[random_values(rng, s, torch.float32) for s in sizes] for _ in range(STEPS)]
        params = [torch.nn.Parameter(value.clone()) for value in start]
        groups = [{"params": [p], "rule": rule} for p, rule in zip(params, rules, strict=True)]
        optimizer = Toy(groups, rules[0])
        torch_steps(optimizer, params, grads)
        for i, (param, rule) in enumerate(zip(params, rules, strict=True)):
            expected, _ = on_numpy(rule, array_of(start[i]), [array_of(row[i]) for row in grads])
            assert_same_bits(param, expected, f"{n} threads, group {i}")


@every_toy
def test_a_sum_is_taken_in_the_order_of_the_parameters_memory(rule, toy_module):
    rng = np.random.default_rng(74)
    flat = random_values(rng, 130 * 150, torch.float32)
    grad = random_values(rng, 130 * 150, torch.float32)
    expected, _ = on_numpy(rule, array_of(flat), [array_of(grad)])
    for backend in ("cpu", "reference"):
        turned = torch.nn.Parameter(flat.clone().reshape(130, 150).t())
        assert not turned.is_contiguous()
        optimizer = Toy([turned], rule)
        with pyupdate.use_backend(backend):
            # A contiguous gradient: its memory runs the other way.
            torch_steps(optimizer, [turned], [[grad.reshape(130, 150).t().contiguous()]])
        assert_same_bits(turned.detach().t().reshape(-1), expected, backend)


@every_toy
def test_a_clip_comes_before_the_first_stage(rule, toy_module):
    rng = np.random.default_rng(75)
    start, grad = (random_values(rng, 20_000, torch.float32) for _ in range(2))
    for backend in ("cpu", "reference"):
        param = torch.nn.Parameter(start.clone())
        optimizer = Toy([param], rule)
        optimizer.pyupdate_options = pyupdate.options.Options(max_norm=1.0)
        with pyupdate.use_backend(backend):
            torch_steps(optimizer, [param], [[grad]])
        last = last_step(optimizer)
        assert last is not None
        assert 0.0 < last.multiplier < 1.0
        expected, _ = on_numpy(rule, array_of(start), [array_of(grad)], last.multiplier)
        assert_same_bits(param, expected, backend)


@every_dtype
@every_toy
def test_the_average_comes_after_the_last_stage(rule, dtype, toy_module):
    rng = np.random.default_rng(76)
    start, *grads = [random_values(rng, 40_001, dtype) for _ in range(3)]
    average = oracle.load(array_of(start))
    for turn in range(2):
        expected, _ = on_numpy(rule, array_of(start), [array_of(g) for g in grads[: turn + 1]])
        average = oracle.average(average, expected, 1.0 - 0.75)
    for backend in ("cpu", "reference"):
        param = torch.nn.Parameter(start.clone())
        optimizer = Toy([param], rule)
        optimizer.pyupdate_options = pyupdate.options.Options(ema_decay=0.75)
        with pyupdate.use_backend(backend):
            torch_steps(optimizer, [param], [[grad] for grad in grads])
        assert_same_bits(param, expected, backend)
        assert_same_bits(optimizer.state[param]["ema"], average, f"{backend}: average")


# ----- who runs it --------------------------------------------------------------------------------


def test_a_rule_that_nobody_compiled_goes_to_reference_or_is_refused(compiled, monkeypatch):
    monkeypatch.setattr(cpu_backend, "_modules", [compiled])
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    rule = TOYS["toy_two"]
    with pyupdate.use_backend("auto"):
        optimizer = Toy([param], rule)
        optimizer.step()
        (plan,) = engine_of(optimizer).plans.values()
        assert plan.backends == ("reference",)
    with (
        pyupdate.use_backend("cpu"),
        pytest.raises(RuntimeError, match="rule 'toy_two' is not compiled"),
    ):
        Toy([param], rule).step()


def test_a_shipped_rule_stays_with_the_first_module_that_has_it(compiled, toy_module):
    adamw = pyupdate.kernels.rules.RULES["adamw"]
    assert cpu_backend.module_with(adamw) is compiled
    assert cpu_backend.module_with(TOYS["toy_two"]) is toy_module
    assert toy_module.rules() == ["adamw", *TOYS]
