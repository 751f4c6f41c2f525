# SPDX-License-Identifier: Apache-2.0
"""Variables that no micro-batch of a step reaches keep their bits, and so does their state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="tensorflow is not installed: pyupdate[tensorflow]")

import keras
from training import Known, apart, ways, weights

import pyupdate
from pyupdate.tensorflow import native

RATE, DECAY, BETAS, EPS = 0.0625, 0.5, (0.875, 0.9375), 1e-7


class AdamW:
    """Keras's AdamW of one variable, in fp64; the count is of all steps, as Keras has it."""

    def __init__(self, value: float) -> None:
        self.value, self.first, self.second = value, 0.0, 0.0

    def step(self, grad: float, count: int, decay: float) -> None:
        rate = RATE * np.sqrt(1 - BETAS[1] ** count) / (1 - BETAS[0] ** count)
        self.value -= decay * RATE * self.value
        self.first += (grad - self.first) * (1 - BETAS[0])
        self.second += (grad * grad - self.second) * (1 - BETAS[1])
        self.value -= rate * self.first / (np.sqrt(self.second) + EPS)


def reach(model: Any, positions: Any) -> None:
    """A micro-batch with gradients of 1 in the first of these, of 2 in the second."""
    with tf.GradientTape() as tape:
        parts = [(i + 1.0) * tf.cast(model.held[i].value, tf.float32) for i in positions]
        loss = tf.reduce_sum(tf.add_n(parts))
    pyupdate.update_model(model, loss, tape=tape)


WINDOWS = [((0, 1), (0,)), ((0,), (0,)), ((1,), (0,)), ((0,), (1,)), ((0,), (0,)), ((1,), (1,))]


def by_hand(decay: float, average: float) -> tuple[list[float], list[float]]:
    """Values and averages after those windows."""
    each, averages = [AdamW(1.0), AdamW(-2.0)], [1.0, -2.0]
    for count, window in enumerate(WINDOWS, 1):
        for i, one in enumerate(each):
            hits = sum(i in micro for micro in window)
            if hits:
                one.step((i + 1.0) * hits / 2.0, count, decay)
                averages[i] += (1.0 - average) * (one.value - averages[i])
    return [one.value for one in each], averages


@pytest.mark.each_value
@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("way", ["eager", "function", "jit"])
def test_what_no_micro_batch_reaches_is_not_stepped(way: str, clips: bool) -> None:
    model = pyupdate.build(
        Known([[1.0], [-2.0]]),
        keras.optimizers.AdamW(RATE, DECAY, *BETAS),
        accumulation_steps=2,
        ema_decay=0.75,
        max_norm=100.0 if clips else None,
    )
    reaches = {
        micro: ways(lambda micro=micro: reach(model, micro))[way]
        for window in WINDOWS
        for micro in window
    }
    for window in WINDOWS:
        for micro in window:
            reaches[micro]()
    values, averages = by_hand(DECAY, 0.75)
    assert apart(weights(model), [[v] for v in values]) <= 8
    with pyupdate.averaged_weights(model):
        assert apart(weights(model), [[v] for v in averages]) <= 8
    assert int(model.current_optimizer.iterations) == len(WINDOWS)


