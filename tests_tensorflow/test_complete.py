# SPDX-License-Identifier: Apache-2.0
"""The complete step: loss scale, check, clips, skip, average, micro-batches; against numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="tensorflow is not installed: pyupdate[tensorflow]")

import keras
from training import AdamByHand, Known, apart, give, network, update, ways, weights

import pyupdate
from pyupdate.tensorflow import native

BETAS = 0.875, 0.9375  # exact in fp32


def scaled(inner: Any, **given: Any) -> Any:
    return keras.optimizers.LossScaleOptimizer(inner, **given)


@pytest.mark.parametrize("way", ["eager", "function", "jit"])
def test_loss_scaling_with_a_clip_skips_and_scales(way: str) -> None:
    values = [np.float32([1.0, -2.0, 3.0]), np.float32([0.5])]
    model = Known(values)
    inner = keras.optimizers.Adam(0.01, *BETAS, global_clipnorm=1.0)
    model.current_optimizer = optimizer = scaled(
        inner, initial_scale=1024.0, dynamic_growth_steps=2
    )
    hand = AdamByHand(values, 0.01, *BETAS)
    step = ways(lambda a, b: give(model, a, b))[way]
    drawn = np.random.default_rng(1)
    scale, count = 1024.0, 0
    for bad in (None, None, None, math.inf, None, math.nan, math.nan, None, None):
        grads = [drawn.normal(size=v.shape).astype(np.float32) for v in values]
        if bad is not None:
            grads[1][0] = bad
        before = weights(model)
        step(*map(tf.constant, grads))
        found = pyupdate.last_update(model)
        assert found.skipped is (bad is not None)
        if bad is None:
            norm = float(np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in grads)))
            assert abs(found.norm / norm - 1.0) < 1e-6
            hand.step([np.float64(g) * min(1.0, 1.0 / norm) for g in grads])
            assert apart(weights(model), hand.values) <= 8
            count += 1
            scale, count = (scale * 2.0, 0) if count == 2 else (scale, count)
        else:
            assert all((a == b).all() for a, b in zip(before, weights(model), strict=True))
            scale, count = scale / 2.0, 0
        assert float(optimizer.dynamic_scale) == scale
        assert int(optimizer.step_counter) == count
    assert int(inner.iterations) == hand.count
    assert inner.global_clipnorm == 1.0


CLIPS = {
    "global": {"global_clipnorm": 0.5},
    "each": {"clipnorm": 0.5},
    "value": {"clipvalue": 0.25},
}


@pytest.mark.parametrize("kind", CLIPS)
@pytest.mark.parametrize("way", ["eager", "function", "jit"])
def test_the_clips_of_keras_by_hand(way: str, kind: str) -> None:
    values = [np.float32([1.0, -2.0]), np.float32([0.5]), np.float32([4.0])]
    grads = [np.float32([3.0, -4.0]), np.float32([0.125]), np.float32([0.0])]
    model = Known(values)
    model.current_optimizer = keras.optimizers.SGD(1.0, **CLIPS[kind])
    ways(lambda: give(model, *grads))[way]()
    wide = [np.float64(g) for g in grads]
    if kind == "global":
        norm = math.sqrt(25.0 + 0.125**2)
        moves = [g * 0.5 / norm for g in wide]
    elif kind == "each":
        moves = [wide[0] * 0.1, wide[1], wide[2]]
    else:
        moves = [np.clip(g, -0.25, 0.25) for g in wide]
    assert apart(weights(model), [v - m for v, m in zip(values, moves, strict=True)]) <= 2


@pytest.mark.parametrize("way", ["eager", "function", "jit"])
def test_max_norm_and_clip_value_are_torchs(way: str) -> None:
    values = [np.float32([1.0, -2.0]), np.float32([0.5])]
    grads = [np.float32([3.0, -4.0]), np.float32([12.0])]
    model = pyupdate.build(Known(values), "sgd", learning_rate=1.0, max_norm=2.0, clip_value=0.75)
    ways(lambda: give(model, *grads))[way]()
    factor = 2.0 / (13.0 + 1e-6)  # torch.nn.utils.clip_grad_norm_'s
    true = [
        v - np.clip(np.float64(g) * factor, -0.75, 0.75) for v, g in zip(values, grads, strict=True)
    ]
    assert apart(weights(model), true) <= 2
    found = pyupdate.last_update(model)
    assert (found.norm, found.skipped) == (13.0, False)
    assert abs(found.multiplier / factor - 1.0) < 1e-6


def test_an_inf_norm_of_finite_gradients_is_no_reason_to_skip() -> None:
    model = pyupdate.build(Known([[1.0, 2.0]]), "sgd", learning_rate=2.0**-100, skip_nonfinite=True)
    give(model, np.float32([2.0**100, 0.0]))  # its square is not a float32
    assert pyupdate.last_update(model).skipped is False
    assert weights(model)[0].tolist() == [0.0, 2.0]
    give(model, np.float32([math.nan, 1.0]))
    assert pyupdate.last_update(model).skipped is True
    assert weights(model)[0].tolist() == [0.0, 2.0]


@pytest.mark.parametrize("way", ["eager", "function", "jit"])
def test_the_mean_of_micro_batches(way: str) -> None:
    values = [np.float32([1.0, -2.0]), np.float32([0.5])]
    model = pyupdate.build(
        Known(values),
        keras.optimizers.Adam(0.01, *BETAS),
        accumulation_steps=3,
        max_norm=1.0,
        skip_nonfinite=True,
    )
    hand = AdamByHand(values, 0.01, *BETAS)
    step = ways(lambda a, b: give(model, a, b))[way]
    drawn = np.random.default_rng(1)
    for window in range(4):
        parts = []
        for micro in range(3):
            grads = [drawn.normal(size=v.shape).astype(np.float32) for v in values]
            if (window, micro) == (1, 0):
                grads[0][1] = math.inf
            parts.append(grads)
            before = weights(model)
            step(*map(tf.constant, grads))
            if micro < 2:
                assert all((a == b).all() for a, b in zip(before, weights(model), strict=True))
        assert pyupdate.last_update(model).skipped is (window == 1)
        if window == 1:
            assert all((a == b).all() for a, b in zip(before, weights(model), strict=True))
            continue
        means = [np.mean([np.float64(p[i]) for p in parts], axis=0) for i in range(2)]
        norm = math.sqrt(sum(float(np.sum(m**2)) for m in means))
        hand.step([m * min(1.0, 1.0 / (norm + 1e-6)) for m in means])
        assert apart(weights(model), hand.values) <= 8
    assert int(model.current_optimizer.iterations) == 3  # schedules see steps, not micro-batches


@pytest.mark.parametrize("way", ["eager", "function", "jit"])
def test_an_average_of_the_weights(way: str) -> None:
    start = np.float32([1.0, -2.0])
    model = pyupdate.build(
        Known([start]), "sgd", learning_rate=0.5, ema_decay=0.75, skip_nonfinite=True
    )
    param, average = np.float64(start), np.float64(start)
    step = ways(lambda g: give(model, g))[way]
    for grad in ([1.0, 2.0], [math.inf, 0.0], [-3.0, 0.5]):
        step(tf.constant(grad))
        if np.isfinite(grad).all():
            param = param - 0.5 * np.float64(grad)
            average = 0.75 * average + 0.25 * param
    assert weights(model)[0].tolist() == param.tolist()
    before = weights(model)[0]
    with pyupdate.averaged_weights(model):
        assert weights(model)[0].tolist() == average.tolist()
        with pytest.raises(RuntimeError, match="averages"):
            step(tf.constant([1.0, 1.0])) if way == "eager" else give(model, [1.0, 1.0])
    assert weights(model)[0].tobytes() == before.tobytes()


def test_averages_and_micro_batches_are_in_a_checkpoint(tmp_path: Any) -> None:
    def made() -> Any:
        return pyupdate.build(
            Known([[1.0, 2.0]]), "adam", learning_rate=0.1, ema_decay=0.5, accumulation_steps=2
        )

    drawn = np.random.default_rng(0)
    grads = [drawn.normal(size=2).astype(np.float32) for _ in range(6)]
    one = made()
    for grad in grads[:3]:
        give(one, grad)
    saved = tf.train.Checkpoint(model=one, optimizer=one.current_optimizer).save(tmp_path / "at")
    other = made()
    give(other, grads[5])  # so that there is something to be restored over
    tf.train.Checkpoint(model=other, optimizer=other.current_optimizer).restore(
        saved
    ).assert_consumed()
    for model in (one, other):
        for grad in grads[3:]:
            give(model, grad)
    assert weights(one)[0].tobytes() == weights(other)[0].tobytes()
    with pyupdate.averaged_weights(one), pyupdate.averaged_weights(other):
        assert weights(one)[0].tobytes() == weights(other)[0].tobytes()


class Printing(keras.optimizers.SGD):
    """XLA has no operation for what it prints."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        tf.print("", output_stream="file:///dev/null")
        super().update_step(gradient, variable, learning_rate)


