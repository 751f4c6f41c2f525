# SPDX-License-Identifier: Apache-2.0
"""Data parallelism on two logical CPU devices: sums first, then check and clip; one decision."""

from __future__ import annotations

import gc
import math
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="tensorflow is not installed: pyupdate[tensorflow]")

import keras
from replicated import first, held, made, repeated, run
from training import AdamByHand, Known, Spelled, apart

import pyupdate
from pyupdate.tensorflow import update as keras_update

BETAS = 0.875, 0.9375  # exact in fp32


def compiled_parts(optimizer: Any) -> list[Any]:
    """What steps each replica, as a node of the graph that has it compiled."""
    (plan,) = keras_update._plans[optimizer].values()
    moved = [part._traced.get("move") or part._traced["apply"] for part in plan.plans]
    return [traced._concrete.function_def.attr["_XlaMustCompile"].b for traced in moved]


@pytest.mark.each_value
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_every_replica_is_compiled_and_traced_once(
    strategy: Any, clip: float | None, graph: bool, caplog: pytest.LogCaptureFixture
) -> None:
    traces: Counter[str] = Counter()

    class Counted(keras.optimizers.SGD):
        """Counts how often it is traced."""

        def update_step(self, grad: Any, variable: Any, rate: Any) -> None:
            traces[variable.device[-5:]] += 1
            super().update_step(grad, variable, rate)

    values = [np.float32([1.0, 2.0]), np.float32([3.0])]
    model = made(strategy, values, lambda: Counted(0.5, global_clipnorm=clip))
    step = repeated(strategy, model, graph)
    true = [np.float64(value) for value in values]
    for turn in range(50):
        grads = [np.full((2, 2), turn / 16.0), np.array([[2.0], [-4.0]])]
        step(grads)
        means = [grad.mean(axis=0) for grad in grads]
        norm = np.sqrt(sum(float(np.sum(mean**2)) for mean in means))
        factor = 1.0 if clip is None else min(1.0, clip / norm)
        true = [value - 0.5 * factor * mean for value, mean in zip(true, means, strict=True)]
    for replicas, exact in zip(held(strategy, model), true, strict=True):
        assert replicas[0].tobytes() == replicas[1].tobytes()
        assert apart(replicas[:1], [exact]) <= 50
    assert traces == {"CPU:0": 2, "CPU:1": 2}  # two variables
    assert compiled_parts(model.current_optimizer) == [True, True]
    assert keras_update.path_of(model) == "XLA"
    assert not [record for record in caplog.records if record.name == "pyupdate"]


@pytest.mark.parametrize("graph", [pytest.param(False, marks=pytest.mark.slow), True])
def test_another_number_of_the_optimizer_is_another_trace(strategy: Any, graph: bool) -> None:
    model = made(strategy, [np.float32([1.0])], lambda: keras.optimizers.SGD(0.5))
    run(strategy, model, [[[1.0], [1.0]]], graph)
    model.current_optimizer.clipvalue = 0.25
    run(strategy, model, [[[1.0], [1.0]]], graph)
    model.current_optimizer.learning_rate = 2.0  # a variable: no other trace
    run(strategy, model, [[[1.0], [1.0]]], graph)
    assert [value.tolist() for value in held(strategy, model)[0]] == [[-0.125]] * 2


@pytest.mark.parametrize("graph", [False, True])
def test_the_optimizer_s_own_state_is_every_replica_s(strategy: Any, graph: bool) -> None:
    model = made(
        strategy,
        [np.float32([4.0])],
        lambda: keras.optimizers.SGD(
            keras.optimizers.schedules.PiecewiseConstantDecay([1], [0.5, 0.25]),
            momentum=0.5,
            use_ema=True,
            ema_momentum=0.5,
        ),
    )
    run(strategy, model, [[[1.0], [3.0]]], graph)  # velocity -1, weight 3, average 3
    run(strategy, model, [[[2.0], [2.0]]], graph)  # velocity -1.5, weight 1.5, average 2.25
    run(strategy, model, [[[0.0], [0.0]]], graph)  # velocity -0.75, weight 0.75, average 1.5
    optimizer = model.current_optimizer
    found = {
        variable.name.rpartition("_")[2]: [
            np.ravel(part.numpy()).tolist()
            for part in strategy.experimental_local_results(variable.value)
        ]
        for variable in optimizer.variables
    }
    assert found == {"iteration": [[3]] * 2, "momentum": [[-0.75]] * 2, "average": [[1.5]] * 2}
    assert [value.tolist() for value in held(strategy, model)[0]] == [[0.75]] * 2


