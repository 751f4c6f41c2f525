# SPDX-License-Identifier: Apache-2.0
"""Steps by TensorFlow's own kernels: which ones are, and that they are right."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="tensorflow is not installed: pyupdate[tensorflow]")

import keras
from replicated import held, made, repeated
from training import EPS, AdamByHand, Known, apart, give, ways, weights

import pyupdate
from pyupdate.tensorflow import native
from pyupdate.tensorflow.update import path_of


@pytest.fixture(autouse=True)
def without_the_compiled_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would step most of what is stepped here."""
    monkeypatch.setenv("PYUPDATE_BACKEND", "reference")


KERNELS = "TensorFlow's fused kernels"
LARGE = [2 * native.LARGE - 3, 3]  # as large on average as is asked for
Adam = keras.optimizers.Adam
SGD = keras.optimizers.SGD


class OfOnesOwn(Adam):
    """Keras's, but it could do anything."""


def drawn(seed: int, sizes: list[int]) -> list[Any]:
    given = np.random.default_rng(seed)
    return [given.normal(size=size).astype(np.float32) for size in sizes]


def scaled(inner: Any) -> Any:
    return keras.optimizers.LossScaleOptimizer(inner, initial_scale=1024.0, dynamic_growth_steps=2)


# Lower in these tests, for each variable is traced; test_passes_choice.py has the true number.
MANY = [3] * 9


@pytest.fixture(autouse=True)
def nine_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "MANY", len(MANY))


PATHS: dict[str, tuple[Callable[[], Any], list[int], dict[str, Any], str]] = {
    "large": (Adam, LARGE, {}, KERNELS),
    "of micro-batches": (Adam, LARGE, {"accumulation_steps": 2}, KERNELS),
    "a number too few": (Adam, [LARGE[0], 2], {}, "XLA"),
    "large, clipped by Keras": (lambda: Adam(global_clipnorm=1.0), LARGE, {}, "XLA"),
    "large, scaled": (lambda: scaled(Adam()), LARGE, {}, "XLA"),
    "large, scaled by a number": (lambda: Adam(loss_scale_factor=8.0), LARGE, {}, "XLA"),
    "large, clipped": (Adam, LARGE, {"max_norm": 1.0}, "XLA"),
    "large, in bounds": (Adam, LARGE, {"clip_value": 1.0}, "XLA"),
    "large, averaged": (Adam, LARGE, {"ema_decay": 0.5}, "XLA"),
    "large, SGD": (SGD, LARGE, {}, "XLA"),
    "large, a subclass": (OfOnesOwn, LARGE, {}, "XLA"),
    "large, AdamW": (keras.optimizers.AdamW, LARGE, {}, "XLA"),
    "large, decayed": (lambda: Adam(weight_decay=0.1), LARGE, {}, "XLA"),
    "large, amsgrad": (lambda: Adam(amsgrad=True), LARGE, {}, "XLA"),
    "large, Keras's average": (lambda: Adam(use_ema=True), LARGE, {}, "XLA"),
    "large, Keras's bounds": (lambda: Adam(clipvalue=1.0), LARGE, {}, "XLA"),
    "many": (Adam, MANY, {}, KERNELS),
    "many, scaled": (lambda: scaled(Adam(global_clipnorm=1.0)), MANY, {}, KERNELS),
    "many, SGD": (SGD, MANY, {}, KERNELS),
    "one too few": (Adam, MANY[1:], {}, "XLA"),
}


@pytest.mark.parametrize("kind", PATHS)
def test_what_goes_by_kernels(kind: str) -> None:
    make, sizes, options, path = PATHS[kind]
    model = pyupdate.build(Known(drawn(1, sizes)), make(), **options)
    for seed in range(options.get("accumulation_steps", 1)):
        give(model, *drawn(seed, sizes))
    assert path_of(model) == path


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_precisions_go_by_xla(dtype: str) -> None:
    model = pyupdate.build(Known(drawn(1, LARGE), dtype), Adam())
    give(model, *drawn(2, LARGE))
    assert path_of(model) == "XLA"