class Deciding(keras.optimizers.SGD):
    """Its sort by strings is found by XLA when it compiles, not in the graph before."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        grown = tf.strings.to_number(tf.strings.as_string(gradient))
        super().update_step(grown, variable, learning_rate)


@pytest.mark.parametrize("kind", [Printing, Deciding])
def test_a_complete_step_that_xla_refuses(kind: type, caplog: pytest.LogCaptureFixture) -> None:
    """The refusal comes when a step's gradients are measured already: the step is made once."""
    model = Known([[1.0, 2.0]])
    optimizer = scaled(kind(1.0), initial_scale=8.0, dynamic_growth_steps=2)
    model.current_optimizer = optimizer
    for grad, value, scale in (
        ([0.5, 0.25], [0.5, 1.75], 8.0),
        ([math.inf, 0.25], [0.5, 1.75], 4.0),
        ([0.5, 0.25], [0.0, 1.5], 4.0),
        ([0.5, 0.25], [-0.5, 1.25], 8.0),
    ):
        give(model, grad)
        assert weights(model)[0].tolist() == value
        assert float(optimizer.dynamic_scale) == scale
    assert int(optimizer.inner_optimizer.iterations) == 3
    assert sum("without XLA" in line for line in caplog.messages) == 1


def test_many_small_variables_by_fused_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = np.random.default_rng(7)
    count = 9  # test_passes_choice.py has the true number
    values = [drawn.normal(size=3).astype(np.float32) for _ in range(count)]
    for make in (
        lambda: scaled(keras.optimizers.Adam(0.01, *BETAS, global_clipnorm=1.0)),
        lambda: keras.optimizers.SGD(0.1),
        lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    ):
        found = []
        for many in (count, count + 1):  # by kernels, then by XLA
            monkeypatch.setattr(native, "MANY", many)
            model = Known(values)
            model.current_optimizer = make()
            grads = np.random.default_rng(8)
            for _ in range(4):
                give(model, *(grads.normal(size=3).astype(np.float32) for _ in range(count)))
            state = [v.numpy() for v in model.current_optimizer.variables]
            found.append(weights(model) + state)
        assert apart(*found, floor=0.1) <= 8


