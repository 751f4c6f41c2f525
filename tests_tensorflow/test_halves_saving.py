# SPDX-License-Identifier: Apache-2.0
"""Half-precision variables on disk: float32 state comes back, to the bit where it is all kept."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="tensorflow is not installed: pyupdate[tensorflow]")

import keras
from training import AdamByHand, Known, give, ways

import pyupdate

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

RATE, BETAS = 2.0**-9, (0.875, 0.984375)
GRADS = np.abs(np.random.default_rng(3).normal(size=(20, 1, 3))).astype("bfloat16")


def network(package: Any = keras) -> Any:
    """One row of three weights, whose gradient is the data."""
    dense = package.layers.Dense(1, use_bias=False, name="row", dtype="bfloat16")
    model = package.Sequential([package.layers.InputLayer((3,)), dense])
    model(tf.zeros([1, 3]))
    model.weights[0].assign(np.float32([[1.0], [-2.0], [0.75]]))
    return model


def train(model: Any, first: int, last: int, way: str = "eager") -> None:
    def step(grad: Any) -> None:
        with tf.GradientTape() as tape:
            loss = model(grad)
        pyupdate.update_model(model, loss, tape=tape)

    step = ways(step)[way]
    for grad in GRADS[first:last]:
        step(tf.constant(grad))


def numbers(model: Any) -> list[bytes]:
    """All bits of the weights and of the optimizer's state."""
    held = model.current_optimizer.variables
    every = [*model.weights, *(held() if callable(held) else held)]
    return [np.asarray(tf.convert_to_tensor(v).numpy()).tobytes() for v in every]


def made(kind: str) -> Any:
    if kind.startswith("keras"):
        inner = keras.optimizers.Adam(RATE, *BETAS, use_ema=kind == "keras average")
        return keras.optimizers.LossScaleOptimizer(inner) if kind == "keras scaled" else inner
    tf_keras = pytest.importorskip("tf_keras")
    home = tf_keras.optimizers
    inner = (home.legacy if "legacy" in kind else home).Adam(RATE, *BETAS)
    scaled = tf_keras.mixed_precision.LossScaleOptimizer
    return scaled(inner) if "scaled" in kind else inner


KINDS = ["keras", "keras scaled", "keras average", "tf-keras", "tf-keras scaled"]
KINDS += ["tf-keras legacy", "tf-keras legacy scaled"]


