# SPDX-License-Identifier: Apache-2.0
"""What XLA does not take is stepped all the same, and the log says once why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

import keras
from replicated import made
from rule_run import NUMBERS
from training import Known, Spelled, apart, give, ways

import pyupdate
import pyupdate.keras_optim
from pyupdate.tensorflow import passes
from pyupdate.tensorflow import update as keras_update

VALUES = [np.float32([1.0, -2.0, 3.0]), np.float32([0.5, 0.25])]
GRADS = [
    [np.float32([0.1, 0.2, -0.3]) * k, np.float32([-0.4, 0.05]) * (4 - k)] for k in (1.0, 2.0, 3.0)
]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for line in caplog.messages if "is stepped without XLA" in line]


def check_sgd(model: Known, step: Any = give) -> None:
    """Three steps of a rate of 0.5, against the mathematics by hand."""
    for grads in GRADS:
        step(model, *grads)
    true = [np.float64(v) - 0.5 * sum(grads[i] for grads in GRADS) for i, v in enumerate(VALUES)]
    assert apart([v.numpy() for v in model.held], true) <= 3.0  # each step rounds once


@pytest.fixture
def eagerly() -> Iterator[None]:
    """Functions run eagerly, as in debugging."""
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(False)


@pytest.mark.usefixtures("eagerly")
def test_functions_that_run_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    model = pyupdate.build(Known(VALUES), keras.optimizers.SGD(0.5))
    check_sgd(model)
    (line,) = said(caplog)
    assert line.startswith("SGD ") and "run_functions_eagerly is on" in line


@pytest.mark.parametrize("way", ["eager", "function"])
def test_variables_on_several_devices(way: str, caplog: pytest.LogCaptureFixture) -> None:
    class Parted(Known):
        """The second variable is on the second device."""

        def add_weight(self, *arguments: Any, **given: Any) -> Any:
            with tf.device(f"CPU:{1 if given['name'] == 'held1' else 0}"):
                return super().add_weight(*arguments, **given)

    model = pyupdate.build(Parted(VALUES), keras.optimizers.SGD(0.5))
    devices = {variable.value.device[-5:] for variable in model.held}
    assert devices == {"CPU:0", "CPU:1"}
    check_sgd(model, ways(lambda model, *grads: give(model, *grads))[way])
    (line,) = said(caplog)
    assert "several devices" in line and "CPU:0" in line and "CPU:1" in line
    assert {variable.value.device[-5:] for variable in model.held} == devices


@pytest.mark.parametrize("way", ["eager", "function"])
def test_an_optimizer_that_keeps_a_string(way: str, caplog: pytest.LogCaptureFixture) -> None:
    model = pyupdate.build(Known(VALUES), Spelled(0.5))
    check_sgd(model, ways(lambda model, *grads: give(model, *grads))[way])
    assert model.current_optimizer.written.numpy() == b"." * 6
    (line,) = said(caplog)
    assert line.startswith("Spelled ")


class Altered(keras.optimizers.SGD):
    """Steps by what a function makes of a gradient, in operations of the test's choice."""

    def __init__(self, alter: Callable[[Any], Any]) -> None:
        super().__init__(0.5)
        self.alter = alter

    def update_step(self, grad: Any, variable: Any, rate: Any) -> None:
        super().update_step(tf.ensure_shape(self.alter(grad), grad.shape), variable, rate)


def printed(grad: Any) -> Any:
    tf.print("", output_stream="file:///dev/null")
    return grad


def found_by_size(grad: Any) -> Any:
    """Of a size that is known when the gradient is: XLA must know shapes before."""
    whole = tf.cast(tf.reduce_sum(grad * 0.0), tf.int32) + 1
    return tf.tile(grad, [whole])


REFUSED = {
    "EagerPyFunc": lambda grad: tf.py_function(lambda given: given, [grad], tf.float32),
    "PyFunc": lambda grad: tf.numpy_function(lambda given: given, [grad], tf.float32),
    "AsString": lambda grad: tf.strings.to_number(tf.strings.as_string(grad, precision=9)),
    "PrintV2": printed,
    "Timestamp": lambda grad: grad + 0.0 * tf.cast(tf.timestamp(), tf.float32),
    "compile-time constant": found_by_size,
}
"""What XLA does not compile, each by the word that the log has for it."""


@pytest.mark.each_value
@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("why", REFUSED)
@pytest.mark.parametrize("way", ["eager", "function"])
def test_operations_that_xla_does_not_have(
    way: str, why: str, scales: bool, caplog: pytest.LogCaptureFixture
) -> None:
    optimizer = Altered(REFUSED[why])
    model = Known(VALUES)
    model.current_optimizer = (
        keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=64.0) if scales else optimizer
    )
    check_sgd(model, ways(lambda model, *grads: give(model, *grads))[way])
    (line,) = said(caplog)
    assert line.startswith("Altered ") and why in line
    assert keras_update.path_of(model).startswith("TensorFlow without XLA: ")
    assert int(optimizer.iterations) == 3


