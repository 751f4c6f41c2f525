# SPDX-License-Identifier: Apache-2.0
"""Averages and micro-batches on two replicas: numpy by hand, and the bits that one device has."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="tensorflow is not installed: pyupdate[tensorflow]")

import keras
from replicated import first, held, made, on_each, repeated
from training import DATA, AdamByHand, Known, apart, give, losses, network, weights

import pyupdate
from pyupdate.tensorflow import update as keras_update

BETAS = 0.875, 0.9375  # exact in fp32
VALUES = [np.float32([1.0, -2.0]), np.float32([0.5])]
MICRO = 2


def drawn_grads(seed: int = 3) -> Iterator[list[Any]]:
    """Gradients of both replicas, in eighths, so that their mean is exact."""
    drawn = np.random.default_rng(seed)
    while True:
        yield [np.float32(drawn.integers(-16, 17, size=(2, *v.shape)) / 8.0) for v in VALUES]


def adam(scales: bool) -> Any:
    """Adam with a rate that a schedule changes at the third step, its loss scaled or not."""
    rate = keras.optimizers.schedules.PiecewiseConstantDecay([1], [0.0625, 0.03125])
    inner = keras.optimizers.Adam(rate, *BETAS)
    return keras.optimizers.LossScaleOptimizer(inner, initial_scale=256.0) if scales else inner


def rate_of_step(number: int) -> float:
    return 0.0625 if number <= 1 else 0.03125


def same(one: Any, other: Any) -> bool:
    return np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.each_value
@pytest.mark.parametrize("bad_micro", [0, 1])
@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("graph", [False, True])
def test_averages_of_steps_on_means_of_micro_batches(
    strategy: Any, bad_micro: int, scales: bool, graph: bool
) -> None:
    options = {"ema_decay": 0.75, "accumulation_steps": MICRO, "skip_nonfinite": True}
    model = made(strategy, VALUES, lambda: adam(scales), max_norm=1.0, **options)
    one = pyupdate.build(Known(VALUES), adam(scales), max_norm=1.0, **options)
    hand = AdamByHand(VALUES, 0.0, *BETAS)
    averages = [np.float64(value) for value in VALUES]
    step = repeated(strategy, model, graph)
    grads_of = drawn_grads()
    for window in range(5):
        parts = []
        for micro in range(MICRO):
            grads = next(grads_of)
            if (window, micro) == (1, bad_micro):
                grads[0][1, 0] = math.inf  # on the second replica only
            before = held(strategy, model)
            step(grads)
            give(one, *(grad.mean(axis=0) for grad in grads))
            parts.append([np.float64(grad).mean(axis=0) for grad in grads])
            if window > 0 and micro + 1 < MICRO:  # told of the step before
                assert pyupdate.last_update(model).skipped is (window == 2)
            if micro + 1 < MICRO or window == 1:
                for was, now in zip(before, held(strategy, model), strict=True):
                    assert same(was, now)
        found = pyupdate.last_update(model)
        assert found.skipped is (window == 1)
        if window != 1:
            means = [np.mean([part[i] for part in parts], axis=0) for i in range(len(VALUES))]
            norm = math.sqrt(sum(float(np.sum(mean**2)) for mean in means))
            assert abs(found.norm / norm - 1.0) < 1e-6
            hand.lr = rate_of_step(hand.count)
            hand.step([mean * min(1.0, 1.0 / (norm + 1e-6)) for mean in means])
            averages = [0.75 * a + 0.25 * v for a, v in zip(averages, hand.values, strict=True)]
    for replicas, true, alone in zip(held(strategy, model), hand.values, weights(one), strict=True):
        assert apart(replicas[:1], [true]) <= 8
        assert [same(replica, alone) for replica in replicas] == [True, True]
    kept = model.update_state.averages
    for average, true, alone in zip(kept, averages, one.update_state.averages, strict=True):
        assert average.dtype == tf.float32
        replicas = on_each(strategy, average)
        assert apart(replicas[:1], [true]) <= 8
        assert [same(replica, alone.numpy()) for replica in replicas] == [True, True]
    optimizer = model.current_optimizer
    inner = optimizer.inner_optimizer if scales else optimizer
    assert first(strategy, inner.iterations) == 4  # schedules see steps, not micro-batches
    if scales:
        scale = on_each(strategy, optimizer.dynamic_scale.value)
        assert [float(value) for value in scale] == [128.0, 128.0]
    assert keras_update.path_of(model) == "XLA"


@pytest.mark.parametrize("graph", [False, True])
def test_micro_batches_alone_without_any_norm(strategy: Any, graph: bool) -> None:
    model = made(strategy, VALUES, lambda: keras.optimizers.SGD(0.5), accumulation_steps=3)
    step = repeated(strategy, model, graph)
    grads_of = drawn_grads()
    true = [np.float64(value) for value in VALUES]
    for _ in range(2):
        parts = [next(grads_of) for _ in range(3)]
        for grads in parts:
            step(grads)
        for i in range(len(true)):
            true[i] = true[i] - 0.5 * np.mean(
                [np.float64(p[i]).mean(axis=0) for p in parts], axis=0
            )
    for replicas, exact in zip(held(strategy, model), true, strict=True):
        assert same(*replicas)
        assert apart(replicas[:1], [exact]) <= 4
    assert all(not total.numpy().any() for total in model.update_state.sums)


@pytest.mark.parametrize("graph", [False, True])
def test_an_average_with_an_inf_on_the_second_replica(strategy: Any, graph: bool) -> None:
    start = np.float32([1.0, -2.0])
    model = made(
        strategy, [start], lambda: keras.optimizers.SGD(0.5), ema_decay=0.75, skip_nonfinite=True
    )
    step = repeated(strategy, model, graph)
    param, average = np.float64(start), np.float64(start)
    for second in ([1.0, 2.0], [math.inf, 0.0], [-3.0, 0.5]):
        step([[[1.0, 1.0], second]])
        if np.isfinite(second).all():
            param = param - 0.5 * (1.0 + np.float64(second)) / 2.0
            average = 0.75 * average + 0.25 * param
    before = held(strategy, model)[0]
    assert [value.tolist() for value in before] == [param.tolist()] * 2
    with pyupdate.averaged_weights(model):
        averaged = held(strategy, model)[0]
        assert [value.tolist() for value in averaged] == [average.tolist()] * 2
        with pytest.raises(RuntimeError, match="leave averaged_weights first"):
            repeated(strategy, model, False)([[[1.0, 1.0], [1.0, 1.0]]])
    assert same(before, held(strategy, model)[0])


def test_averages_are_not_put_in_on_one_replica_of_several(strategy: Any) -> None:
    model = made(strategy, [VALUES[0]], lambda: keras.optimizers.SGD(0.5), ema_decay=0.75)
    repeated(strategy, model, False)([[[1.0, 1.0], [1.0, 1.0]]])

    def each() -> None:
        with pyupdate.averaged_weights(model):
            pass

    with pytest.raises(RuntimeError, match=r"enter it outside of strategy\.run"):
        strategy.run(each)


@pytest.mark.parametrize("graph", [False, True])
def test_an_average_of_bfloat16_variables_is_kept_in_float32(strategy: Any, graph: bool) -> None:
    with strategy.scope():
        model = pyupdate.build(
            Known([np.float32([1.0])], "bfloat16"), keras.optimizers.SGD(0.5), ema_decay=0.75
        )
    step = repeated(strategy, model, graph)
    param, average = 1.0, 1.0
    for grad in (0.25, 0.5, 0.125, -0.25, 0.5):  # every weight is a bfloat16, the averages are not
        step([[[grad], [grad]]])
        param -= 0.5 * grad
        average = 0.75 * average + 0.25 * param
    (kept,) = model.update_state.averages
    assert kept.dtype == tf.float32
    assert [value.tolist() for value in on_each(strategy, kept)] == [[average]] * 2
    assert float(tf.cast(average, tf.bfloat16)) != average


@pytest.mark.parametrize("graph", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_network_on_two_halves_of_a_batch_and_on_the_whole(strategy: Any, graph: bool) -> None:
    options = {"learning_rate": 0.125, "momentum": 0.5, "ema_decay": 0.5}
    options |= {"accumulation_steps": MICRO}
    with strategy.scope():
        model = pyupdate.build(network(), "sgd", **options)
    one = pyupdate.build(network(), "sgd", **options)
    batches = [DATA * (1.0 + 0.25 * turn) for turn in range(8)]

    def each(batch: Any) -> None:
        half = tf.gather(tf.reshape(batch, (2, 4, 4)), replica_number())
        with tf.GradientTape() as tape:
            loss = losses(model, half)
            pyupdate.update_model(model, loss, tape=tape)

    def step(batch: Any) -> None:
        strategy.run(each, args=(batch,))

    called = tf.function(step) if graph else step
    for batch in batches:
        called(tf.constant(batch))
        with tf.GradientTape() as tape:
            loss = losses(one, batch)
            pyupdate.update_model(one, loss, tape=tape)
    assert not np.allclose(weights(one)[0], weights(network())[0], atol=1e-3)  # it has moved
    for ours, alone in zip(model.weights, weights(one), strict=True):
        replicas = on_each(strategy, ours.value)
        assert same(*replicas)
        assert apart(replicas[:1], [alone], floor=0.1) <= 16
    kept, alone = model.update_state.averages, one.update_state.averages
    assert apart([a.numpy() for a in kept], [a.numpy() for a in alone], floor=0.1) <= 16


def replica_number() -> Any:
    return tf.distribute.get_replica_context().replica_id_in_sync_group


@pytest.mark.parametrize("graph", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_checkpoint_in_the_middle_of_micro_batches(
    strategy: Any, graph: bool, tmp_path: Any
) -> None:
    options = {"ema_decay": 0.5, "accumulation_steps": MICRO, "max_norm": 1.0}
    optimizer = lambda: keras.optimizers.Adam(0.125, *BETAS)  # noqa: E731
    model = made(strategy, VALUES, optimizer, **options)
    step = repeated(strategy, model, graph)
    grads_of = drawn_grads()
    several = [next(grads_of) for _ in range(6)]
    for grads in several[:3]:
        step(grads)
    held_by = model.update_state
    for variable in (*held_by.sums, *held_by.averages, *held_by.found, held_by.position):
        parts = strategy.experimental_local_results(variable)
        assert [part.device[-5:] for part in parts] == ["CPU:0", "CPU:1"]
    saved = tf.train.Checkpoint(model=model, optimizer=model.current_optimizer).save(
        tmp_path / "at"
    )
    other = made(strategy, VALUES, optimizer, **options)
    alone = pyupdate.build(Known(VALUES), optimizer(), **options)
    again = repeated(strategy, other, graph)
    again(several[5])  # so that there is something to be restored over
    give(alone, *(grad.mean(axis=0) for grad in several[5]))
    for restored in (other, alone):
        tf.train.Checkpoint(model=restored, optimizer=restored.current_optimizer).restore(
            saved
        ).assert_consumed()
    for grads in several[3:]:
        step(grads)
        again(grads)
        give(alone, *(grad.mean(axis=0) for grad in grads))
    for ours, theirs, single in zip(
        held(strategy, model), held(strategy, other), weights(alone), strict=True
    ):
        assert same(ours, theirs)
        assert same(ours, [single] * 2)
    # And the other way round: from one device, in the middle again, to both replicas.
    more = [next(grads_of) for _ in range(3)]
    give(alone, *(grad.mean(axis=0) for grad in more[0]))
    step(more[0])
    saved = tf.train.Checkpoint(model=alone, optimizer=alone.current_optimizer).save(
        tmp_path / "one"
    )
    again(more[2])
    tf.train.Checkpoint(model=other, optimizer=other.current_optimizer).restore(
        saved
    ).assert_consumed()
    for stepped in (step, again):
        stepped(more[1])
    give(alone, *(grad.mean(axis=0) for grad in more[1]))
    for ours, theirs in zip(held(strategy, model), held(strategy, other), strict=True):
        assert same(ours, theirs)
    kept = [m.update_state.averages for m in (model, other, alone)]
    for ours, theirs, single in zip(*kept, strict=True):
        assert same(on_each(strategy, ours), on_each(strategy, theirs))
        assert same(ours.numpy(), single.numpy())


@pytest.fixture
def eagerly(request: pytest.FixtureRequest) -> Iterator[None]:
    """Functions run eagerly, as in debugging, where the test asks for it."""
    tf.config.run_functions_eagerly(request.param)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(False)


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize(
    ("kind", "graph", "eagerly"),
    [("eager", False, True), ("central", False, False), ("central", True, False)],
    indirect=["eagerly"],
)
@pytest.mark.usefixtures("eagerly")
def test_the_options_without_xla(strategy: Any, kind: str, graph: bool, scales: bool) -> None:
    if kind == "central":
        strategy = tf.distribute.experimental.CentralStorageStrategy(
            compute_devices=["CPU:0", "CPU:1"], parameter_device="CPU:0"
        )

    def optimizer() -> Any:
        inner = keras.optimizers.SGD(0.5)
        return keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0) if scales else inner

    asked = {} if scales else {"skip_nonfinite": True}
    model = made(
        strategy, [VALUES[0]], optimizer, ema_decay=0.75, accumulation_steps=MICRO, **asked
    )
    step = repeated(strategy, model, graph)
    param, average = np.float64(VALUES[0]), np.float64(VALUES[0])
    grads_of = drawn_grads()
    for window in range(3):
        parts = []
        for micro in range(MICRO):
            grads = next(grads_of)[:1]
            if (window, micro) == (1, 0):
                grads[0][1, 1] = math.nan
            step(grads)
            if window > 0 and micro + 1 < MICRO:  # told of the step before
                assert pyupdate.last_update(model).skipped is (window == 2)
            parts.append(np.float64(grads[0]).mean(axis=0))
        if window != 1:
            param = param - 0.5 * np.mean(parts, axis=0)
            average = 0.75 * average + 0.25 * param
        assert pyupdate.last_update(model).skipped is (window == 1)
    for replica in held(strategy, model)[0]:
        assert replica.tolist() == param.tolist()  # sixteenths: exact
    for replica in on_each(strategy, model.update_state.averages[0]):
        assert replica.tolist() == average.tolist()
    if scales:
        assert first(strategy, model.current_optimizer.dynamic_scale) == 4.0
    assert keras_update.path_of(model).startswith("TensorFlow without XLA: ")
