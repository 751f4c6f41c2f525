# SPDX-License-Identifier: Apache-2.0
"""Learning rates that change at every step: each counts, and none is another trace."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="tensorflow is not installed: pyupdate[tensorflow]")

import keras
from keras.src.optimizers.multi_optimizer import OptimizerMap
from training import AdamByHand, Known, apart, give, weights

import pyupdate
from pyupdate.tensorflow import native
from pyupdate.tensorflow import update as keras_update

STEPS = 50
RATES = [2.0 ** -(1 + k % 6) * (1 + k % 5) for k in range(STEPS)]
"""Their products with small whole numbers are exact in float32."""


class Counted(keras.optimizers.SGD):
    """Counts how often its Python runs, once a variable."""

    runs = 0

    def update_step(self, grad: Any, variable: Any, rate: Any) -> None:
        type(self).runs += 1
        super().update_step(grad, variable, rate)


class Asked:
    """A function that says the next rate every time, or that of a step."""

    def __init__(self, made: Any) -> None:
        self.made, self.times, self.step = made, 0, None

    def __call__(self) -> Any:
        self.times += 1
        return self.made(RATES[self.times - 1 if self.step is None else self.step])


def counted(model: Any, step: Any) -> int:
    """How often Python ran in 50 steps."""
    Counted.runs = 0
    for number in range(STEPS):
        step(number)
    del model
    return Counted.runs


@pytest.mark.each_value
@pytest.mark.parametrize("how", ["plain", "scaled", "clipped", "several", "accumulated"])
@pytest.mark.parametrize("made", [float, np.float32, np.float64, np.array, tf.constant])
def test_a_function_is_asked_once_a_step_and_traced_once(made: Any, how: str) -> None:
    rate = Asked(made)
    inner = Counted(rate, global_clipnorm=1e6 if how == "clipped" else None)
    optimizer: Any = {
        "scaled": lambda: keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0),
        "several": lambda: keras.optimizers.MultiOptimizer(OptimizerMap(inner)),
    }.get(how, lambda: inner)()
    steps = 2 if how == "accumulated" else 1
    model = pyupdate.build(Known([[1.0]]), optimizer, accumulation_steps=steps)
    tensor = made is tf.constant  # whether variables make it shows in a trace, once

    def step(number: int) -> None:
        rate.step = number if tensor else None
        give(model, [1.0])

    assert counted(model, step) == 1
    assert rate.times == STEPS + tensor
    true = 1.0 - sum(RATES[steps - 1 :: steps])
    assert apart(weights(model), [[true]]) <= (2 if how in ("scaled", "clipped") else 0)


def test_a_function_of_float64() -> None:
    """A third is not what it is in float32."""
    model = pyupdate.build(
        Known([np.float64([1.0])], "float64"), Counted(lambda: np.float64(1.0 / 3.0))
    )
    for _ in range(3):
        give(model, np.float64([1.0]))
    assert weights(model)[0][0] == 1.0 - 1.0 / 3.0 - 1.0 / 3.0 - 1.0 / 3.0


def test_fused_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYUPDATE_BACKEND", "reference")
    monkeypatch.setattr(native, "MANY", 1)
    rate = Asked(float)
    model = pyupdate.build(Known([[1.0, -2.0]]), keras.optimizers.Adam(rate, 0.875, 0.9375))
    hand = AdamByHand([[1.0, -2.0]], 1.0, 0.875, 0.9375)
    for number in range(6):
        give(model, [0.5, -0.25])
        hand.lr = RATES[number]
        hand.step([[0.5, -0.25]])
    assert keras_update.path_of(model) == "TensorFlow's fused kernels"
    assert apart(weights(model), hand.values) <= 16
    assert rate.times == 6


def test_a_number_that_is_assigned() -> None:
    model = pyupdate.build(Known([[1.0]]), Counted(0.5))

    def step(number: int) -> None:
        model.current_optimizer.learning_rate = RATES[number]
        give(model, [1.0])

    assert counted(model, step) == 1
    assert apart(weights(model), [[1.0 - sum(RATES)]]) == 0


def test_another_function_and_another_kind_of_number() -> None:
    model = pyupdate.build(Known([[1.0]]), Counted(lambda: 0.5))

    def step(number: int) -> None:
        rate = RATES[number]
        model.current_optimizer.learning_rate = lambda: rate
        give(model, [1.0])

    assert counted(model, step) == 1
    model.current_optimizer.learning_rate = lambda: np.float64(0.25)
    give(model, [1.0])
    assert Counted.runs == 2
    assert apart(weights(model), [[1.0 - sum(RATES) - 0.25]]) == 0


def test_a_schedule_that_is_swapped_is_traced_where_it_says_another_thing() -> None:
    schedule = keras.optimizers.schedules.ExponentialDecay
    model = pyupdate.build(Known([[1.0]]), Counted(schedule(0.5, 1, 1.0)))

    def step(number: int) -> None:
        model.current_optimizer.learning_rate = schedule(0.5 if number % 2 else 0.25, 1, 1.0)
        give(model, [1.0])

    assert counted(model, step) == 2
    assert apart(weights(model), [[1.0 - 0.75 * STEPS / 2]]) == 0


def test_a_function_that_reads_the_count_is_traced_with_it() -> None:
    optimizer = Counted(1.0)
    seen = weakref.ref(optimizer)
    optimizer.learning_rate = lambda: 0.5 ** tf.cast(seen().iterations.value, tf.float32)
    model = pyupdate.build(Known([[1.0]]), optimizer)
    Counted.runs = 0
    for _ in range(4):
        give(model, [1.0])
    assert weights(model)[0].tolist() == [1.0 - 1.875]
    assert Counted.runs == 1


def test_inside_a_function_of_the_user_s_it_is_read_when_that_is_traced() -> None:
    rate = Asked(float)
    model = pyupdate.build(Known([[1.0]]), Counted(rate))
    step = tf.function(lambda grad: give(model, grad))
    for _ in range(3):
        step(tf.constant([1.0]))
    assert len(set(np.diff([weights(model)[0][0], 1.0]))) == 1
    moved = 1.0 - weights(model)[0][0]
    assert moved / 3.0 in RATES[: rate.times]
    before = weights(model)[0][0]
    expected = RATES[rate.times]
    give(model, [1.0])  # an eager step asks again
    assert before - weights(model)[0][0] == expected


def test_nothing_keeps_the_optimizer() -> None:
    model = pyupdate.build(Known([[1.0]]), Counted(Asked(float)))
    give(model, [1.0])
    kept = weakref.ref(model.current_optimizer)
    del model
    gc.collect()
    assert kept() is None