def test_a_constraint_goes_by_xla() -> None:
    model = Known(drawn(1, LARGE))
    model.held[0].constraint = keras.constraints.NonNeg()
    give(pyupdate.build(model, Adam()), *drawn(2, LARGE))
    assert path_of(model) == "XLA"
    assert (weights(model)[0] >= 0.0).all()


@pytest.mark.parametrize("way", ["eager", "function", "jit"])
def test_large_ones_under_adam_by_hand_and_by_keras(way: str) -> None:
    """With Keras's own betas, of which one minus is in float32 here: 1.3e-5 and 2.4e-7 of it."""
    values = drawn(1, LARGE)
    model, keras_model = Known(values), Known(values)
    model.current_optimizer = optimizer = Adam(0.01)
    theirs = Adam(0.01)
    hand = AdamByHand(values, 0.01)
    step = ways(lambda a, b: give(model, a, b))[way]
    for seed in range(2, 7):
        grads = drawn(seed, LARGE)
        step(*map(tf.constant, grads))
        hand.step(grads)
        theirs.apply([tf.constant(g) for g in grads], keras_model.trainable_variables)
    assert int(optimizer.iterations) == 5
    assert apart(weights(model), hand.values, floor=0.1) <= 8
    # Keras's bias correction is by the beta in float32, its moments not: its steps are 6.5e-6 of
    # themselves short, of about 0.01 each.
    short = 5 * 0.01 * 6.5e-6 / (0.1 * EPS)
    assert apart(weights(model), weights(keras_model), floor=0.1) <= 8 + short
    first = [v.numpy() for v in optimizer._momentums]
    second = [v.numpy() for v in optimizer._velocities]
    for found, true, of_keras, bound in (
        (first, hand.first, theirs._momentums, 2.4e-7),
        (second, hand.second, theirs._velocities, 1.3e-5),
    ):
        assert apart(found, true, floor=0.1) * EPS <= bound + 4 * EPS
        assert apart(found, [v.numpy() for v in of_keras], floor=0.1) * EPS <= bound + 8 * EPS


def test_a_schedule_and_another_beta_reach_the_kernels() -> None:
    values = drawn(1, LARGE)
    model = Known(values)
    rates = keras.optimizers.schedules.PiecewiseConstantDecay([1], [0.5, 0.25])
    model.current_optimizer = optimizer = Adam(rates, 0.5, 0.75)
    hand = AdamByHand(values, 0.5, 0.5, 0.75)
    for turn in range(4):
        if turn == 3:
            optimizer.beta_1 = hand.beta1 = 0.875
        hand.lr = 0.5 if turn <= 1 else 0.25  # the boundary itself has the rate before it
        grads = drawn(turn, LARGE)
        give(model, *grads)
        hand.step(grads)
        # Rounded where a weight was about 1, whatever is left of it.
        assert apart(weights(model), hand.values, floor=1.0) <= 8
    assert path_of(model) == KERNELS


def test_micro_batches_and_deferred_steps_by_kernels() -> None:
    values = drawn(1, LARGE)
    model = pyupdate.build(Known(values), Adam(0.01, 0.875, 0.9375), accumulation_steps=2)
    hand = AdamByHand(values, 0.01, 0.875, 0.9375)
    for turn in range(2):
        parts = [drawn(10 * turn + part, LARGE) for part in range(2)]
        deferred: dict[str, Any] = {}
        give(model, *parts[0], defer=True, deferred=deferred)
        before = weights(model)
        (later,) = deferred[model.model_name]
        later()
        assert all((a == b).all() for a, b in zip(before, weights(model), strict=True))
        give(model, *parts[1])
        hand.step([(np.float64(a) + b) / 2 for a, b in zip(*parts, strict=True)])
        assert apart(weights(model), hand.values, floor=0.1) <= 8
    assert path_of(model) == KERNELS


