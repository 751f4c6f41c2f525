# SPDX-License-Identifier: Apache-2.0
"""What XLA does not take is stepped all the same, and the log says once why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

import keras
from training import Known, Spelled, apart, give, ways

import pyupdate

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
