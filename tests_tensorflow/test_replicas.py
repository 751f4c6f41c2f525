# SPDX-License-Identifier: Apache-2.0
"""Data parallelism on two logical CPU devices: sums first, then check and clip; one decision."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="tensorflow is not installed: pyupdate[tensorflow]")

import keras
from training import AdamByHand, Known, apart

import pyupdate

BETAS = 0.875, 0.9375  # exact in fp32


@pytest.fixture(scope="module")
def strategy() -> Any:
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def run(strategy: Any, model: Any, per_replica: Any, graph: bool) -> None:
    """One update on every replica, by gradients of its own."""

    def each() -> None:
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        grads = [tf.gather(tf.constant(np.float32(g)), replica) for g in per_replica]
        with tf.GradientTape() as tape:
            loss = model(grads)
            pyupdate.update_model(model, loss, tape=tape)

    def step() -> None:
        strategy.run(each)

    (tf.function(step) if graph else step)()


def held(strategy: Any, model: Any) -> list[list[Any]]:
    """Every replica's values of every variable."""
    return [
        [local.numpy() for local in strategy.experimental_local_results(v.value)]
        for v in model.held
    ]


def first(strategy: Any, variable: Any) -> float:
    """The first replica's value of one of the optimizer's variables."""
    return float(strategy.experimental_local_results(variable.value)[0])


def made(strategy: Any, values: Any, optimizer: Any, **options: Any) -> Any:
    with strategy.scope():
        return pyupdate.build(Known(values), optimizer, **options)


@pytest.mark.parametrize("graph", [False, True])
def test_a_step_is_on_the_mean_over_the_replicas(strategy: Any, graph: bool) -> None:
    values = [np.float32([1.0, 2.0]), np.float32([3.0])]
    model = made(strategy, values, lambda: keras.optimizers.Adam(0.01, *BETAS))
    hand = AdamByHand(values, 0.01, *BETAS)
    for _ in range(2):
        grads = [[[1.0, 2.0], [3.0, -4.0]], [[0.5], [0.25]]]
        run(strategy, model, grads, graph)
        hand.step([np.mean(np.float64(g), axis=0) for g in grads])
    for replicas, true in zip(held(strategy, model), hand.values, strict=True):
        assert len(replicas) == 2
        assert apart(replicas, [true, true]) <= 8
    assert first(strategy, model.current_optimizer.iterations) == 2


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("bad", [0, 1])
def test_an_inf_on_one_replica_only(strategy: Any, bad: int, graph: bool) -> None:
    model = made(
        strategy,
        [np.float32([1.0, 2.0])],
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.5), initial_scale=256.0),
    )
    grads = np.ones((2, 2))
    grads[bad, 1] = math.inf
    run(strategy, model, [grads], graph)
    optimizer = model.current_optimizer
    assert [value.tolist() for value in held(strategy, model)[0]] == [[1.0, 2.0]] * 2
    scales = strategy.experimental_local_results(optimizer.dynamic_scale.value)
    assert [float(scale) for scale in scales] == [128.0] * len(scales)
    assert first(strategy, optimizer.inner_optimizer.iterations) == 0
    run(strategy, model, [[[1.0, 2.0], [3.0, 4.0]]], graph)
    assert [value.tolist() for value in held(strategy, model)[0]] == [[0.0, 0.5]] * 2
    assert first(strategy, optimizer.inner_optimizer.iterations) == 1


@pytest.mark.parametrize("option", ["global_clipnorm", "clipnorm", "max_norm"])
def test_clipping_comes_after_the_all_reduce(strategy: Any, option: str) -> None:
    bound = {option: 1.0}
    ours = option == "max_norm"
    optimizer = keras.optimizers.SGD
    model = made(
        strategy,
        [np.float32([1.0, 2.0])],
        lambda: optimizer(1.0) if ours else optimizer(1.0, **bound),
        **(bound if ours else {}),
    )
    # Each replica's own norm is 10 and 8, that of their mean 1: nothing is to be clipped.
    run(strategy, model, [[[10.0, 0.0], [-8.0, 0.0]]], graph=True)
    assert np.max(np.abs(np.array(held(strategy, model)[0]) - [0.0, 2.0])) <= 2e-6
    # The mean's norm is 5, and the step's 1; clipped one by one it would be another.
    run(strategy, model, [[[6.0, 0.0], [0.0, 8.0]]], graph=True)
    true = np.float64([0.0, 2.0]) - np.float64([3.0, 4.0]) / 5.0
    assert np.max(np.abs(np.array(held(strategy, model)[0]) - true)) <= 2e-6


def test_options_that_keep_variables_are_refused(strategy: Any) -> None:
    model = made(strategy, [np.float32([1.0])], keras.optimizers.SGD, ema_decay=0.5)
    with pytest.raises(ValueError, match=r"ema_decay of .* use the optimizer's own use_ema"):
        run(strategy, model, [[[1.0], [1.0]]], graph=False)