def test_what_build_takes_and_refuses() -> None:
    model = network()
    assert pyupdate.build(model, "Adam", learning_rate=0.25, model_name="one") is model
    assert type(model.current_optimizer) is keras.optimizers.Adam
    assert float(model.current_optimizer.learning_rate) == 0.25
    assert model.model_name == "one"
    pyupdate.build(model, keras.optimizers.Lion)
    assert (type(model.current_optimizer), model.model_name) == (keras.optimizers.Lion, "one")
    numpys = {"max_norm": np.float32(0.5), "accumulation_steps": np.int64(2)}
    pyupdate.build(model, "sgd", learning_rate=0.5, **numpys)
    assert model.update_options.asked_for == ("max_norm", "accumulation_steps")
    assert type(model.update_options.max_norm) is float
    made = pyupdate.build(network, lambda: keras.optimizers.SGD(0.5))
    assert made.model_name.startswith("Sequential")
    update(made)
    before = made.current_optimizer
    for optimizer, given, error, words in (
        ("no such", {}, ValueError, "is unknown: give one of 'adadelta'"),
        ("adam", {"seed": 3}, ValueError, "seed is PyTorch's"),
        ("adam", {"max_norm": tf.constant(1.0)}, TypeError, "max_norm must be a number or None"),
        ("adam", {"ema_decay": True}, TypeError, "ema_decay must be a number or None"),
        ("adam", {"in_backward": True}, ValueError, "in_backward is PyTorch's"),
        (3, {}, ValueError, "optimizer is a int"),
        (dict, {}, ValueError, "returned a dict"),
        (keras.optimizers.SGD, {"lr": 3}, TypeError, "unexpected option 'lr'"),
    ):
        with pytest.raises(error, match=words):
            pyupdate.build(made, optimizer, **given)
    assert made.current_optimizer is before


