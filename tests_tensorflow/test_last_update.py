# SPDX-License-Identifier: Apache-2.0
"""What `last_update` says, whichever way the last step was made."""

from __future__ import annotations

import gc
import math
from typing import Any

import pytest

tf = pytest.importorskip("tensorflow", reason="tensorflow is not installed: pyupdate[tensorflow]")

import keras
from training import Known, give, ways

import pyupdate


@pytest.mark.parametrize("way", [pytest.param("function", marks=pytest.mark.slow), "jit"])
def test_a_function_an_eager_step_and_the_function_again(way: str) -> None:
    model = pyupdate.build(Known([[1.0, 2.0]]), "sgd", learning_rate=0.5, skip_nonfinite=True)
    step = ways(lambda grad: give(model, grad))[way]
    for called, grad, norm in (
        (step, [3.0, 4.0], 5.0),
        (lambda grad: give(model, grad), [6.0, 8.0], 10.0),
        (step, [30.0, 40.0], 50.0),
        (step, [math.inf, 1.0], math.inf),
        (lambda grad: give(model, grad), [6.0, 8.0], 10.0),
    ):
        called(tf.constant(grad))
        gc.collect()
        found = pyupdate.last_update(model)
        assert (found.norm, found.skipped) == (norm, norm == math.inf)
        assert found.multiplier == 1.0


def test_a_step_that_measures_and_one_that_does_not() -> None:
    """An optimizer's clip is taken away and given back; each function is traced with one."""
    inner = keras.optimizers.SGD(0.5, global_clipnorm=5.0)
    model = pyupdate.build(Known([[1.0, 2.0]]), inner)
    clipped, plain = (tf.function(lambda grad: give(model, grad)) for _ in range(2))
    clipped(tf.constant([6.0, 8.0]))
    inner.global_clipnorm = None
    plain(tf.constant([6.0, 8.0]))
    for called, found in (
        (plain, (None, False, 1.0)),
        (clipped, (10.0, False, 0.5)),
        (plain, (None, False, 1.0)),
        (lambda grad: give(model, grad), (None, False, 1.0)),
        (clipped, (10.0, False, 0.5)),
    ):
        called(tf.constant([6.0, 8.0]))
        told = pyupdate.last_update(model)
        assert (told.norm, told.skipped, told.multiplier) == found


@pytest.mark.parametrize("way", ["eager", "function", "jit"])
def test_the_multiplier_of_a_loss_scale_alone(way: str) -> None:
    model = pyupdate.build(Known([[1.0]]), keras.optimizers.SGD(0.5, loss_scale_factor=8.0))
    ways(lambda grad: give(model, grad))[way](tf.constant([1.0]))
    assert pyupdate.last_update(model) == pyupdate.options.LastUpdate(None, False, 0.125)


def test_what_is_kept_traces_no_function_twice() -> None:
    model = pyupdate.build(Known([[1.0]]), "sgd", learning_rate=0.5, skip_nonfinite=True)
    give(model, [1.0])
    traced = []

    @tf.function
    def step(grad: Any) -> None:
        traced.append(grad)
        give(model, grad)

    step(tf.constant([1.0]))
    assert len(traced) == 1