@pytest.mark.parametrize("way", ["eager", "function", "jit"])
def test_operations_that_only_look_as_if_xla_had_them_not(
    way: str, caplog: pytest.LogCaptureFixture
) -> None:
    def sorted_twice(grad: Any) -> Any:
        order = tf.argsort(grad)
        return tf.gather(tf.gather(grad, order), tf.argsort(order))

    tf.random.set_seed(1)
    drawn = tf.random.normal([])
    tf.random.set_seed(1)
    model = pyupdate.build(Known(VALUES), Altered(sorted_twice))
    check_sgd(model, ways(lambda model, *grads: give(model, *grads))[way])
    assert not said(caplog)
    assert keras_update.path_of(model) == "XLA"
    assert tf.random.normal([]) == drawn  # asking XLA moves no generator of the user's


def test_a_compiled_function_of_the_user_s_own_fails_as_tensorflow_has_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = pyupdate.build(Known(VALUES), Altered(REFUSED["AsString"]))
    step = tf.function(lambda *grads: give(model, *grads), jit_compile=True)
    with pytest.raises(tf.errors.InvalidArgumentError, match="AsString"):
        step(*map(tf.constant, GRADS[0]))
    assert len(said(caplog)) == 1
    assert [v.numpy().tolist() for v in model.held] == [value.tolist() for value in VALUES]
    check_sgd(model)  # called eagerly, it steps


@pytest.mark.slow  # every optimizer, traced and compiled
def test_what_keras_and_the_rules_have_is_not_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking takes as long as a trace."""

    def asked(*_: Any) -> str:
        raise AssertionError

    monkeypatch.setattr("pyupdate.tensorflow.xla.asked", asked)
    monkeypatch.setattr("pyupdate.tensorflow.order.LARGE", 1)
    monkeypatch.setattr("pyupdate.tensorflow.order.AHEAD", 1)
    schedules = keras.optimizers.schedules
    kinds = [kind for kind in vars(keras.optimizers).values() if isinstance(kind, type)]
    kinds = [kind for kind in kinds if issubclass(kind, keras.optimizers.Optimizer)]
    around = ("Optimizer", "LossScaleOptimizer", "MultiOptimizer")
    known = [kind() for kind in kinds if kind.__name__ not in around]
    assert len(known) >= 14
    known += [
        keras.optimizers.Adam(amsgrad=True, weight_decay=0.5, clipvalue=1.0),
        keras.optimizers.Adam(use_ema=True, ema_overwrite_frequency=3),
        keras.optimizers.Adam(gradient_accumulation_steps=2, global_clipnorm=1.0),
        keras.optimizers.Adam(gradient_accumulation_steps=2, clipnorm=1.0),
        keras.optimizers.Adam(schedules.ExponentialDecay(0.1, 10, 0.9, staircase=True)),
        keras.optimizers.Adam(schedules.CosineDecay(0.1, 10, warmup_target=0.2, warmup_steps=3)),
        keras.optimizers.Adam(schedules.CosineDecayRestarts(0.1, 10)),
        keras.optimizers.Adam(schedules.PolynomialDecay(0.1, 10, cycle=True)),
        keras.optimizers.Adam(schedules.PiecewiseConstantDecay([1, 2], [0.1, 0.2, 0.3])),
        pyupdate.keras_optim.from_rule("adamw", **NUMBERS["adamw"]),
    ]
    for optimizer in known:
        model = pyupdate.build(Known([np.ones((3, 4), np.float32), VALUES[0]]), optimizer)
        give(model, np.ones((3, 4), np.float32), GRADS[0][0])
        assert keras_update.path_of(model) in ("XLA", passes.PATH), optimizer.name


@pytest.mark.each_value
@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("way", ["eager", "function"])
def test_one_line_for_an_optimizer_whose_attributes_change(
    way: str, scales: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Every value is a plan of its own, and every retrace of the user's asks for one."""

    def one() -> Any:
        inner = Altered(REFUSED["EagerPyFunc"])
        inner.gain = 0
        return keras.optimizers.LossScaleOptimizer(inner) if scales else inner

    for number in (1, 2):
        model = pyupdate.build(Known(VALUES), one())
        inner = getattr(model.current_optimizer, "inner_optimizer", model.current_optimizer)
        for gain in range(4):
            inner.gain = gain
            ways(lambda *grads, model=model: give(model, *grads))[way](*GRADS[0])
            assert keras_update.path_of(model).startswith("TensorFlow without XLA: ")
        assert len(said(caplog)) == number  # a second optimizer has its own


def test_one_line_on_replicas(strategy: Any, caplog: pytest.LogCaptureFixture) -> None:
    tf.config.run_functions_eagerly(True)
    try:
        for number in (1, 2):
            model = made(strategy, VALUES, lambda: Altered(lambda grad: grad))
            for gain in range(3):
                model.current_optimizer.gain = gain
                strategy.run(lambda model=model: give(model, *GRADS[0]))
            assert len(said(caplog)) == number
    finally:
        tf.config.run_functions_eagerly(False)