def test_rows_that_are_used_twice_by_kernels() -> None:
    rows = native.LARGE // 4
    table = keras.layers.Embedding(rows, 4)
    model = pyupdate.build(keras.Sequential([table]), Adam(0.01, 0.875, 0.9375))
    numbers = tf.constant([[5, 5, 7]])
    model(numbers)
    value = table.embeddings.numpy()
    with tf.GradientTape() as tape:
        pyupdate.update_model(model, model(numbers), tape=tape)
    grad = np.zeros_like(value)
    grad[5], grad[7] = 2.0 / 12.0, 1.0 / 12.0
    hand = AdamByHand([value], 0.01, 0.875, 0.9375)
    hand.step([grad])
    assert path_of(model) == KERNELS
    assert apart(weights(model), hand.values) <= 8


@pytest.mark.parametrize("way", ["eager", pytest.param("function", marks=pytest.mark.slow), "jit"])
def test_many_scaled_clipped_and_skipped_by_hand(way: str) -> None:
    values = drawn(1, MANY)
    model = Known(values)
    inner = Adam(0.01, global_clipnorm=1.0)
    model.current_optimizer = optimizer = scaled(inner)
    hand = AdamByHand(values, 0.01)

    def at_once(stacked: Any) -> None:
        give(model, *tf.unstack(stacked))

    step = ways(at_once)[way]
    scale, count = 1024.0, 0
    for turn, bad in enumerate((None, None, math.inf, None, math.nan, None)):
        grads = drawn(turn + 2, MANY)
        if bad is not None:
            grads[5][1] = bad
        state = [v.numpy() for v in inner.variables]
        before = weights(model)
        step(tf.constant(np.stack(grads)))
        found = pyupdate.last_update(model)
        assert found.skipped is (bad is not None)
        if bad is None:
            norm = math.sqrt(sum(float(np.sum(np.float64(g) ** 2)) for g in grads))
            assert abs(found.norm / norm - 1.0) < 1e-6
            assert abs(found.multiplier * norm * scale - 1.0) < 1e-6
            hand.step([np.float64(g) / norm for g in grads])
            assert apart(weights(model), hand.values, floor=0.1) <= 8
            count += 1
            scale, count = (scale * 2.0, 0) if count == 2 else (scale, count)
        else:
            now = [*weights(model), *(v.numpy() for v in inner.variables)]
            assert all((a == b).all() for a, b in zip([*before, *state], now, strict=True))
            scale, count = scale / 2.0, 0
        assert float(optimizer.dynamic_scale) == scale
        assert int(optimizer.step_counter) == count
    assert int(inner.iterations) == hand.count


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.875])
def test_many_under_sgd_by_hand(momentum: float, nesterov: bool) -> None:
    values = drawn(1, MANY)
    model = Known(values)
    model.current_optimizer = SGD(0.125, momentum=momentum, nesterov=nesterov)
    true = [np.float64(value) for value in values]
    buffers = [np.zeros_like(value) for value in true]
    for turn in range(4):
        grads = drawn(turn + 2, MANY)
        give(model, *grads)
        for i, grad in enumerate(map(np.float64, grads)):
            buffers[i] = momentum * buffers[i] - 0.125 * grad
            ahead = momentum * buffers[i] - 0.125 * grad if nesterov else buffers[i]
            true[i] = true[i] + ahead
        assert apart(weights(model), true, floor=1.0) <= 8  # rounded where a weight was about 1
    assert path_of(model) == KERNELS


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("sizes", [LARGE, MANY], ids=["large", "many"])
def test_replicas_by_kernels(strategy: Any, sizes: list[int], graph: bool) -> None:
    values = drawn(1, sizes)
    model = made(strategy, values, lambda: Adam(0.01, 0.875, 0.9375))
    hand = AdamByHand(values, 0.01, 0.875, 0.9375)
    step = repeated(strategy, model, graph)
    for turn in range(3):
        each = drawn(turn, sizes), drawn(turn + 50, sizes)
        grads = [np.stack(pair) for pair in zip(*each, strict=True)]
        step(grads)
        hand.step([np.float64(grad).mean(axis=0) for grad in grads])
    for replicas, true in zip(held(strategy, model), hand.values, strict=True):
        assert (replicas[0] == replicas[1]).all()
        assert apart([replicas[0]], [true], floor=0.1) <= 8
    assert path_of(model) == KERNELS