@pytest.mark.parametrize("graph", [pytest.param(False, marks=pytest.mark.slow), True])
def test_bfloat16_variables_move(strategy: Any, graph: bool) -> None:
    with strategy.scope():
        model = pyupdate.build(
            Known([np.float32([1.0])], "bfloat16"), keras.optimizers.Adam(0.001, *BETAS)
        )
    hand = AdamByHand([np.float32([1.0])], 0.001, *BETAS)
    for _ in range(8):
        run(strategy, model, [[[1.0], [3.0]]], graph)
        hand.step([[2.0]])
    rounded = tf.cast(hand.values[0], tf.bfloat16).numpy()
    assert rounded != 1.0
    assert [value.tolist() for value in held(strategy, model)[0]] == [rounded.tolist()] * 2


@pytest.mark.parametrize("graph", [False, True])
def test_what_a_step_found_is_told(strategy: Any, graph: bool) -> None:
    model = made(strategy, [np.float32([1.0, 2.0])], lambda: keras.optimizers.SGD(1.0), max_norm=1)
    run(strategy, model, [[[6.0, 0.0], [0.0, 8.0]]], graph)  # the mean's norm is 5
    found = pyupdate.last_update(model)
    assert found is not None
    assert abs(float(found.norm) - 5.0) <= 1e-6
    assert abs(float(found.multiplier) - 0.2) <= 1e-6
    assert not found.skipped


def test_an_optimizer_with_plans_of_replicas_is_freed(strategy: Any) -> None:
    model = made(strategy, [np.float32([1.0])], lambda: keras.optimizers.SGD(0.5))
    run(strategy, model, [[[1.0], [1.0]]], graph=False)
    gone = weakref.ref(model.current_optimizer), weakref.ref(model)
    del model
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


@pytest.fixture
def eagerly() -> Iterator[None]:
    """Functions run eagerly, as in debugging."""
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(False)


def check_without_xla(strategy: Any, model: Any, graph: bool, caplog: Any, why: str) -> None:
    """Steps by hand, one of them left out for an inf; one line of the log says why."""
    for second in ([3.0, 4.0], [math.inf, 0.0], [5.0, -4.0]):
        run(strategy, model, [[[1.0, 2.0], second]], graph)
    true = np.float64([1.0, 2.0]) - 0.5 * (np.array([2.0, 3.0]) + np.array([3.0, -1.0]))
    for value in held(strategy, model)[0]:
        assert apart([value], [true]) <= 8
    (line,) = [text for text in caplog.messages if "is stepped without XLA" in text]
    assert why in line
    assert keras_update.path_of(model).startswith("TensorFlow without XLA: ")


@pytest.mark.usefixtures("eagerly")
def test_functions_that_run_eagerly(strategy: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = made(
        strategy,
        [np.float32([1.0, 2.0])],
        lambda: keras.optimizers.SGD(0.5),
        skip_nonfinite=True,
    )
    check_without_xla(strategy, model, False, caplog, "run_functions_eagerly is on")


@pytest.mark.parametrize("graph", [False, True])
def test_a_strategy_that_mirrors_nothing(graph: bool, caplog: pytest.LogCaptureFixture) -> None:
    central = tf.distribute.experimental.CentralStorageStrategy(
        compute_devices=["CPU:0", "CPU:1"], parameter_device="CPU:0"
    )
    model = made(
        central, [np.float32([1.0, 2.0])], lambda: keras.optimizers.SGD(0.5), skip_nonfinite=True
    )
    check_without_xla(central, model, graph, caplog, "is not mirrored on every replica")


@pytest.mark.each_value
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("kind", ["print", "string", "rate"])
def test_what_xla_does_not_run(
    strategy: Any, kind: str, graph: bool, caplog: pytest.LogCaptureFixture
) -> None:
    class Printed(keras.optimizers.SGD):
        """Prints, which XLA does not."""

        def update_step(self, grad: Any, variable: Any, rate: Any) -> None:
            super().update_step(grad, variable, rate)
            tf.print("stepped")

    with strategy.scope():
        rate = tf.Variable(0.5)
    model = made(
        strategy,
        [np.float32([1.0, 2.0])],
        lambda: {
            "print": lambda: Printed(0.5),
            "string": lambda: Spelled(0.5),
            "rate": lambda: keras.optimizers.SGD(lambda: rate),
        }[kind](),
        skip_nonfinite=True,
    )
    why = {
        "print": "PrintV2",
        "string": "ReadVariableOp of this type",
        "rate": "that none of its attributes holds",
    }
    check_without_xla(strategy, model, graph, caplog, why[kind])
    if kind == "string":
        texts = strategy.experimental_local_results(model.current_optimizer.written)
        assert [text.numpy() for text in texts] == [b".."] * 2


@pytest.mark.parametrize("graph", [False, True])
def test_a_step_is_on_the_mean_over_the_replicas(strategy: Any, graph: bool) -> None:
    values = [np.float32([1.0, 2.0]), np.float32([3.0])]
    model = made(strategy, values, lambda: keras.optimizers.Adam(0.01, *BETAS))
    hand = AdamByHand(values, 0.01, *BETAS)
    for _ in range(2):
        grads = [[[1.0, 2.0], [3.0, -4.0]], [[0.5], [0.25]]]
        run(strategy, model, grads, graph)
        hand.step([np.mean(np.float64(g), axis=0) for g in grads])
    for replicas, true in zip(held(strategy, model), hand.values, strict=True):
        assert len(replicas) == 2
        assert apart(replicas, [true, true]) <= 8
    assert first(strategy, model.current_optimizer.iterations) == 2


@pytest.mark.each_value
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("bad", [0, 1])
def test_an_inf_on_one_replica_only(strategy: Any, bad: int, graph: bool) -> None:
    model = made(
        strategy,
        [np.float32([1.0, 2.0])],
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.5), initial_scale=256.0),
    )
    grads = np.ones((2, 2))
    grads[bad, 1] = math.inf
    run(strategy, model, [grads], graph)
    optimizer = model.current_optimizer
    assert [value.tolist() for value in held(strategy, model)[0]] == [[1.0, 2.0]] * 2
    scales = strategy.experimental_local_results(optimizer.dynamic_scale.value)
    assert [float(scale) for scale in scales] == [128.0] * len(scales)
    assert first(strategy, optimizer.inner_optimizer.iterations) == 0
    run(strategy, model, [[[1.0, 2.0], [3.0, 4.0]]], graph)
    assert [value.tolist() for value in held(strategy, model)[0]] == [[0.0, 0.5]] * 2
    assert first(strategy, optimizer.inner_optimizer.iterations) == 1


