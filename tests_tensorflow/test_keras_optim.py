# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RET504 - a rule returns the names that it assigned
"""`keras_optim.from_rule`: the rule text that runs under torch, as a Keras optimizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="tensorflow is not installed: pyupdate[tensorflow]")

import keras

import pyupdate
from pyupdate import keras_optim
from pyupdate.kernels import oracle
from pyupdate.kernels.rules import RULES

STEPS = 7  # of which RAdam rectifies the last two
EPS = float(np.finfo(np.float32).eps)
TEXTS = [name for name in RULES if name not in ("muon", "adafactor")]
NUMBERS = {
    "lr": 0.01,
    "momentum": 0.9,
    "dampening": 0.2,
    "weight_decay": 0.1,
    "beta1": 0.8,
    "beta2": 0.95,
    "beta3": 0.99,
    "eps": 1e-3,
    "alpha": 0.9,
    "lr_decay": 0.25,
    "initial_accumulator_value": 0.25,
    "rho": 0.75,
    "momentum_decay": 4e-3,
    "eta1": 0.5,
    "eta2": 1.25,
    "step_size1": 1e-3,
    "step_size2": 0.5,
    "lambd": 0.01,
    "t0": 3.0,
    "weight_lr_power": 2.0,
    "warmup_steps": 4.0,
    "warmup": 4.0,
    "trust_coefficient": 0.25,
    "adapt": 1.0,
    "bias_correction": 1.0,
    "max_weight_norm": 5.0,
    "grad_averaging": 1.0,
}


def numbers_of(name: str) -> dict[str, float]:
    """Those above, and 0 for a flag that is not there."""
    return {number: NUMBERS.get(number, 0.0) for number in RULES[name].numbers}


def begun(initial: Any, numbers: dict[str, float], param: np.ndarray) -> np.ndarray:
    if initial == "param":
        return param.copy()
    return np.full_like(param, numbers[initial] if isinstance(initial, str) else initial)


def grads(step: int) -> np.ndarray:
    return np.random.default_rng(step).standard_normal((33, 7)).astype(np.float32)


@pyupdate.rule
def descent(param, grad, lr):
    param = param - lr * grad
    return param


QUICK = ("sgd", "adamw", "novograd")


# The self-test, which is tested too, has XLA compile every rule.
@pytest.mark.parametrize(
    ("name", "compiled"),
    [
        pytest.param(name, jit, marks=() if name in QUICK else pytest.mark.slow)
        for name in TEXTS
        for jit in (False, True)
    ],
)
def test_steps_are_the_oracles_up_to_contraction(name: str, compiled: bool) -> None:
    rule, numbers = RULES[name], numbers_of(name)
    optimizer = keras_optim.from_rule(name, **numbers)
    start = grads(100)
    variable = keras.Variable(start)
    optimizer.build([variable])
    apply = tf.function(
        lambda grad: optimizer.apply([grad], [variable]), jit_compile=compiled, autograph=False
    )
    if not compiled:
        apply = apply.python_function
    wide = start.astype(np.float64)
    state = {key: begun(initial, numbers, wide) for key, initial in rule.state.items()}
    state |= {k: begun(initial, numbers, np.zeros(())) for k, initial in rule.scalars.items()}
    moved = 0.0
    for step in range(1, STEPS + 1):
        apply(tf.constant(grads(step)))
        before = wide
        wide, state = oracle.step(
            rule, wide, grads(step).astype(np.float64), state, list(numbers.values()), count=step
        )
        moved = max(moved, np.abs(wide - before).max())
        bound = step * 8 * EPS * np.maximum(np.abs(wide), moved)
        assert np.all(np.abs(variable.numpy() - wide) <= bound)


def test_a_rule_of_ones_own_by_hand() -> None:
    optimizer = keras_optim.from_rule(descent, lr=0.5)
    weight = keras.Variable([1.0, 1.0])
    optimizer.apply([keras.ops.array([0.5, 0.0])], [weight])
    assert weight.numpy().tolist() == [0.75, 1.0]


def test_a_config_makes_the_same_optimizer() -> None:
    for optimizer in (
        keras_optim.from_rule("adamw", **numbers_of("adamw"), global_clipnorm=0.5),
        keras_optim.from_rule(descent, lr=0.1),
    ):
        again = type(optimizer).from_config(optimizer.get_config())
        assert again.rule is optimizer.rule and again.numbers == optimizer.numbers
        assert again.global_clipnorm == optimizer.global_clipnorm


def test_update_model_takes_it() -> None:
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(1, use_bias=False)])
    pyupdate.build(model, keras_optim.from_rule(descent, lr=0.25))
    before = model.trainable_variables[0].numpy()
    x = tf.constant([[1.0, 2.0, 4.0]])
    with tf.GradientTape() as tape:
        loss = model(x)
    pyupdate.update_model(model, loss, tape=tape)
    wanted = before - 0.25 * np.array([[1.0], [2.0], [4.0]], np.float32)
    assert np.array_equal(model.trainable_variables[0].numpy(), wanted)


@pytest.mark.parametrize(
    ("rule", "arguments", "kind", "words"),
    [
        ("adamm", {}, ValueError, "no shipped rule is named 'adamm'"),
        ("muon", {}, ValueError, "around matrix products"),
        ("sgd", {}, TypeError, "needs lr"),
        (descent, {"lr": 0.1, "clipnrm": 1.0}, TypeError, "takes no 'clipnrm'"),
        (print, {}, TypeError, "takes a pyupdate.rule or a name"),
    ],
)
def test_what_is_refused(rule, arguments, kind, words) -> None:
    with pytest.raises(kind, match=words):
        keras_optim.from_rule(rule, **arguments)


def test_build_takes_a_rule() -> None:
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(1)])
    pyupdate.build(model, descent, lr=0.25)
    assert model.current_optimizer.rule is descent
    assert model.current_optimizer.numbers == {"lr": 0.25}