@pytest.mark.each_value
@pytest.mark.parametrize("when", ["before it is built", "after"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_keeps_every_bit(kind: str, when: str, tmp_path: Path) -> None:
    def fresh() -> Any:
        model = network() if kind.startswith("keras") else network(pytest.importorskip("tf_keras"))
        model.current_optimizer = made(kind)
        return model

    model = pyupdate.build(m := fresh(), m.current_optimizer)
    train(model, 0, 9)
    saved = tf.train.Checkpoint(model=model, optimizer=model.current_optimizer).save(tmp_path / "c")
    train(model, 9, 20)

    later = fresh()
    if when == "after":
        pyupdate.build(later, later.current_optimizer)
    other = tf.train.Checkpoint(model=later, optimizer=later.current_optimizer)
    status = other.restore(saved)
    train(later, 9, 20)
    status.assert_consumed()
    assert numbers(later) == numbers(model)


def check_loaded(model: Any, way: str, caplog: pytest.LogCaptureFixture) -> None:
    """It goes on from what Keras has rounded, as Adam does by hand in fp64."""
    model.current_optimizer = model.optimizer
    inner = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    adam = AdamByHand([np.float32(model.weights[0].numpy())], RATE, *BETAS)
    adam.count = 9
    adam.first = [np.float64(np.float32(inner._momentums[0].value.numpy()))]
    adam.second = [np.float64(np.float32(inner._velocities[0].value.numpy()))]
    begun = adam.values[0]
    with caplog.at_level(logging.WARNING, logger="pyupdate"):
        train(model, 9, 20, way)
    for grad in GRADS[9:20]:
        adam.step([grad.T.astype(np.float64)])
    found, true = np.float64(np.float32(model.weights[0].numpy())), adam.values[0]
    assert np.all(np.abs(found - true) <= np.abs(true) * 2.0**-8 * 1.01)
    assert np.all(np.abs(true - begun) > 2.0**-8)
    np.testing.assert_allclose(inner._velocities[0].numpy(), adam.second[0], rtol=1e-5)
    (line,) = (line for line in caplog.messages if "goes on in float32" in line)
    assert "bfloat16" in line and "tf.train.Checkpoint" in line


@pytest.mark.each_value
@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("way", ["eager", "function", "jit"])
def test_a_keras_file(
    way: str, scales: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Keras builds the optimizer on the variables themselves, with state in bfloat16."""
    model = network()
    model.compile(optimizer=made("keras scaled" if scales else "keras"))
    train(model, 0, 9)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    check_loaded(loaded, way, caplog)

    saved = tf.train.Checkpoint(model=loaded, optimizer=loaded.optimizer).save(tmp_path / "c")
    again = keras.models.load_model(tmp_path / "model.keras")
    pyupdate.build(again, again.optimizer)  # else there is no float32 state to restore
    other = tf.train.Checkpoint(model=again, optimizer=again.optimizer)
    other.restore(saved).assert_consumed()
    assert numbers(again) == numbers(loaded)


@pytest.mark.parametrize("graph", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_keras_file_on_replicas(strategy: Any, graph: bool, tmp_path: Path) -> None:
    model = network()
    model.compile(optimizer=made("keras"))
    train(model, 0, 9)
    model.save(tmp_path / "model.keras")
    with strategy.scope():
        loaded = keras.models.load_model(tmp_path / "model.keras")
    alone = keras.models.load_model(tmp_path / "model.keras")

    def on_all(grad: Any) -> None:
        def one() -> None:
            with tf.GradientTape() as tape:
                loss = loaded(grad)
            pyupdate.update_model(loaded, loss, tape=tape)

        strategy.run(one)

    called = tf.function(on_all) if graph else on_all
    for grad in GRADS[9:20]:
        called(tf.constant(grad))
    train(alone, 9, 20)
    for mine in strategy.experimental_local_results(loaded.weights[0].value):
        assert mine.numpy().tobytes() == alone.weights[0].numpy().tobytes()
    for state in loaded.optimizer._momentums:
        for mine in strategy.experimental_local_results(state.value):
            assert mine.numpy().tobytes() == alone.optimizer._momentums[0].numpy().tobytes()
            assert mine.dtype == tf.float32


def test_a_multi_optimizer_that_keras_has_built() -> None:
    from keras.src.optimizers.multi_optimizer import OptimizerMap

    model = network()
    parts = OptimizerMap(keras.optimizers.SGD(1.0), {".*row/.*": keras.optimizers.SGD(2.0**-10)})
    optimizer = keras.optimizers.MultiOptimizer(parts)
    optimizer.build(model.trainable_variables)
    model.current_optimizer = optimizer
    for _ in range(8):  # a quarter of the unit of 1 each
        with tf.GradientTape() as tape:
            loss = model(tf.constant([[-2.0, 2.0, 0.0]]))
        pyupdate.update_model(model, loss, tape=tape)
    assert np.float32(model.weights[0].numpy()).ravel().tolist() == [1.015625, -2.015625, 0.75]


def test_an_optimizer_of_two_models_that_keras_has_built() -> None:
    """The first model to be stepped has no variable in half precision."""
    whole, half = Known([[1.0]]), Known([[1.0]], "bfloat16")
    optimizer = keras.optimizers.SGD(2.0**-10)
    optimizer.build([*whole.trainable_variables, *half.trainable_variables])
    for model in (whole, half):
        model.current_optimizer = optimizer
        for _ in range(8):  # a quarter of bfloat16's unit of 1 each, upwards
            give(model, [-2.0])
    assert float(whole.held[0].numpy()[0]) == 1.0 + 2.0**-6
    assert float(half.held[0].numpy()[0]) == 1.0 + 2.0**-6
