# SPDX-License-Identifier: Apache-2.0
"""A Keras optimizer's step by pyupdate beside Keras's own: eager, in a tf.function, compiled.

    python benchmarks/keras_steps.py            # every table, two to three minutes
    python benchmarks/keras_steps.py A scaled   # one table

A: 60 variables, 4.94M parameters. B: 300 variables, 48,000 parameters. The gradients are given, so
only steps are timed: pyupdate's is a deferred update that is called again and again. Contestants
take turns in one process; medians; the first call is CPU time, tracing and compiling included.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf

import pyupdate

SIZES = {
    "A": [(512, 480)] * 20 + [(512,)] * 40,
    "B": [(16, 16)] * 150 + [(64,)] * 150,
}
CASES = (("A", "plain"), ("A", "scaled"), ("B", "plain"), ("B", "scaled"))
SECONDS = {"A": 14.0, "B": 24.0}
WARM = 2

Step = Callable[[], Any]


class Weights(keras.Model):
    """Nothing but variables."""

    def __init__(self, sizes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.held = [self.add_weight(shape=size, initializer="random_normal") for size in sizes]
        self.built = True


def optimizer(kind: str) -> Any:
    if kind == "plain":
        return keras.optimizers.Adam(1e-3)
    inner = keras.optimizers.Adam(1e-3, global_clipnorm=1.0)
    return keras.optimizers.LossScaleOptimizer(inner, initial_scale=1024.0)


def of_keras(size: str, kind: str, wrap: Callable[[Any], Any]) -> Step:
    model = Weights(SIZES[size])
    made = optimizer(kind)
    variables = model.trainable_variables
    made.build(variables)
    grads = [tf.random.normal(v.shape) for v in variables]
    apply = wrap(lambda given: made.apply(given, variables))
    return lambda: apply(grads)


def of_pyupdate(size: str, kind: str) -> Step:
    model = pyupdate.build(Weights(SIZES[size]), optimizer(kind), model_name=size)
    deferred: dict[str, Any] = {}
    grads = [tf.random.normal(v.shape) for v in model.trainable_variables]
    with tf.GradientTape() as tape:
        products = [tf.reduce_sum(v.value * g) for v, g in zip(model.held, grads, strict=True)]
        loss = tf.add_n(products)
    pyupdate.update_model(model, loss, tape=tape, defer=True, deferred=deferred)
    return deferred[size][0]


def compare(size: str, kind: str) -> None:
    contestants: dict[str, Step] = {
        "pyupdate": of_pyupdate(size, kind),
        "Keras eager": of_keras(size, kind, lambda apply: apply),
        "Keras in tf.function": of_keras(size, kind, tf.function),
        "Keras jit_compile=True": of_keras(
            size, kind, lambda apply: tf.function(apply, jit_compile=True)
        ),
    }
    first = {}
    for name, step in contestants.items():
        start = time.process_time()
        step()
        first[name] = time.process_time() - start
    times: dict[str, list[float]] = {name: [] for name in contestants}
    end = time.perf_counter() + SECONDS[size]
    turn = 0
    while time.perf_counter() < end or turn < WARM + 3:
        for name in list(contestants)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            contestants[name]()
            times[name].append(time.perf_counter() - start)
        turn += 1
    medians = {name: 1e3 * statistics.median(found[WARM:]) for name, found in times.items()}
    print(f"{size}, {kind} step, Adam; medians of {turn - WARM}; TensorFlow {tf.__version__}")
    for name, took in medians.items():
        ratio = took / medians["pyupdate"]
        print(f"  {name:<24} {took:9.2f} ms  {ratio:6.2f} x   first call {first[name]:6.2f} s CPU")
    sys.stdout.flush()


def main(arguments: list[str]) -> None:
    for size, kind in [tuple(arguments)] if arguments else CASES:
        compare(size, kind)


if __name__ == "__main__":
    main(sys.argv[1:])
