# SPDX-License-Identifier: Apache-2.0
"""Keras's own Adam and AdamW by the compiled passes: right, in place, and nothing lost."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="tensorflow is not installed: pyupdate[tensorflow]")

import keras
from by_passes import PATH, SIZES, drawn, scaled, state_of
from test_keras_optim import numbers_of
from training import EPS, LACKS_PASSES, AdamByHand, Known, apart, give, ways, weights

import pyupdate
from pyupdate import keras_optim
from pyupdate.tensorflow import passes
from pyupdate.tensorflow.update import path_of

Adam, AdamW = keras.optimizers.Adam, keras.optimizers.AdamW

pytestmark = pytest.mark.skipif(LACKS_PASSES, reason=passes.why_not())


class HandW(AdamByHand):
    """Keras's Adam or AdamW in fp64, with the maximum of second moments."""

    amsgrad = False
    decays: tuple[float, ...] = ()

    def step(self, grads: Any) -> None:
        for i, decay in enumerate(self.decays):
            self.values[i] = self.values[i] * (1.0 - self.lr * decay)
        if not self.amsgrad:
            super().step(grads)
            return
        if self.count == 0:
            self.largest = [np.zeros_like(value) for value in self.values]
        before = [value.copy() for value in self.values]
        super().step(grads)
        rate = self.lr * np.sqrt(1 - self.beta2**self.count) / (1 - self.beta1**self.count)
        for i, second in enumerate(self.second):
            self.largest[i] = np.maximum(self.largest[i], second)
            move = rate * self.first[i] / (np.sqrt(self.largest[i]) + 1e-7)
            self.values[i] = before[i] - move


KINDS = {
    "adam": (lambda: Adam(0.01), False, 0.0),
    "amsgrad": (lambda: Adam(0.01, amsgrad=True), True, 0.0),
    "decayed": (lambda: Adam(0.01, weight_decay=0.1), False, 0.1),
    "adamw": (lambda: AdamW(0.01, weight_decay=0.1), False, 0.1),
    "adamw amsgrad": (lambda: AdamW(0.01, weight_decay=0.1, amsgrad=True), True, 0.1),
}


@pytest.mark.each_value
@pytest.mark.parametrize("way", ["eager", "function", "jit"])
@pytest.mark.parametrize("kind", KINDS)
def test_keras_adam_by_hand_and_by_keras(kind: str, way: str) -> None:
    """With Keras's own betas: its bias correction is by the beta in float32, 6.5e-6 of a step."""
    make, amsgrad, decay = KINDS[kind]
    sizes = [7, 130]
    values = drawn(1, sizes)
    model, keras_model = Known(values), Known(values)
    model.current_optimizer, theirs = make(), make()
    hand = HandW(values, float(np.float32(0.01)))
    hand.amsgrad, hand.decays = amsgrad, (decay,) * 2
    step = ways(lambda a, b: give(model, a, b))[way]
    for seed in range(2, 7):
        grads = drawn(seed, sizes)
        step(*map(tf.constant, grads))
        hand.step(grads)
        theirs.apply([tf.constant(g) for g in grads], keras_model.trainable_variables)
    assert path_of(model) == PATH
    assert apart(weights(model), hand.values, floor=0.1) <= 8
    short = 5 * 0.01 * 6.5e-6 / (0.1 * EPS)
    assert apart(weights(model), weights(keras_model), floor=0.1) <= 8 + short
    # iterations, learning rate, then the moments, which the bias correction does not reach
    assert len(model.current_optimizer.variables) == len(theirs.variables)
    moments = state_of(model.current_optimizer)[2:], state_of(theirs)[2:]
    assert apart(*moments, floor=0.1) <= 8


def test_what_is_excluded_from_the_decay() -> None:
    values = drawn(1, SIZES)
    model = Known(values)
    model.current_optimizer = optimizer = AdamW(0.01, weight_decay=0.5)
    optimizer.exclude_from_weight_decay([model.held[1], model.held[4]])
    hand = HandW(values, float(np.float32(0.01)))
    hand.decays = (0.5, 0.0, 0.5, 0.5, 0.0)
    for seed in range(3):
        grads = drawn(seed + 2, SIZES)
        give(model, *grads)
        hand.step(grads)
    assert path_of(model) == PATH
    found = [held for held in weights(model) if held.size]
    assert apart(found, [true for true in hand.values if true.size], floor=0.1) <= 8
    assert int(optimizer.iterations) == 3


def test_a_multiplier_each_and_state_by_variable() -> None:
    """In two groups, and with a variable frozen in front of them."""
    sizes = [3, 7, 130, 5, 33]
    values = drawn(1, sizes)
    model = Known(values)
    model.current_optimizer = optimizer = AdamW(0.01, weight_decay=0.5, clipnorm=3.0, epsilon=0.1)
    optimizer.exclude_from_weight_decay([model.held[2], model.held[4]])
    optimizer.build(model.held)
    model.held[0].trainable = False
    hand = HandW(values[1:], float(np.float32(0.01)))
    hand.epsilon, hand.decays = 0.1, (0.5, 0.0, 0.5, 0.0)
    for seed in range(3):
        grads = [grad * k for k, grad in enumerate(drawn(seed + 2, sizes), start=1)]
        give(model, *grads)
        norms = [math.sqrt(float(np.sum(np.float64(grad) ** 2))) for grad in grads]
        factors = [min(1.0, 3.0 / norm) for norm in norms]
        hand.step([np.float64(g) * f for g, f in zip(grads, factors, strict=True)][1:])
    assert path_of(model) == PATH
    held = {variable.path: variable.numpy() for variable in model.held}
    found = [held[variable.path] for variable in model.held[1:]]
    assert apart(found, hand.values, floor=0.1) <= 8
    assert np.array_equal(model.held[0].numpy(), values[0])
    for kept, true in ((optimizer._momentums, hand.first), (optimizer._velocities, hand.second)):
        assert not np.any(kept[0].numpy())
        assert apart([v.numpy() for v in kept[1:]], true, floor=0.1) <= 8