@pytest.mark.parametrize("option", ["global_clipnorm", "clipnorm", "max_norm"])
def test_clipping_comes_after_the_all_reduce(strategy: Any, option: str) -> None:
    bound = {option: 1.0}
    ours = option == "max_norm"
    optimizer = keras.optimizers.SGD
    model = made(
        strategy,
        [np.float32([1.0, 2.0])],
        lambda: optimizer(1.0) if ours else optimizer(1.0, **bound),
        **(bound if ours else {}),
    )
    # Each replica's own norm is 10 and 8, that of their mean 1: nothing is to be clipped.
    run(strategy, model, [[[10.0, 0.0], [-8.0, 0.0]]], graph=True)
    assert np.max(np.abs(np.array(held(strategy, model)[0]) - [0.0, 2.0])) <= 2e-6
    # The mean's norm is 5, and the step's 1; clipped one by one it would be another.
    run(strategy, model, [[[6.0, 0.0], [0.0, 8.0]]], graph=True)
    true = np.float64([0.0, 2.0]) - np.float64([3.0, 4.0]) / 5.0
    assert np.max(np.abs(np.array(held(strategy, model)[0]) - true)) <= 2e-6


ONE_REPLICA: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (lambda: keras.optimizers.Adam(0.0625, *BETAS), {}),
    "clipped": (lambda: keras.optimizers.Adam(0.0625, *BETAS), {"max_norm": 1.0}),
    "scaled": (
        lambda: keras.optimizers.LossScaleOptimizer(
            keras.optimizers.Adam(0.0625, *BETAS, global_clipnorm=1.0), initial_scale=64.0
        ),
        {},
    ),
    "averaged": (lambda: keras.optimizers.Adam(0.0625, *BETAS), {"ema_decay": 0.5}),
    "micro-batches": (lambda: keras.optimizers.Adam(0.0625, *BETAS), {"accumulation_steps": 2}),
}


@pytest.mark.each_value
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("kind", ONE_REPLICA)
def test_a_mirrored_strategy_of_one_replica(kind: str, graph: bool) -> None:
    """As on a machine with one GPU: TensorFlow mirrors its variables too."""
    optimizer, options = ONE_REPLICA[kind]
    values = [np.float32([1.0, 2.0]), np.float32([3.0])]
    single = tf.distribute.MirroredStrategy(["CPU:0"])
    model = made(single, values, optimizer, **options)
    hand = AdamByHand(values, 0.0625, *BETAS)
    averages = list(hand.values)
    step = repeated(single, model, graph)
    for turn in range(3):
        grads = [np.float64([turn + 1.0, -2.0]), np.float64([turn - 3.0])]
        for _ in range(options.get("accumulation_steps", 1)):
            step([grad[None] for grad in grads])
        norm = math.sqrt(sum(float(np.sum(grad**2)) for grad in grads))
        factor = 1.0 / norm if kind in ("clipped", "scaled") else 1.0
        hand.step([grad * factor for grad in grads])
        averages = [(a + v) / 2 for a, v in zip(averages, hand.values, strict=True)]
        if kind == "scaled":
            assert pyupdate.last_update(model).norm == pytest.approx(norm, rel=1e-6)
    found = [replica[0] for replica in held(single, model)]
    assert apart(found, hand.values) <= 16
    if kind == "averaged":
        with pyupdate.averaged_weights(model):
            assert apart([replica[0] for replica in held(single, model)], averages) <= 16
