# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RET504 - a rule returns the names that it assigned
"""Optimizers of `keras_optim.from_rule` on disk: training goes on with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="tensorflow is not installed: pyupdate[tensorflow]")

import keras
from test_keras_optim import TEXTS, numbers_of
from training import network, update, weights

import pyupdate
from pyupdate import keras_optim
from pyupdate.language import sign

# Keras converts its variables so when it saves them.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

QUICK = ("sgd", "novograd")  # without powers, which take XLA seconds to compile


@pyupdate.rule(state={"exp_avg": 0.0, "slow": "param"}, defaults={"beta": 0.9})
def signum(param, grad, exp_avg, slow, lr, beta):
    exp_avg = exp_avg * beta + grad * (1.0 - beta)
    param = param - lr * sign(exp_avg)
    slow = slow + (param - slow) * 0.25
    return param, exp_avg, slow


def optimizer_of(name: str) -> Any:
    if name == "own":
        return keras_optim.from_rule(signum, lr=0.125)
    return keras_optim.from_rule(name, **numbers_of(name))


def trained(name: str, steps: int) -> Any:
    model = network()
    model.compile(optimizer=optimizer_of(name), loss="mse")
    for _ in range(steps):
        update(model)
    return model


def bits(model: Any) -> list[bytes]:
    held = [np.asarray(variable) for variable in model.optimizer.variables]
    return [value.tobytes() for value in (*weights(model), *held)]


def go_on(*models: Any) -> None:
    """Three steps of each; all must then be the first to the bit, which must have moved."""
    before = weights(models[0])
    for model in models:
        for _ in range(3):
            update(model)
    assert all((a != b).any() for a, b in zip(before, weights(models[0]), strict=True))
    for model in models[1:]:
        assert bits(model) == bits(models[0])


@pytest.mark.parametrize(
    "name",
    ["own", *(n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in TEXTS)],
)
def test_training_goes_on_from_disk_with_the_same_bits(name: str, tmp_path: Path) -> None:
    model = trained(name, steps=3)
    model.save(tmp_path / "model.keras")
    saved = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(tmp_path / "mid")

    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.rule is model.optimizer.rule
    assert loaded.optimizer.numbers == model.optimizer.numbers
    late = network(seed=9)  # whose optimizer has no state yet when it is restored
    late.compile(optimizer=optimizer_of(name))
    status = tf.train.Checkpoint(model=late, optimizer=late.optimizer).restore(saved)
    go_on(model, loaded, late)
    status.assert_consumed()

    true = bits(model)
    back = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    back.restore(saved).assert_consumed()  # into the very objects, three steps later
    go_on(model)
    assert bits(model) == true


def test_a_schedule_and_a_changed_rate_are_saved(tmp_path: Path) -> None:
    model = network()
    schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 2, 0.5)
    model.compile(optimizer=keras_optim.from_rule(signum, lr=schedule), loss="mse")
    update(model)
    model.save(tmp_path / "model.keras")
    go_on(model, keras.models.load_model(tmp_path / "model.keras"))

    model = trained("own", steps=1)
    model.optimizer.learning_rate = 0.375
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert float(loaded.optimizer.learning_rate) == 0.375
    go_on(model, loaded)


def test_a_rule_that_no_module_holds_is_a_custom_object(tmp_path: Path) -> None:
    @pyupdate.rule
    def hidden(param, grad, lr):
        param = param - lr * grad
        return param

    model = network()
    model.compile(optimizer=keras_optim.from_rule(hidden, lr=0.25), loss="mse")
    update(model)
    path = tmp_path / "model.keras"
    model.save(path)
    with pytest.raises((ValueError, TypeError), match=r"custom_objects=\{'hidden': the rule\}"):
        keras.models.load_model(path)
    loaded = keras.models.load_model(path, custom_objects={"hidden": hidden})
    assert loaded.optimizer.rule is hidden
    go_on(model, loaded)
    again = type(model.optimizer).from_config(model.optimizer.get_config(), {"hidden": hidden})
    assert again.rule is hidden
