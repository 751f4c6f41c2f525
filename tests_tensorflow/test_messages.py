# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RET504 - a rule returns the names that it assigned
"""What is refused is named, and the mend with it; nothing has moved."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="tensorflow is not installed: pyupdate[tensorflow]")

import keras
from keras.src.optimizers.multi_optimizer import OptimizerMap
from replicated import held, made
from training import Known, give, losses, network, update, weights

import pyupdate
from pyupdate.tensorflow import update as keras_update

VALUES = [np.float32([1.0]), np.float32([-2.0])]


def tf_keras() -> Any:
    return pytest.importorskip("tf_keras")


REFUSED_BY_BUILD = {
    "a callable with arguments": (
        lambda: pyupdate.build(network(), lambda variables: keras.optimizers.Adam()),
        r"'variables'.*without arguments|without arguments.*'variables'.*lambda: keras",
    ),
    "a name's option": (
        lambda: pyupdate.build(network(), "adam", lr=0.1),
        r"Adam refuses.*\{'lr': 0.1\}.*takes learning_rate, beta_1",
    ),
    "tf-keras's for Keras": (
        lambda: pyupdate.build(network(), tf_keras().optimizers.Adam()),
        r"optimizer is tf_keras's Adam, but the model is keras's: give one of keras.optimizers",
    ),
    "Keras's for tf-keras": (
        lambda: pyupdate.build(network(tf_keras()), keras.optimizers.Adam),
        r"optimizer is keras's Adam, but the model is tf_keras's: give one of tf_keras.optimizers",
    ),
    "a rule for tf-keras": (
        lambda: pyupdate.build(network(tf_keras()), pyupdate.rule(plain), lr=0.1),
        r"the model is tf-keras's: give one of tf_keras.optimizers",
    ),
}


def plain(param, grad, lr):
    param = param - lr * grad
    return param


@pytest.mark.parametrize("what", REFUSED_BY_BUILD)
def test_what_build_refuses(what: str) -> None:
    call, message = REFUSED_BY_BUILD[what]
    with pytest.raises(ValueError, match=message):
        call()


def test_an_optimizer_of_the_other_package_that_was_set() -> None:
    model = network()
    model.current_optimizer = tf_keras().optimizers.SGD()
    with pytest.raises(ValueError, match=r"current_optimizer of '.+' is tf_keras's SGD"):
        update(model)


@pytest.mark.parametrize("graph", [False, True])
def test_a_tape_that_was_used(graph: bool) -> None:
    model = pyupdate.build(network(), "sgd", model_name="digits")

    def twice() -> None:
        with tf.GradientTape() as tape:
            loss = losses(model)
        for _ in range(2):
            pyupdate.update_model(model, loss, tape=tape)

    with pytest.raises(RuntimeError, match=r"tape .* of 'digits'.*persistent=True"):
        (tf.function(twice) if graph else twice)()


def test_losses_that_cannot_be_differentiated() -> None:
    model = pyupdate.build(network(), "sgd", model_name="digits")
    with tf.GradientTape() as tape:
        whole = tf.cast(losses(model), tf.int32)
    with pytest.raises(ValueError, match=r"loss of 'digits' must be a floating .*int32: compute"):
        pyupdate.update_model(model, whole, tape=tape)
    with pytest.raises(ValueError, match=r"no trainable variable of 'digits'.*inside `with"):
        pyupdate.update_model(model, tf.constant(1.0), tape=tape)
    with pytest.raises(ValueError, match=r"'digits' was not stepped yet: call"):
        keras_update.path_of(model)


def several() -> Any:
    parts = {".*held0": keras.optimizers.SGD(0.5)}
    return keras.optimizers.MultiOptimizer(OptimizerMap(keras.optimizers.SGD(0.25), parts))


@pytest.mark.parametrize("kind", ["plain", "scaled", "several", "bfloat16", "tf-keras"])
def test_a_layer_that_was_frozen_when_the_optimizer_was_built(kind: str) -> None:
    if kind == "tf-keras":
        model = network(tf_keras())
        layer, path = model.layers[0], "dense.*/kernel"
    else:
        model = Known(VALUES, "bfloat16" if kind == "bfloat16" else "float32")
        layer, path = model.held[0], "held0"
    layer.trainable = False
    plainly = (tf_keras() if kind == "tf-keras" else keras).optimizers.SGD(0.5)
    optimizer = {"scaled": lambda: keras.optimizers.LossScaleOptimizer(plainly)}
    optimizer["several"] = several
    pyupdate.build(model, optimizer.get(kind, lambda: plainly), model_name="digits")
    layer.trainable = True
    before = weights(model)

    def step() -> None:
        update(model) if kind == "tf-keras" else give(model, [1.0], [1.0])

    with pytest.raises(ValueError, match=rf"{path}.* of 'digits'.*pyupdate.build"):
        step()
    assert all((a == b).all() for a, b in zip(before, weights(model), strict=True))
    pyupdate.build(model, type(plainly)(0.5))
    step()
    assert any((a != b).any() for a, b in zip(before[:1], weights(model)[:1], strict=True))


def test_replicas_outside_of_run(strategy: Any) -> None:
    model = made(strategy, VALUES, lambda: keras.optimizers.SGD(0.5))
    message = r"is on several replicas.*outside of strategy.run: call update_model in"
    with strategy.scope(), pytest.raises(ValueError, match=message):
        give(model, [1.0], [1.0])
    assert held(strategy, model) == [[[1.0], [1.0]], [[-2.0], [-2.0]]]


def test_replicas_that_the_user_compiles(strategy: Any) -> None:
    model = made(strategy, VALUES, lambda: keras.optimizers.SGD(0.5))
    compiled = tf.function(lambda: give(model, [1.0], [1.0]), jit_compile=True)
    with pytest.raises(ValueError, match=r"jit_compile=True\) on one replica of several.*Leave"):
        strategy.run(compiled)
    assert held(strategy, model) == [[[1.0], [1.0]], [[-2.0], [-2.0]]]
    strategy.run(tf.function(lambda: give(model, [1.0], [1.0])))
    assert held(strategy, model) == [[[0.5], [0.5]], [[-2.5], [-2.5]]]


@pytest.mark.parametrize("way", ["eager", "function"])
def test_replicas_outside_of_any_strategy(
    strategy: Any, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A step on one loss for all replicas, without XLA: known before a micro-batch is added."""
    model = made(strategy, VALUES, lambda: keras.optimizers.SGD(0.5), accumulation_steps=2)
    step = tf.function(lambda a: give(model, a, a)) if way == "function" else None
    for grad in ([1.0], [2.0], [4.0], [2.0]):
        step(tf.constant(grad)) if step else give(model, grad, grad)
    expected = [1.0 - 0.75 - 1.5, -2.0 - 0.75 - 1.5]
    assert held(strategy, model) == [[[value]] * 2 for value in expected]
    (line,) = (line for line in caplog.messages if "outside of strategy.run" in line)
    assert line.startswith("SGD is stepped without XLA")