def test_averages_outlive_a_frozen_layer_and_a_loss_that_reaches_less() -> None:
    model = pyupdate.build(
        Known([[1.0], [2.0]]), "sgd", learning_rate=1.0, ema_decay=0.5, accumulation_steps=2
    )

    def reach(*positions: int) -> None:
        with tf.GradientTape() as tape:
            loss = tf.add_n([tf.reduce_sum(model.held[i].value) for i in positions])
        pyupdate.update_model(model, loss, tape=tape)

    reach(0, 1)
    reach(0)  # the mean of its gradients is 1 and 1/2
    assert [w.tolist() for w in weights(model)] == [[0.0], [1.5]]
    model.held[1].trainable = False
    reach(0)
    reach(0)
    assert [w.tolist() for w in weights(model)] == [[-1.0], [1.5]]
    model.held[1].trainable = True
    reach(0, 1)
    reach(0, 1)
    with pyupdate.averaged_weights(model):
        first, second = weights(model)
        assert first.tolist() == [0.125 * 1.0 + 0.125 * 0.0 + 0.25 * -1.0 + 0.5 * -2.0]
        assert second.tolist() == [0.25 * 2.0 + 0.25 * 1.5 + 0.5 * 0.5]


@pytest.mark.parametrize("way", ["eager", "function"])
def test_a_layer_is_frozen_between_micro_batches(way: str) -> None:
    """The step comes after as many of them, and on the layers that are trained then."""
    model = pyupdate.build(
        Known([[1.0], [2.0]]), "sgd", learning_rate=1.0, accumulation_steps=2, max_norm=100.0
    )
    steps = {trained: ways(lambda a, b: give(model, a, b))[way] for trained in (True, False)}
    seen = []
    for trained in (True, False, False, False, False, True, True, True):
        model.held[1].trainable = trained
        steps[trained](tf.constant([1.0]), tf.constant([4.0]))
        seen.append([float(value[0]) for value in weights(model)])
    by_hand = [
        [1.0, 2.0],
        [0.0, 2.0],  # what the second one had of this step is dropped
        [0.0, 2.0],
        [-1.0, 2.0],
        [-1.0, 2.0],
        [-2.0, 0.0],  # it was trained in one micro-batch of two
        [-2.0, 0.0],
        [-3.0, -4.0],
    ]
    assert seen == by_hand


def test_a_layer_that_is_frozen_at_first_has_its_place_in_a_checkpoint(tmp_path: Any) -> None:
    def made() -> Any:
        return pyupdate.build(Known([[1.0], [2.0]]), "sgd", learning_rate=1.0, ema_decay=0.5)

    one, other = made(), made()
    one.held[0].trainable = False
    give(one, [1.0], [1.0])
    one.held[0].trainable = True
    give(one, [1.0], [1.0])
    saved = tf.train.Checkpoint(model=one).save(tmp_path / "at")
    give(other, [8.0], [8.0])
    tf.train.Checkpoint(model=other).restore(saved)
    with pyupdate.averaged_weights(other):
        assert [w.tolist() for w in weights(other)] == [[0.5], [0.75]]
    assert [w.tolist() for w in weights(other)] == [[0.0], [0.0]]
