# SPDX-License-Identifier: Apache-2.0
"""The Keras half of the self-test, a program: ``python -m pyupdate.tensorflow.selftest``.

Of every kind of rule one is stepped by `pyupdate.update_model`, compiled by XLA: loss scale, finite
check, clip and step, from state in mid-training. Each prints its `Result` as a line of JSON. XLA
may contract, so bits are not asked for, but the bounds of the fp64 oracle are the same. Where XLA
can call the compiled passes, they step the rules as well, and have the fp32 oracle's bits.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import pyupdate
from pyupdate import backends, keras_optim
from pyupdate import selftest_truth as truth
from pyupdate.kernels import oracle
from pyupdate.kernels.rules import RULES

from . import passes
from .update import path_of

TRIED = (
    "sgd_momentum",  # a flag
    "adamw",  # powers of a step's number
    "adamax",  # a maximum
    "rmsprop_centered_momentum",
    "adagrad",
    "adadelta",
    "rprop",  # comparisons
    "lion",  # a sign
    "adopt",  # another first step
    "lars_momentum",  # a norm a tensor
    "novograd",  # a number a tensor
)
"""What XLA compiles in half a second each; the powers of some rules take it ten times as long."""

WAYS = {"keras": "reference", "keras, passes": "cpu"}
"""What a result is called, and the choice of a back end by which it is made."""


class Weights(keras.Model):  # type: ignore[misc]
    """Vectors whose gradients are what a call is given."""

    def __init__(self, values: list[truth.Array]) -> None:
        super().__init__()
        self.held = [self.add_weight(shape=value.shape, initializer="zeros") for value in values]
        for variable, value in zip(self.held, values, strict=True):
            variable.assign(value)
        self.built = True

    def call(self, grads: list[truth.Array]) -> Any:
        """A loss of those gradients."""
        products = [tf.reduce_sum(v.value * g) for v, g in zip(self.held, grads, strict=True)]
        return tf.add_n(products)


def tried(name: str, way: str = "keras") -> truth.Result | None:
    """One step of a rule; None where the compiled passes are asked for and do not have it.

    Args:
        name: the rule's.
        way: a key of `WAYS`.
    """
    chosen = os.environ.get(backends.VARIABLE)
    os.environ[backends.VARIABLE] = WAYS[way]
    try:
        return _stepped(name, way)
    finally:
        if chosen is None:
            del os.environ[backends.VARIABLE]
        else:
            os.environ[backends.VARIABLE] = chosen


def _stepped(name: str, way: str) -> truth.Result | None:
    rule = RULES[name]
    numbers = {number: truth.NUMBERS.get(number, 0.5) for number in rule.numbers}
    random = np.random.default_rng(20_260_101)

    def uniform(size: int, low: float, high: float) -> truth.Array:
        return random.uniform(low, high, size).astype(np.float32)

    before = []
    for size in truth.SIZES:
        state = {key: uniform(size, *truth.STATE.get(key, (0.01, 1.0))) for key in rule.state}
        state |= {key: np.array(0.5, np.float32) for key in rule.scalars}
        before.append(truth.Stored(uniform(size, -1.0, 1.0), uniform(size, -4.0, 4.0), state))

    model = Weights([stored.param for stored in before])
    inner = keras_optim.from_rule(name, **numbers)
    # The scale, a power of 2, makes of the loss's gradients exactly those of `before`.
    scaling = keras.optimizers.LossScaleOptimizer(inner, initial_scale=1.0 / truth.UNSCALE)
    pyupdate.build(model, scaling, max_norm=truth.MAX_NORM)
    inner.iterations.assign(truth.COUNT - 1)
    kept = {key: inner._state[key] for key in rule.state}
    kept |= {
        key: inner._scalars[key] * (len(before) if key in rule.counted else 1)
        for key in rule.scalars
    }
    for place, stored in enumerate(before):
        for key, values in stored.state.items():
            kept[key][place].assign(values)
    with tf.GradientTape() as tape:
        loss = model([stored.grad * np.float32(truth.UNSCALE) for stored in before])
    pyupdate.update_model(model, loss, tape=tape)

    path = path_of(model)
    if way != "keras" and path == "XLA" and rule.scalars:
        return None
    if path != ("XLA" if way == "keras" else passes.PATH):
        return truth.Result(way, name, False, reason=f"stepped by {path}")
    if int(inner.iterations) != truth.COUNT:
        return truth.Result(way, name, False, reason="the step was not counted")
    exact = truth.exact_multiplier([oracle.load(stored.grad) for stored in before])
    found = pyupdate.last_update(model)
    assert found is not None  # it was stepped just now
    worst, bits = 0.0, True
    for place, stored in enumerate(before):
        state = {key: values[place].numpy() for key, values in kept.items()}
        after = truth.Stored(model.held[place].numpy(), stored.grad, state)
        wide = stored.in_fp64()
        true = wide.stepped(rule, list(numbers.values()), exact)
        part = truth.part(after, true, wide, np.abs(wide.grad * exact))
        worst = max(worst, part / float(np.finfo(np.float32).eps))
        known = stored.stepped(rule, list(numbers.values()), found.multiplier)
        bits = bits and truth.same(after, known, stored)
    promised = way != "keras"
    passed = worst <= 1.0 and (bits or not promised)
    return truth.Result(way, name, passed, bits if promised else None, worst)


def main() -> None:
    """Try each rule; a line that says so where one raises, then the next."""
    ways = list(WAYS)[: 1 if passes.why_not() else None]
    for way, name in ((way, name) for way in ways for name in TRIED):
        result: truth.Result | None
        try:
            result = tried(name, way)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            result = truth.Result(way, name, False, reason=said)
        if result is None:
            continue
        sys.stdout.write(json.dumps(result.as_dict()) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