def test_a_number_for_a_scale_is_divided_by_and_nothing_is_skipped_unasked() -> None:
    numbers = numbers_of("sgd") | {"lr": 0.5, "weight_decay": 0.0}
    model = Known([np.float32([1.0, 2.0])])
    model.current_optimizer = keras_optim.from_rule("sgd", **numbers, loss_scale_factor=8.0)
    give(model, np.float32([1.0, -2.0]))
    assert weights(model)[0].tolist() == [0.5, 3.0]
    pyupdate.build(model, keras_optim.from_rule("sgd", **numbers), max_norm=1.0)
    give(model, np.float32([1.0, math.nan]))
    assert path_of(model) == PATH
    assert np.isnan(weights(model)[0]).all()


def test_a_step_takes_no_memory_for_results() -> None:
    """By the pages that a process is given: where results had memory of their own, three times."""
    resource = pytest.importorskip("resource")
    size = 2**23  # 32 MiB each: glibc gives smaller ones out again without new pages
    model = pyupdate.build(Known([np.zeros(size, np.float32)]), Adam(0.01))
    grad = tf.ones([size])

    @tf.custom_gradient
    def known(_: Any) -> Any:
        return tf.constant(0.0), lambda _: grad

    given = []
    for _ in range(5):
        with tf.GradientTape() as tape:
            loss = known(model.held[0].value)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        pyupdate.update_model(model, loss, tape=tape)
        given.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert path_of(model) == PATH
    assert min(given) * resource.getpagesize() < 4 * size


@pytest.mark.each_value
@pytest.mark.parametrize("way", ["eager", "function", "jit"])
@pytest.mark.parametrize("clip", ["global_clipnorm", "clipnorm"])
def test_scaled_clipped_and_skipped_by_hand(clip: str, way: str) -> None:
    sizes = [7, 130, 3]
    values = drawn(1, sizes)
    model = Known(values)
    inner = Adam(0.01, **{clip: 1.0})
    model.current_optimizer = optimizer = scaled(inner)
    hand = AdamByHand(values, float(np.float32(0.01)))
    step = ways(lambda *grads: give(model, *grads))[way]
    scale, count = 1024.0, 0
    for turn, bad in enumerate((None, None, math.inf, None, math.nan, None)):
        grads = drawn(turn + 2, sizes)
        if bad is not None:
            grads[1][77] = bad
        before = [*weights(model), *state_of(inner)]
        step(*map(tf.constant, grads))
        found = pyupdate.last_update(model)
        assert found.skipped is (bad is not None)
        if bad is None:
            norms = [math.sqrt(float(np.sum(np.float64(g) ** 2))) for g in grads]
            norm = math.sqrt(sum(n * n for n in norms))
            assert found.norm == pytest.approx(norm, rel=1e-6)
            bound = norm if clip == "global_clipnorm" else max(norms)
            assert found.multiplier * scale == pytest.approx(1.0 / bound, rel=1e-6)
            each = [norm] * 3 if clip == "global_clipnorm" else [max(n, 1.0) for n in norms]
            hand.step([np.float64(g) / n for g, n in zip(grads, each, strict=True)])
            assert apart(weights(model), hand.values, floor=0.1) <= 8
            count += 1
            scale, count = (scale * 2.0, 0) if count == 2 else (scale, count)
        else:
            now = [*weights(model), *state_of(inner)]
            assert all(a.tobytes() == b.tobytes() for a, b in zip(before, now, strict=True))
            scale, count = scale / 2.0, 0
        assert float(optimizer.dynamic_scale) == scale
        assert int(optimizer.step_counter) == count
    assert path_of(model) == PATH
    assert int(inner.iterations) == hand.count


@pytest.mark.parametrize("way", ["eager", "function", "jit"])
def test_who_holds_an_old_value_keeps_it(way: str) -> None:
    """Memory that another tensor shares is not moved in place."""
    values = drawn(1, SIZES)
    model = pyupdate.build(Known(values), Adam(0.5))
    step = ways(lambda *grads: give(model, *grads))[way]
    grads = [tf.constant(grad) for grad in drawn(2, SIZES)]
    for _ in range(3):
        held = [variable.value.value() for variable in model.held]
        moments = [v.value.value() for v in model.current_optimizer.variables]
        before = [tensor.numpy().copy() for tensor in (*held, *moments)]
        step(*grads)
        for tensor, value in zip((*held, *moments), before, strict=True):
            assert tensor.numpy().tobytes() == value.tobytes()
        assert not np.array_equal(weights(model)[1], before[1])


def test_a_user_s_model_in_one_function_for_many_steps() -> None:
    """The whole loop in XLA, where a step's results are the next one's operands."""
    values = drawn(1, SIZES)
    model = Known(values)
    model.current_optimizer = Adam(0.01)
    hand = AdamByHand(values, float(np.float32(0.01)))
    grads = drawn(2, SIZES)

    @tf.function(jit_compile=True)
    def steps() -> None:
        for _ in range(3):
            give(model, *map(tf.constant, grads))

    steps()
    for _ in range(3):
        hand.step(grads)
    found = [held for held in weights(model) if held.size]
    assert apart(found, [true for true in hand.values if true.size], floor=0.1) <= 8
