# SPDX-License-Identifier: Apache-2.0
"""Optimizers whose own step changes their Python attributes, and those whose step does not."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

import pyupdate
from pyupdate.tensorflow import update

X = np.random.default_rng(3).normal(size=(6, 4)).astype("float32")


def net() -> Any:
    keras.utils.set_random_seed(4)
    layers = [keras.layers.Dense(3, name="first"), keras.layers.Dense(2, name="second")]
    return keras.Sequential([keras.layers.Input((4,)), *layers])


def built(optimizer: Any) -> Any:
    return pyupdate.build(net(), optimizer, model_name="net")


def step(model: Any) -> None:
    with tf.GradientTape() as tape:
        loss = (model(X) - 1.0) ** 2
    pyupdate.update_model(model, loss, tape=tape)


def weights(model: Any) -> list[np.ndarray]:
    return [np.asarray(v) for v in model.trainable_variables]


def of_keras(optimizer: Any, steps: int) -> list[np.ndarray]:
    """Keras's own eager steps."""
    model = net()
    optimizer.build(model.trainable_variables)
    for _ in range(steps):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(X) - 1.0) ** 2)
        grads = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))
    return weights(model)


class Counts(keras.optimizers.SGD):
    """Its step depends on how often its Python ran."""

    runs = 0

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        self.runs += 1
        super().update_step(gradient * float(self.runs), variable, learning_rate)


def made_nadam() -> Any:
    return pytest.importorskip("tf_keras").optimizers.Nadam(0.01)


@pytest.mark.parametrize("make", [lambda: Counts(0.01), made_nadam], ids=["own", "Nadam"])
def test_a_step_that_changes_its_own_attributes_is_keras_eager_one(make, caplog):
    optimizer = make()
    if isinstance(optimizer, keras.optimizers.Optimizer):
        truth = of_keras(make(), 5)
        model = built(optimizer)
    else:
        import tf_keras

        def of_tf_keras() -> Any:
            tf_keras.utils.set_random_seed(4)
            made = tf_keras.Sequential([tf_keras.layers.Dense(3), tf_keras.layers.Dense(2)])
            made.build((None, 4))
            return made

        plain, theirs = of_tf_keras(), make()
        for _ in range(5):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((plain(X) - 1.0) ** 2)
            grads = tape.gradient(loss, plain.trainable_variables)
            theirs.apply_gradients(zip(grads, plain.trainable_variables, strict=True))
        truth = weights(plain)
        model = pyupdate.build(of_tf_keras(), optimizer, model_name="net")
    with caplog.at_level(logging.WARNING, logger="pyupdate"):
        for _ in range(5):
            step(model)
    for a, b in zip(weights(model), truth, strict=True):
        np.testing.assert_allclose(a, b, rtol=0.0, atol=1e-6)
    said = [r.getMessage() for r in caplog.records if "its own Python attributes" in r.getMessage()]
    assert len(said) == 1
    assert "without XLA" in update.path_of(model)


STOCK = (
    "SGD",
    "Adam",
    "AdamW",
    "RMSprop",
    "Adagrad",
    "Adadelta",
    "Adamax",
    "Nadam",
    "Ftrl",
    "Lion",
)


@pytest.mark.parametrize("name", STOCK)
def test_a_stock_optimizer_is_traced_once(name):
    model = built(getattr(keras.optimizers, name)(0.01))
    for _ in range(3):
        step(model)
    assert "without XLA" not in update.path_of(model)
