# SPDX-License-Identifier: Apache-2.0
"""A step is made with what an optimizer's Python attributes say now, whatever they hold."""

from __future__ import annotations

import dataclasses
import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.optimizers.multi_optimizer import OptimizerMap

import pyupdate
from pyupdate import keras_optim

X = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")


def _model(dtype: str = "float32") -> Any:
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(3, name=name, dtype=dtype) for name in ("first", "second")]
    return keras.Sequential([keras.layers.Input((4,)), *layers])


def _step(model: Any) -> float:
    """Step once; how far a weight moved at most."""
    before = [np.asarray(v, np.float64) for v in model.trainable_variables]
    with tf.GradientTape() as tape:
        loss = (model(X) - 1.0) ** 2
    pyupdate.update_model(model, loss, tape=tape)
    after = [np.asarray(v, np.float64) for v in model.trainable_variables]
    return max(float(np.abs(a - b).max()) for a, b in zip(after, before, strict=True))


class Gained(keras.optimizers.SGD):  # type: ignore[misc]
    """SGD with factors of every kind."""

    def __init__(self) -> None:
        super().__init__(0.1)
        self.gain: Any = np.float32(1.0)
        self.pair: Any = (1.0, [1.0])
        self.table: Any = {"a": 1.0}
        self.array: Any = np.array(1.0)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Move by the gradient times the factors."""
        factor = self.gain * self.pair[0] * self.pair[1][0] * self.table["a"] * float(self.array)
        super().update_step(gradient * factor, variable, learning_rate)


@pytest.mark.parametrize(
    "change",
    [
        lambda o: setattr(o, "gain", np.float32(0.0)),
        lambda o: setattr(o, "pair", (0.0, [1.0])),
        lambda o: o.pair[1].__setitem__(0, 0.0),
        lambda o: o.table.__setitem__("a", 0.0),
        lambda o: o.array.fill(0.0),
    ],
)
def test_changed_attributes_count(change: Callable[[Any], None]) -> None:
    model = _model()
    pyupdate.build(model, Gained())
    assert _step(model) > 0.0
    change(model.current_optimizer)
    assert _step(model) == 0.0


@pytest.mark.parametrize("made", [float, np.float32, tf.constant, np.array])
def test_a_learning_rate_function_is_not_frozen(made: Callable[[float], Any]) -> None:
    box = [0.1]
    model = _model()
    pyupdate.build(model, keras.optimizers.SGD(lambda: made(box[0])))
    assert _step(model) > 0.0
    box[0] = 0.0
    assert _step(model) == 0.0


def test_values_of_a_schedule_and_numbers_of_a_rule_count() -> None:
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([100], [1.0, 0.5])
    model = _model()
    pyupdate.build(model, keras.optimizers.SGD(schedule))
    assert _step(model) > 0.0
    schedule.values = [0.0, 0.0]
    assert _step(model) == 0.0
    model = _model()
    numbers = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    rule = keras_optim.from_rule("adamw", lr=0.1, **numbers)
    pyupdate.build(model, rule)
    assert _step(model) > 0.01
    rule.numbers["eps"] = 1e30
    assert _step(model) < 1e-20


@dataclasses.dataclass
class Constant(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
    """A schedule that no dict takes as a key."""

    rate: float

    def __call__(self, step: Any) -> Any:
        """Say the rate."""
        del step
        return self.rate


def test_a_dataclass_schedule() -> None:
    model = _model()
    pyupdate.build(model, keras.optimizers.SGD(Constant(0.1)))
    assert _step(model) > 0.0
    model.current_optimizer._learning_rate.rate = 0.0
    assert _step(model) == 0.0


def test_a_multi_optimizer_steps_as_in_keras() -> None:
    def made() -> tuple[Any, Any]:
        first = keras.optimizers.SGD(0.05, momentum=0.9)
        both = OptimizerMap(keras.optimizers.SGD(0.05), {"first.*": first})
        return keras.optimizers.MultiOptimizer(both), first

    truth, model = _model(), _model()
    (theirs, their_first), (ours, our_first) = made(), made()
    theirs.build(truth.trainable_variables)
    pyupdate.build(model, ours)
    for i in range(4):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((truth(X) - 1.0) ** 2)
        theirs.apply(tape.gradient(loss, truth.trainable_variables), truth.trainable_variables)
        _step(model)
        if i == 1:
            their_first.momentum = our_first.momentum = 0.0
    for a, b in zip(truth.trainable_variables, model.trainable_variables, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=2e-6, atol=1e-7)


def test_cycles_and_what_they_hold_is_freed() -> None:
    model = _model()
    schedule = Constant(0.1)
    optimizer = keras.optimizers.SGD(schedule)
    schedule.owner = optimizer  # type: ignore[attr-defined]
    optimizer.wrapped = keras.optimizers.SGD(0.1)
    optimizer.wrapped.parent = optimizer
    optimizer.model = model
    pyupdate.build(model, optimizer)
    assert _step(model) > 0.0
    kept = weakref.ref(optimizer)
    del model, optimizer, schedule
    gc.collect()
    assert kept() is None


def test_a_learning_rate_of_the_optimizer_itself_does_not_keep_it() -> None:
    model = _model()
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.rate = 0.5
    optimizer._learning_rate = lambda o=optimizer: o.rate
    pyupdate.build(model, optimizer)
    assert _step(model) > 0.0
    kept = weakref.ref(optimizer)
    del model, optimizer
    gc.collect()
    assert kept() is None


def test_a_rule_accumulates_as_keras_does() -> None:
    optimizer = keras_optim.from_rule(
        "adamw",
        lr=0.1,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        weight_decay=0.0,
        gradient_accumulation_steps=2,
    )
    weight = keras.Variable([1.0])
    optimizer.apply([tf.constant([1.0])], [weight])
    assert weight.numpy().tolist() == [1.0]
    optimizer.apply([tf.constant([2.0])], [weight])
    np.testing.assert_allclose(weight.numpy(), [0.9], rtol=1e-6)  # Adam's first step: lr


def test_half_state_is_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    model = _model("bfloat16")
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    optimizer.build(model.trainable_variables)
    model.current_optimizer = optimizer
    with caplog.at_level(logging.WARNING, logger="pyupdate"):
        for _ in range(3):
            _step(model)
    assert sum("state in bfloat16" in line for line in caplog.messages) == 1
