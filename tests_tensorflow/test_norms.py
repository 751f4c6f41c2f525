# SPDX-License-Identifier: Apache-2.0
"""Norms of gradients that are scaled far up or down, or are float64; against numpy in fp64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="tensorflow is not installed: pyupdate[tensorflow]")

import keras
from replicated import held, made, repeated
from training import Known, apart, give, ways, weights

import pyupdate

VALUES = [np.float32([1.0, -2.0]), np.float32([0.5])]
GRADS = [np.float32([3.0, -4.0]), np.float32([12.0])]
SCALES = {"2^15": 2.0**15, "2^66": 2.0**66, "2^100": 2.0**100, "2^-70": 2.0**-70}
CLIPS = ["global_clipnorm", "clipnorm", "max_norm"]


def moves(clip: str, grads: Any) -> list[Any]:
    """What a clip at 2 leaves of gradients, in fp64."""
    wide = [np.float64(grad) for grad in grads]
    norms = [float(np.sqrt(np.sum(grad**2))) for grad in wide]
    if clip == "clipnorm":
        return [g * min(1.0, 2.0 / n) for g, n in zip(wide, norms, strict=True)]
    return [g * min(1.0, 2.0 / math.hypot(*norms)) for g in wide]


def optimizer_of(clip: str, scale: float, **given: Any) -> Any:
    own = {} if clip == "max_norm" else {clip: 2.0}
    inner = keras.optimizers.SGD(1.0, **own)
    return keras.optimizers.LossScaleOptimizer(inner, initial_scale=scale, **given)


# Each of two occurs with each; the slow ones are the rest.
WITH_EACH = [
    (way, scale, clip, (i + j + k) % 3)
    for i, way in enumerate(["eager", "function", "jit"])
    for j, scale in enumerate(SCALES)
    for k, clip in enumerate(CLIPS)
]


@pytest.mark.parametrize(
    ("way", "scale", "clip"),
    [pytest.param(*case, marks=pytest.mark.slow if rest else ()) for *case, rest in WITH_EACH],
)
def test_a_clip_of_scaled_gradients_is_that_of_unscaled_ones(
    way: str, scale: str, clip: str
) -> None:
    """Squares of what is scaled by 2^64 are inf, and by 2^-70 zero, though no gradient is."""
    bound = {"max_norm": 2.0} if clip == "max_norm" else {}
    model = pyupdate.build(Known(VALUES), optimizer_of(clip, SCALES[scale]), **bound)
    step = ways(lambda a, b: give(model, a, b))[way]
    step(*map(tf.constant, GRADS))
    by_hand = [v - m for v, m in zip(VALUES, moves(clip, GRADS), strict=True)]
    assert apart(weights(model), by_hand) <= 4
    found = pyupdate.last_update(model)
    assert (found.norm, found.skipped) == (13.0, False)
    before = weights(model)
    step(tf.constant(GRADS[0]), tf.constant([math.inf]))
    assert pyupdate.last_update(model).skipped is True
    assert all((a == b).all() for a, b in zip(before, weights(model), strict=True))
    assert float(model.current_optimizer.dynamic_scale) == SCALES[scale] / 2.0


def test_one_small_gradient_beside_large_ones_has_its_own_norm() -> None:
    """A norm for each: the sum over all of them says nothing of the small one's squares."""
    grads = [np.float32([2.0**40, 0.0]), np.float32([4.0])]
    model = pyupdate.build(Known(VALUES), optimizer_of("clipnorm", 2.0**-70))
    give(model, *grads)
    by_hand = [v - m for v, m in zip(VALUES, moves("clipnorm", grads), strict=True)]
    assert apart(weights(model), by_hand) <= 4


@pytest.mark.parametrize("way", ["eager", "function", "jit"])
def test_training_goes_on_at_the_largest_scale(way: str) -> None:
    """One over the scale, times what is clipped, must not be subnormal: that is zero."""
    model = Known([np.float32([1.0])])
    inner = keras.optimizers.SGD(2.0**-8, global_clipnorm=2.0**-8)
    model.current_optimizer = keras.optimizers.LossScaleOptimizer(
        inner, initial_scale=2.0**60, dynamic_growth_steps=1
    )
    step = ways(lambda grad: give(model, grad))[way]
    for _ in range(80):
        step(tf.constant([2.0]))
    assert apart(weights(model), [[1.0 - 80 * 2.0**-16]]) <= 1


@pytest.mark.each_value
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("graph", [False, True])
def test_replicas_clip_what_is_scaled_far_up(strategy: Any, graph: bool, clip: str) -> None:
    bound = {"max_norm": 2.0} if clip == "max_norm" else {}
    model = made(strategy, VALUES, lambda: optimizer_of(clip, 2.0**66), **bound)
    repeated(strategy, model, graph)([np.stack([0.5 * g, 1.5 * g]) for g in GRADS])
    by_hand = [v - m for v, m in zip(VALUES, moves(clip, GRADS), strict=True)]
    for number in range(2):
        found = [each[number] for each in held(strategy, model)]
        assert apart(found, by_hand) <= 4