@pytest.mark.parametrize("way", ["eager", "function"])
def test_by_fused_kernels(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYUPDATE_BACKEND", "reference")
    monkeypatch.setattr(native, "MANY", 2)
    model = pyupdate.build(
        Known([[1.0], [-2.0]]), keras.optimizers.Adam(RATE, *BETAS), accumulation_steps=2
    )
    reaches = {
        micro: ways(lambda micro=micro: reach(model, micro))[way]
        for window in WINDOWS
        for micro in window
    }
    for window in WINDOWS:
        for micro in window:
            reaches[micro]()
    assert apart(weights(model), [[v] for v in by_hand(0.0, 0.75)[0]]) <= 8
    assert pyupdate.tensorflow.update.path_of(model) == "TensorFlow's fused kernels"


@pytest.mark.parametrize(
    "way", [pytest.param("eager", marks=pytest.mark.slow), "function", "functions that run eagerly"]
)
def test_on_replicas(strategy: Any, way: str) -> None:
    with strategy.scope():
        optimizer = keras.optimizers.AdamW(RATE, DECAY, *BETAS)
        options = {"accumulation_steps": 2, "ema_decay": 0.75}
        model = pyupdate.build(Known([[1.0], [-2.0]]), optimizer, **options)

    def on_all(micro: Any) -> None:
        strategy.run(reach, args=(model, micro))

    called = tf.function(on_all) if way == "function" else on_all
    tf.config.run_functions_eagerly(way == "functions that run eagerly")
    try:
        for window in WINDOWS:
            for micro in window:
                called(micro)
    finally:
        tf.config.run_functions_eagerly(False)
    values, averages = by_hand(DECAY, 0.75)
    for variable, value in zip(model.held, values, strict=True):
        for own in strategy.experimental_local_results(variable.value):
            assert apart([own.numpy()], [[value]]) <= 8
    with pyupdate.averaged_weights(model):
        assert apart(weights(model), [[v] for v in averages]) <= 8


def test_bfloat16_variables() -> None:
    """Neither the variable nor the float32 copy that is stepped in its place moves."""
    model = pyupdate.build(
        Known([[1.0], [-2.0]], "bfloat16"),
        keras.optimizers.AdamW(RATE, DECAY, *BETAS),
        accumulation_steps=2,
    )
    for window in WINDOWS:
        for micro in window:
            reach(model, micro)
    for variable, value in zip(model.held, by_hand(DECAY, 0.75)[0], strict=True):
        assert abs(float(variable.numpy()[0]) / value - 1.0) <= 2.0**-8


@pytest.mark.parametrize("kind", ["new", "legacy"])
def test_tf_keras(kind: str) -> None:
    tf_keras = pytest.importorskip("tf_keras")
    dense = tf_keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
    other = tf_keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
    given = tf_keras.Input((1,))
    model = tf_keras.Model(given, [dense(given), other(given)])
    home = tf_keras.optimizers
    adam = (home.legacy if kind == "legacy" else home).Adam(RATE, *BETAS)
    pyupdate.build(model, adam, accumulation_steps=2)
    seen = []
    for window in ((0, 1), (0, 1)), ((0,), (0,)), ((0, 1), (0, 1)):
        for micro in window:
            with tf.GradientTape() as tape:
                outputs = model(tf.ones([1, 1]))
                loss = tf.add_n([outputs[i] for i in micro])
                pyupdate.update_model(model, loss, tape=tape)
        seen.append([float(layer.kernel.numpy()[0, 0]) for layer in (dense, other)])
    hand = [AdamW(1.0), AdamW(1.0)]
    for count, hits in enumerate((2, 1, 2), 1):
        for one in hand[:hits]:
            one.step(1.0, count, 0.0)
        assert apart([seen[count - 1]], [[one.value for one in hand]]) <= 8


@pytest.mark.parametrize("way", ["eager", "function"])
def test_a_layer_is_unfrozen_in_a_window(way: str) -> None:
    """What was reached before it is remembered, and functions that were traced before count."""
    optimizer = keras.optimizers.SGD(1.0, weight_decay=0.5)
    model = pyupdate.build(Known([[1.0], [-2.0], [3.0]]), optimizer, accumulation_steps=2)
    calls = ((0, (1,)), (0, (1,)), (0, (1, 2)), (1, (0,)), (1, (0,)), (0, (1,)))
    reaches = {call: ways(lambda micro=call[1]: reach(model, micro))[way] for call in calls}
    seen = []
    for trained, micro in calls:
        model.held[0].trainable = bool(trained)
        if (trained, micro) == (0, (1,)) and len(seen) == 5:
            model.held[0].trainable = True  # the last function is one that was traced without it
        reaches[trained, micro]()
        seen.append([float(value[0]) for value in weights(model)])
    halved = [[1.0, -3.0, 3.0], [0.0, -2.5, 0.0]]  # by the decay, then less the mean gradient
    assert seen[1] == halved[0]
    assert seen[3] == halved[1]
    if way == "eager":
        assert seen[5] == [0.0 - 0.5, -1.25 - 1.0, 0.0]
    else:  # the first variable is none of those that this function was traced for
        assert seen[5] == [0.0, -1.25 - 1.0, 0.0]
