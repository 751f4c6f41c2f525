# SPDX-License-Identifier: Apache-2.0
"""Another build, another optimizer, another model over the same variables, another scope."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="tensorflow is not installed: pyupdate[tensorflow]")

import keras
from replicated import held, repeated
from training import AdamByHand, Known, apart, give, network, update, ways, weights

import pyupdate
from pyupdate.tensorflow import passes

BETAS = 0.875, 0.9375  # exact in fp32


@pytest.mark.parametrize("same_optimizer", [False, True])
@pytest.mark.parametrize("way", ["eager", "function"])
def test_averages_begin_anew_with_a_new_build(way: str, same_optimizer: bool) -> None:
    optimizer = keras.optimizers.SGD(0.5)
    model = pyupdate.build(Known([[1.0]]), optimizer, ema_decay=0.75)
    give(model, [8.0])
    model.held[0].assign([64.0])
    if not same_optimizer:
        optimizer = keras.optimizers.SGD(0.5)
    pyupdate.build(model, optimizer, ema_decay=0.75)
    with pytest.raises(ValueError, match="keeps no averages"), pyupdate.averaged_weights(model):
        pass
    ways(lambda grad: give(model, grad))[way](tf.constant([8.0]))
    with pyupdate.averaged_weights(model):
        assert weights(model)[0].tolist() == [0.75 * 64.0 + 0.25 * 60.0]
        with pytest.raises(RuntimeError, match="leave averaged_weights first"):
            pyupdate.build(model, "sgd")
    pyupdate.build(model, "sgd")
    with pytest.raises(ValueError, match="keeps no averages"), pyupdate.averaged_weights(model):
        pass


@pytest.mark.parametrize("same_optimizer", [False, True])
def test_a_window_of_micro_batches_begins_anew_with_a_new_build(same_optimizer: bool) -> None:
    optimizer = keras.optimizers.SGD(1.0)
    model = pyupdate.build(Known([[1.0]]), optimizer, accumulation_steps=2)
    give(model, [1000.0])
    if not same_optimizer:
        optimizer = keras.optimizers.SGD(1.0)
    pyupdate.build(model, optimizer, accumulation_steps=2)
    for value in (1.0, -3.0, -3.0, -7.0):
        give(model, [4.0])
        assert weights(model)[0].tolist() == [value]


@pytest.mark.parametrize("option", [{"ema_decay": 0.5}, {"accumulation_steps": 2}])
def test_two_models_over_the_same_variables_and_one_optimizer(option: dict[str, Any]) -> None:
    one = network()
    two = keras.Model(one.inputs[0], one.outputs[0])
    optimizer = keras.optimizers.SGD(0.125)
    for model in (one, two):
        pyupdate.build(model, optimizer, **option)
    twin = network()
    update(one)
    update(two)
    if "ema_decay" in option:
        pyupdate.build(twin, "sgd", learning_rate=0.125)
        update(twin)
        after_one = weights(twin)
        update(twin)
        for model, before in ((two, after_one), (one, weights(network()))):
            after = weights(twin) if model is two else after_one
            with pyupdate.averaged_weights(model):
                true = [0.5 * (np.float64(a) + b) for a, b in zip(before, after, strict=True)]
                assert apart(weights(model), true) <= 1
        return
    assert int(optimizer.iterations) == 0  # a micro-batch of two each
    update(two)
    assert int(optimizer.iterations) == 1
    update(one)
    assert int(optimizer.iterations) == 2


def optimizer_of(kind: str) -> Any:
    plain = keras.optimizers.SGD(0.5)
    if kind == "scales":
        return keras.optimizers.LossScaleOptimizer(plain, initial_scale=1024.0)
    return keras.optimizers.SGD(0.5, loss_scale_factor=64.0) if kind == "factor" else plain


KINDS = ["plain", "scales", "factor"]


@pytest.mark.each_value
@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("graph", [False, True])
def test_deferred_under_one_optimizer_and_called_under_another(
    graph: bool, first: str, second: str
) -> None:
    """The one that is attached then steps, by what it gets unscaled; its state is made."""
    model = pyupdate.build(Known([[1.0]]), optimizer_of(first))
    before, after = model.current_optimizer, optimizer_of(second)

    def step(grad: Any) -> None:
        deferred: dict[str, Any] = {}
        model.current_optimizer = before
        give(model, grad, defer=True, deferred=deferred)
        model.current_optimizer = after
        deferred[model.model_name][0]()

    step = tf.function(step) if graph else step
    step(tf.constant([4.0]))
    assert weights(model)[0].tolist() == [-1.0]
    assert int(before.iterations) == 0
    assert int(after.iterations) == 1
    if second == "scales":
        assert int(after.step_counter) == 1
        step(tf.constant([math.inf]))
        assert (float(after.dynamic_scale), weights(model)[0].tolist()) == (512.0, [-1.0])


@pytest.mark.each_value
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("how", ["name", "callable", "scaled"])
def test_build_outside_of_the_scope_of_the_model(strategy: Any, how: str, graph: bool) -> None:
    values = [np.float32([1.0, -2.0])]
    with strategy.scope():
        model = Known(values)
    if how == "name":
        pyupdate.build(model, "adam", learning_rate=0.0625, beta_1=BETAS[0], beta_2=BETAS[1])
    else:

        def make() -> Any:
            inner = keras.optimizers.Adam(0.0625, *BETAS)
            return keras.optimizers.LossScaleOptimizer(inner) if how == "scaled" else inner

        pyupdate.build(model, make)
    hand = AdamByHand(values, 0.0625, *BETAS)
    step = repeated(strategy, model, graph)
    for grads in ([[1.0, 0.5], [3.0, -0.5]], [[0.25, 4.0], [0.75, 2.0]], [[-1.0, 1.0], [2.0, 1.0]]):
        step([grads])
        hand.step([np.float64(grads).mean(axis=0)])
    first, second = held(strategy, model)[0]
    assert first.tobytes() == second.tobytes()
    assert apart([first], hand.values) <= 8
    assert pyupdate.tensorflow.update.path_of(model) in ("XLA", passes.PATH)


@pytest.mark.parametrize("graph", [False, True])
def test_an_optimizer_of_another_scope_is_refused(strategy: Any, graph: bool) -> None:
    with strategy.scope():
        model, built = Known([[1.0]]), Known([[1.0]])
    words = r"made outside of the MirroredStrategy of the model's variables .* strategy.scope\(\)"
    optimizer = keras.optimizers.Adam(0.1)
    with pytest.raises(ValueError, match=words):
        pyupdate.build(model, optimizer)
    assert not hasattr(model, "current_optimizer")
    model.current_optimizer = optimizer
    built.current_optimizer = keras.optimizers.Adam(0.1)
    built.current_optimizer.build(built.held)
    for refused in (model, built):
        with pytest.raises(ValueError, match=words):
            repeated(strategy, refused, graph)([[[1.0], [2.0]]])
        assert [value.tolist() for value in held(strategy, refused)[0]] == [[1.0], [1.0]]