def far(found: Any, true: Any) -> float:
    """The largest relative distance of two float64 numbers."""
    return max(
        float(np.max(np.abs(np.float64(a) - b) / np.abs(b)))
        for a, b in zip(found, true, strict=True)
    )


@pytest.mark.each_value
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("size", [1.0, 1e20])
@pytest.mark.parametrize("way", ["eager", "function", "jit"])
def test_norms_of_float64_gradients(way: str, size: float, clip: str) -> None:
    """Near 1e20 their squares are no float32, and a float32 multiplier is 3e-8 off."""
    values, grads = [np.float64([1.0, -2.0]), np.float64([0.5])], [3.1 * size, -4.2 * size]
    grads = [np.float64(grads), np.float64([11.3 * size])]
    own = {} if clip == "max_norm" else {clip: 2.0}
    bound = {"max_norm": 2.0} if clip == "max_norm" else {}
    model = pyupdate.build(Known(values, "float64"), keras.optimizers.SGD(1.0, **own), **bound)
    ways(lambda a, b: give(model, a, b))[way](*map(tf.constant, grads))
    guard = 1e-6 / math.hypot(3.1, 4.2, 11.3) / size if clip == "max_norm" else 0.0  # torch's
    by_hand = [v - m / (1.0 + guard) for v, m in zip(values, moves(clip, grads), strict=True)]
    assert far(weights(model), by_hand) < 1e-14
    norm = math.hypot(3.1, 4.2, 11.3) * size
    assert abs(pyupdate.last_update(model).norm / norm - 1.0) < 1e-14


@pytest.mark.parametrize("way", ["eager", "function", "jit"])
def test_parts_and_means_of_float64_gradients(way: str) -> None:
    """A third, and one over a scale of 3, are float64 numbers; so is the rate of an average."""
    values, grads = [np.float64([1.0, -2.0, 4.0])], [np.float64([0.3, 0.7, -1.9])]
    inner = keras.optimizers.SGD(0.5, loss_scale_factor=3.0)
    model = pyupdate.build(
        Known(values, "float64"), inner, accumulation_steps=3, ema_decay=0.9, max_norm=1e9
    )
    step = ways(lambda a: give(model, a))[way]
    for _ in range(3):
        step(tf.constant(grads[0]))
    true = [values[0] - 0.5 * grads[0]]
    assert far(weights(model), true) < 1e-14
    assert pyupdate.last_update(model).multiplier == 1.0
    with pyupdate.averaged_weights(model):
        assert far(weights(model), [0.9 * values[0] + 0.1 * true[0]]) < 1e-14


def test_the_mean_of_a_float64_loss() -> None:
    values, grads = [np.float64([1.0, -2.0])], np.float64([0.3, 0.7])
    model = pyupdate.build(Known(values, "float64"), keras.optimizers.SGD(1.0), clip_value=0.65)
    with tf.GradientTape() as tape:
        loss = tf.stack([3.0 * model([tf.constant(grads)])] + [tf.zeros([], tf.float64)] * 2)
    pyupdate.update_model(model, loss, tape=tape)
    assert far(weights(model), [values[0] - np.minimum(grads, 0.65)]) < 1e-14


@pytest.mark.parametrize("clip", ["global_clipnorm", "clipnorm"])
def test_a_bound_of_zero_is_none_as_in_keras(clip: str) -> None:
    model = pyupdate.build(Known(VALUES), keras.optimizers.SGD(1.0, **{clip: 0.0}))
    twin = Known(VALUES)
    give(model, *GRADS)
    keras.optimizers.SGD(1.0, **{clip: 0.0}).apply([tf.constant(g) for g in GRADS], twin.held)
    assert apart(weights(model), weights(twin)) == 0
    assert apart(weights(model), [v - g for v, g in zip(VALUES, GRADS, strict=True)]) == 0


def test_one_clip_of_several_as_in_keras() -> None:
    """Its constructor takes one, but they are attributes: the norm of each goes before others."""
    twin = Known(VALUES)
    model = pyupdate.build(Known(VALUES), keras.optimizers.SGD(1.0, clipnorm=2.0))
    other = keras.optimizers.SGD(1.0, clipnorm=2.0)
    for optimizer in (model.current_optimizer, other):
        optimizer.global_clipnorm, optimizer.clipvalue = 0.5, 0.25
    give(model, *GRADS)
    other.apply([tf.constant(g) for g in GRADS], twin.held)
    assert apart(weights(model), weights(twin)) <= 1
