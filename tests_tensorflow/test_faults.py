# SPDX-License-Identifier: Apache-2.0
"""What Keras 3.15 gets wrong, right here: each fault against a dense or hand-computed truth.

Two more, of data parallelism, are in test_replicas.py.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="tensorflow is not installed: pyupdate[tensorflow]")

import keras
from training import AdamByHand, Known, apart, give, weights

import pyupdate

BETAS = 0.875, 0.9375  # exact in fp32
TABLE = np.random.default_rng(3).normal(size=(4, 2)).astype(np.float32)
ROWS = np.array([1, 1, 1, 3])


def looked_up(optimizer: Any) -> Any:
    """An embedding whose loss uses one row three times, stepped once; the model."""
    model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Embedding(4, 2)])
    model.layers[0].embeddings.assign(TABLE)
    model.current_optimizer = optimizer
    return model


def step(model: Any) -> None:
    with tf.GradientTape() as tape:
        loss = 8.0 * model(tf.constant(ROWS[None]))  # 8 elements: the mean of each is its value
        pyupdate.update_model(model, loss, tape=tape)


DENSE = np.float64([[0, 0], [3, 3], [0, 0], [1, 1]])
"""The gradient of that loss."""


def test_duplicate_indices_under_adam() -> None:
    model = looked_up(keras.optimizers.Adam(0.1, *BETAS))
    hand = AdamByHand([TABLE], 0.1, *BETAS)
    for _ in range(3):
        step(model)
        hand.step([DENSE])
    assert apart(weights(model), hand.values) <= 8


@pytest.mark.parametrize("option", ["global_clipnorm", "clipnorm", "max_norm"])
def test_the_norm_of_sparse_gradients(option: str) -> None:
    if option == "max_norm":
        model = looked_up(None)
        pyupdate.build(model, "sgd", learning_rate=1.0, max_norm=1.0)
    else:
        model = looked_up(keras.optimizers.SGD(1.0, **{option: 1.0}))
    step(model)
    norm = math.sqrt(2 * 9 + 2)
    assert abs(pyupdate.last_update(model).norm - norm) < 1e-6
    assert apart(weights(model), [TABLE - DENSE / norm], floor=0.1) <= 8


def test_sparse_gradients_with_a_loss_scale_factor() -> None:
    model = looked_up(keras.optimizers.SGD(0.25, loss_scale_factor=64.0))
    step(model)
    assert apart(weights(model), [TABLE - 0.25 * DENSE], floor=0.1) <= 2
    assert model.current_optimizer.loss_scale_factor == 64.0


@pytest.mark.parametrize("start", [2.0**-125, 0.0])
def test_a_loss_scale_never_falls_to_zero(start: float) -> None:
    model = Known([[1.0]])
    model.current_optimizer = optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.5), initial_scale=start
    )
    for _ in range(60):
        give(model, [math.inf])
    assert float(optimizer.dynamic_scale) == 2.0**-126  # halved 30 times more it would be 0
    assert weights(model)[0].tolist() == [1.0]
    give(model, [1.0])
    assert weights(model)[0].tolist() == [0.5]  # and still unscaled to the bit


@pytest.mark.parametrize("start", [2.0**90, math.inf])
def test_a_loss_scale_never_grows_to_inf(start: float) -> None:
    model = Known([[1.0]])
    model.current_optimizer = optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.5), initial_scale=start, dynamic_growth_steps=1
    )
    for _ in range(20):
        give(model, [2.0**-30])
    assert float(optimizer.dynamic_scale) == 2.0**100
    assert weights(model)[0].tolist() == [1.0 - 20 * 2.0**-31 if start else 1.0] or (
        abs(weights(model)[0][0] - (1.0 - 20 * 2.0**-31)) <= 2.0**-24
    )


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_half_precision_variables_move(name: str) -> None:
    values = [np.float32([1.0, -2.0, 0.75])]
    model = pyupdate.build(Known(values, dtype=name), keras.optimizers.Adam(1e-3, *BETAS))
    hand = AdamByHand(values, 1e-3, *BETAS)
    drawn = np.random.default_rng(4)
    for _ in range(40):
        grads = [np.abs(drawn.normal(size=3)).astype(name)]  # one way: every move counts
        give(model, *grads)
        hand.step([g.astype(np.float64) for g in grads])
    found = np.float64(model.held[0].value.numpy())
    true = hand.values[0]
    unit = 2.0**-8 if name == "bfloat16" else 2.0**-11  # rounded once, from a float32 copy
    assert np.all(np.abs(found - true) <= np.abs(true) * unit * 1.01)
    assert np.all(np.abs(true - values[0]) > 0.02)


def test_half_precision_variables_that_somebody_writes() -> None:
    model = pyupdate.build(Known([[1.0]], dtype="bfloat16"), keras.optimizers.SGD(2.0**-11))
    for _ in range(3):
        give(model, [1.0])
    assert model.held[0].value.numpy().tolist() == [
        1.0
    ]  # three moves of an eighth of its unit wait
    model.held[0].assign([8.0])
    give(model, [2048.0])
    assert model.held[0].value.numpy().tolist() == [7.0]
