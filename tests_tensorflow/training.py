# SPDX-License-Identifier: Apache-2.0
"""Small Keras models, gradients that are known, and optimizers by hand in numpy."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import pyupdate
from pyupdate.tensorflow import passes

EPS = float(np.finfo(np.float32).eps)
LACKS_PASSES = bool(passes.why_not()) and not os.environ.get("PYUPDATE_REQUIRE_COMPILED")
"""Where the compiled passes must be there, as in CI, what needs them fails without them."""
DATA = np.random.default_rng(5).normal(size=(8, 4)).astype(np.float32)


def network(package: ModuleType = keras, seed: int = 1) -> Any:
    """4 -> 5 -> 2, with weights that depend on the seed alone."""
    model = package.Sequential(
        [
            package.layers.InputLayer((4,)),
            package.layers.Dense(5, activation="tanh"),
            package.layers.Dense(2),
        ]
    )
    drawn = np.random.default_rng(seed)
    for variable in model.weights:
        variable.assign(drawn.normal(size=variable.shape).astype(np.float32))
    return model


class Known(keras.Model):
    """Vectors whose gradients are what a call is given: the loss is the sum of products."""

    def __init__(self, values: Sequence[Any], dtype: str = "float32") -> None:
        super().__init__(dtype="float64" if dtype == "float64" else None)
        self.held = [
            self.add_weight(
                shape=np.shape(value), initializer="zeros", dtype=dtype, name=f"held{i}"
            )
            for i, value in enumerate(values)
        ]
        for variable, value in zip(self.held, values, strict=True):
            variable.assign(np.asarray(value))
        self.wide = tf.float64 if dtype == "float64" else tf.float32
        self.built = True

    def call(self, grads: Sequence[Any]) -> Any:
        parts = [
            tf.reduce_sum(tf.cast(v.value, self.wide) * tf.cast(g, self.wide))
            for v, g in zip(self.held, grads, strict=True)
        ]
        return tf.add_n(parts)


class Spelled(keras.optimizers.SGD):
    """Writes down a dot for every variable that it steps, as a string, which XLA does not."""

    def __init__(self, rate: Any) -> None:
        super().__init__(rate)
        self.written = tf.Variable("", trainable=False)

    def update_step(self, grad: Any, variable: Any, rate: Any) -> None:
        super().update_step(grad, variable, rate)
        self.written.assign(tf.strings.join([self.written, "."]))


def losses(model: Any, x: Any = DATA) -> Any:
    """A loss of shape (8, 2), whose mean is differentiated."""
    return (model(x) - 1.0) ** 2


def update(model: Any, *loss_arguments: Any, **given: Any) -> None:
    """One call of update_model inside the tape's block."""
    with tf.GradientTape() as tape:
        loss = losses(model, *loss_arguments)
        pyupdate.update_model(model, loss, tape=tape, **given)


def give(model: Known, *grads: Any, **given: Any) -> None:
    """One update by gradients that are given."""
    with tf.GradientTape() as tape:
        loss = model([tf.convert_to_tensor(g) for g in grads])
    pyupdate.update_model(model, loss, tape=tape, **given)


def weights(model: Any) -> list[np.ndarray[Any, Any]]:
    return [np.asarray(variable.numpy()).copy() for variable in model.weights]


def apart(found: Sequence[Any], true: Sequence[Any], floor: float = 1e-3) -> float:
    """The largest difference in eps of fp32 x max(|value|, floor)."""
    parts = [
        np.max(np.abs(np.float64(a) - b) / (EPS * np.maximum(np.abs(b), floor)))
        for a, b in zip(found, true, strict=True)
    ]
    return float(max(parts))


class AdamByHand:
    """Keras's Adam in fp64: the epsilon is outside of the bias correction."""

    epsilon = 1e-7

    def __init__(
        self, values: Sequence[Any], lr: float, beta1: float = 0.9, beta2: float = 0.999
    ) -> None:
        self.values = [np.float64(value) for value in values]
        self.first = [np.zeros_like(value) for value in self.values]
        self.second = [np.zeros_like(value) for value in self.values]
        self.lr, self.beta1, self.beta2, self.count = lr, beta1, beta2, 0

    def step(self, grads: Sequence[Any]) -> None:
        self.count += 1
        rate = self.lr * np.sqrt(1 - self.beta2**self.count) / (1 - self.beta1**self.count)
        for i, grad in enumerate(np.float64(g) for g in grads):
            self.first[i] += (grad - self.first[i]) * (1 - self.beta1)
            self.second[i] += (grad * grad - self.second[i]) * (1 - self.beta2)
            self.values[i] = self.values[i] - rate * self.first[i] / (
                np.sqrt(self.second[i]) + self.epsilon
            )


Step = Callable[..., Any]


def ways(step: Step) -> dict[str, Step]:
    """A step as it is, in a ``tf.function``, and in a compiled one."""
    return {
        "eager": step,
        "function": tf.function(step),
        "jit": tf.function(step, jit_compile=True),
    }
