# SPDX-License-Identifier: Apache-2.0
"""tf-keras models with their new, legacy and loss-scaling optimizers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="tensorflow is not installed: pyupdate[tensorflow]")
tf_keras = pytest.importorskip("tf_keras", reason="tf-keras is not installed")

from training import apart, losses, network, ways

import pyupdate
from pyupdate.tensorflow.update import path_of

MAKE = {
    "adam": lambda: tf_keras.optimizers.Adam(0.01, jit_compile=False),
    "clipped": lambda: tf_keras.optimizers.SGD(0.5, momentum=0.9, global_clipnorm=0.1),
    "average": lambda: tf_keras.optimizers.RMSprop(0.01, use_ema=True),
    "legacy": lambda: tf_keras.optimizers.legacy.Adam(0.01),
    "legacy clipped": lambda: tf_keras.optimizers.legacy.SGD(0.5, clipnorm=0.1),
}


def numbers(values: Any) -> list[Any]:
    return [np.asarray(value) for value in values]


def take(model: Any) -> list[Any]:
    """The gradients of a step, by tf-keras's own loop, of the weights that there are."""
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(losses(model))
    found: list[Any] = tape.gradient(loss, model.trainable_variables)
    return found


def update(model: Any) -> None:
    with tf.GradientTape() as tape:
        loss = losses(model)
        pyupdate.update_model(model, loss, tape=tape)


@pytest.mark.each_value
@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("way", ["eager", "function", "jit"])
def test_a_step_is_tf_kerass_own(way: str, name: str) -> None:
    model, twin = network(tf_keras), network(tf_keras)
    model.current_optimizer, optimizer = MAKE[name](), MAKE[name]()
    step = ways(lambda: update(model))[way]
    for _ in range(3):
        for mine, its in zip(model.weights, twin.weights, strict=True):
            its.assign(mine)
        grads = take(twin)
        step()
        optimizer.apply_gradients(zip(grads, twin.trainable_variables, strict=True))
        assert apart(numbers(model.weights), numbers(twin.weights), floor=0.1) <= 16
    assert int(model.current_optimizer.iterations) == 3


@pytest.mark.each_value
@pytest.mark.parametrize("kind", ["new", "legacy", "fixed"])
@pytest.mark.parametrize("way", ["eager", "function", "jit"])
def test_its_loss_scale_is_kept_in_its_variables(way: str, kind: str) -> None:
    if kind == "legacy":
        inner = tf_keras.optimizers.legacy.SGD(0.5)
    else:
        inner = tf_keras.optimizers.SGD(0.5)
    given = {"dynamic": kind != "fixed", "initial_scale": 256.0}
    if kind != "fixed":
        given["dynamic_growth_steps"] = 2
    optimizer = tf_keras.mixed_precision.LossScaleOptimizer(inner, **given)
    model = network(tf_keras)
    model.current_optimizer = optimizer
    twin = network(tf_keras)

    def once(factor: Any) -> None:
        with tf.GradientTape() as tape:
            loss = losses(model) * factor
            pyupdate.update_model(model, loss, tape=tape)

    step = ways(once)[way]
    step(tf.constant(1.0))
    true = [w.numpy() - 0.5 * g.numpy() for w, g in zip(twin.weights, take(twin), strict=True)]
    assert apart(numbers(model.weights), true, floor=0.1) <= 16
    if kind == "fixed":
        assert float(optimizer.loss_scale) == 256.0
        return
    step(tf.constant(1.0))
    assert float(optimizer.loss_scale) == 512.0
    before = numbers(model.weights)
    step(tf.constant(math.inf))
    assert all((a == b).all() for a, b in zip(before, numbers(model.weights), strict=True))
    assert float(optimizer.loss_scale) == 256.0
    assert int(optimizer.dynamic_counter) == 0
    assert int(optimizer.iterations) == 3  # tf-keras counts a skipped step, Keras 3 does not


def test_build_makes_its_optimizers() -> None:
    model = pyupdate.build(network(tf_keras), "adam", learning_rate=0.25, max_norm=1.0)
    assert isinstance(model.current_optimizer, tf_keras.optimizers.Adam)
    before = numbers(model.weights)
    update(model)
    assert any((a != b).any() for a, b in zip(before, numbers(model.weights), strict=True))


@pytest.mark.each_value
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_every_replica_is_compiled(strategy: Any, legacy: bool, graph: bool) -> None:
    class Vector(tf_keras.Model):
        """Its gradient is what a call is given."""

        def __init__(self) -> None:
            super().__init__()
            self.held = tf.Variable([1.0, 2.0])
            self.built = True

        def call(self, grad: Any) -> Any:
            return tf.reduce_sum(self.held * grad)

    optimizers = tf_keras.optimizers.legacy if legacy else tf_keras.optimizers
    with strategy.scope():
        inner = optimizers.SGD(0.5, momentum=0.5, **({} if legacy else {"global_clipnorm": 5.0}))
        scaling = tf_keras.mixed_precision.LossScaleOptimizer(inner, initial_scale=256.0)
        model = pyupdate.build(Vector(), scaling)

    def each(grads: Any) -> None:
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        with tf.GradientTape() as tape:
            loss = model(tf.gather(grads, replica))
        pyupdate.update_model(model, loss, tape=tape)

    def step(grads: Any) -> None:
        strategy.run(each, args=(grads,))

    called = tf.function(step) if graph else step
    for second in ([2.0, 8.0], [0.0, math.inf], [2.0, 8.0]):  # the mean: 3, 4, of norm 5
        called(tf.constant([[4.0, 0.0], second]))
    # Momentum of a half: the second step is one and a half times the first.
    true = np.float64([1.0, 2.0]) - 0.5 * 2.5 * np.float64([3.0, 4.0])
    parts = strategy.experimental_local_results(model.held)
    assert parts[0].numpy().tobytes() == parts[1].numpy().tobytes()
    assert apart([parts[0].numpy()], [true]) <= 8
    assert float(scaling.loss_scale) == 128.0
    assert path_of(model) == "XLA"
