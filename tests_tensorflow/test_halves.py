# SPDX-License-Identifier: Apache-2.0
"""Variables in half precision: what the user says of one holds for its float32 copy as well."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="tensorflow is not installed: pyupdate[tensorflow]")

import keras
from keras.src.optimizers.multi_optimizer import OptimizerMap
from training import Known, give, ways

import pyupdate

RATE, DECAY = 0.5, 0.5
"""A step on a gradient of zero leaves 3/4 of what is not excluded from the decay."""


def held(model: Any) -> list[Any]:
    return [np.float32(variable.numpy()).tolist() for variable in model.held]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("way", ["eager", "function", "jit"])
def test_a_constraint_is_applied(way: str, dtype: str) -> None:
    model = Known([[0.5, 2.0], [0.5]], dtype)
    model.held[0].constraint = keras.constraints.NonNeg()
    pyupdate.build(model, keras.optimizers.SGD(1.0))
    step = ways(lambda a, b: give(model, a, b))[way]
    for expected in [[[0.0, 1.0], [-0.5]], [[0.0, 0.0], [-1.5]]]:
        step(tf.constant([1.0, 1.0]), tf.constant([1.0]))
        assert held(model) == expected


def excluded_by(how: str, optimizer: Any, model: Any) -> None:
    if how == "name":
        optimizer.exclude_from_weight_decay(var_names=["held0"])
    else:
        optimizer.exclude_from_weight_decay(var_list=[model.held[0]])


@pytest.mark.all_pairs
@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("when", ["before", "after a step"])
@pytest.mark.parametrize("how", ["name", "list"])
@pytest.mark.parametrize("way", ["eager", "function"])
def test_what_is_excluded_from_weight_decay(way: str, how: str, when: str, scales: bool) -> None:
    inner = keras.optimizers.SGD(RATE, weight_decay=DECAY)
    outer = keras.optimizers.LossScaleOptimizer(inner) if scales else inner
    model = Known([[2.0], [4.0]], "bfloat16")
    if when == "before":
        excluded_by(how, inner, model)
    pyupdate.build(model, outer)
    give(model, [0.0], [0.0])
    first = [[2.0], [3.0]] if when == "before" else [[1.5], [3.0]]
    assert held(model) == first
    if when != "before":
        excluded_by(how, inner, model)
    ways(lambda a, b: give(model, a, b))[way](tf.constant([0.0]), tf.constant([0.0]))
    assert held(model) == [first[0], [2.25]]


@pytest.mark.each_value
@pytest.mark.parametrize("how", ["name", "list"])
@pytest.mark.parametrize("way", ["eager", "function", "functions that run eagerly"])
def test_what_is_excluded_on_replicas(strategy: Any, way: str, how: str) -> None:
    with strategy.scope():
        model = Known([[2.0], [4.0]], "bfloat16")
        model.held[1].constraint = keras.constraints.MaxNorm(2.0)
        optimizer = keras.optimizers.SGD(RATE, weight_decay=DECAY)
    excluded_by(how, optimizer, model)
    pyupdate.build(model, optimizer)

    def on_all() -> None:
        strategy.run(lambda: give(model, [0.0], [0.0]))

    tf.config.run_functions_eagerly(way == "functions that run eagerly")
    try:
        (tf.function(on_all) if way == "function" else on_all)()
    finally:
        tf.config.run_functions_eagerly(False)
    for variable, value in zip(model.held, (2.0, 2.0), strict=True):
        for own in strategy.experimental_local_results(variable.value):
            assert own.numpy().tolist() == [value]


def layers() -> Any:
    """An embedding and two matrices, in layers with names."""
    dense = [keras.layers.Dense(4, name=name, use_bias=False) for name in ("first", "second")]
    embedding = keras.layers.Embedding(4, 4, name="embedding")
    model = keras.Sequential([keras.layers.InputLayer((1,)), embedding, *dense])
    for variable in model.weights:
        variable.assign(np.eye(4, dtype=np.float32) * 4.0)
    return model


@pytest.fixture
def bfloat16() -> Any:
    """Layers are made in bfloat16."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("bfloat16")
    yield
    keras.config.set_dtype_policy(before)


def step_on_sums(model: Any) -> list[Any]:
    """A step whose gradients have no zero; how far each weight has moved."""
    before = [np.float32(variable.numpy()) for variable in model.weights]
    with tf.GradientTape() as tape:
        out = model(tf.constant([[0], [1], [2], [3]]))
        loss = tf.reduce_sum(tf.cast(out, tf.float32)) + tf.add_n(
            [tf.reduce_sum(tf.cast(v, tf.float32)) for v in model.trainable_variables]
        )
    pyupdate.update_model(model, loss, tape=tape)
    return [np.float32(v.numpy()) - b for v, b in zip(model.weights, before, strict=True)]


@pytest.mark.usefixtures("bfloat16")
def test_the_layers_that_muon_leaves_to_adam() -> None:
    """Adam's first step is its rate everywhere; Muon's on a gradient of rank one a quarter."""
    model = layers()
    given = {"weight_decay": None, "adam_weight_decay": None, "rms_rate": 1}
    optimizer = keras.optimizers.Muon(0.5, exclude_layers=["first"], **given)
    moved = step_on_sums(pyupdate.build(model, optimizer))
    for move in moved[:2]:  # the embedding, and the layer that is named
        assert np.all(move == -0.5)
    assert np.all(np.abs(moved[2]) < 0.4)


@pytest.mark.usefixtures("bfloat16")
def test_the_optimizer_of_several_by_path() -> None:
    parts = {".*/first/.*": keras.optimizers.Adam(0.25), "kernel": keras.optimizers.Adam(1.0)}
    optimizer = keras.optimizers.MultiOptimizer(OptimizerMap(keras.optimizers.Adam(0.5), parts))
    model = layers()
    moved = step_on_sums(pyupdate.build(model, optimizer))
    for move, expected in zip(moved, (-0.5, -0.25, -0.5), strict=True):
        assert np.all(move == expected)


@pytest.mark.parametrize("how", ["name", "list", "legacy"])
def test_tf_keras(how: str) -> None:
    tf_keras = pytest.importorskip("tf_keras")
    tf_keras.mixed_precision.set_global_policy("bfloat16")
    try:
        dense = tf_keras.layers.Dense(
            1, name="first", bias_constraint="non_neg", kernel_initializer="ones"
        )
        model = tf_keras.Sequential([tf_keras.layers.InputLayer((1,)), dense])
        model(tf.ones([1, 1]))
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")
    if how == "legacy":  # which has neither decay nor exclusions
        optimizer = tf_keras.optimizers.legacy.SGD(RATE)
    else:
        optimizer = tf_keras.optimizers.SGD(RATE, weight_decay=DECAY)
        chosen = {"var_names": ["first/bias"]} if how == "name" else {"var_list": [dense.bias]}
        optimizer.exclude_from_weight_decay(**chosen)
    left = 1.0 if how == "legacy" else 0.75
    dense.bias.assign([2.0])
    with tf.name_scope("elsewhere/first/bias"):  # which no name of a copy has in it
        pyupdate.build(model, optimizer)
    for loss, expected in ((0.0, [left, 2.0]), (8.0, [left * left - 4.0, 0.0])):
        with tf.GradientTape() as tape:
            found = loss * model(tf.ones([1, 1]))
        pyupdate.update_model(model, found, tape=tape)
        assert [float(v.numpy().ravel()[0]) for v in model.weights] == expected
