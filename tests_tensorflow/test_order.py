# SPDX-License-Identifier: Apache-2.0
"""The order in which XLA computes a step on a CPU: no bit of it is another."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="tensorflow is not installed: pyupdate[tensorflow]")

import keras
from keras.src.optimizers.multi_optimizer import OptimizerMap
from rule_run import NUMBERS
from training import Known, give, ways, weights

import pyupdate
import pyupdate.keras_optim
from pyupdate.tensorflow import order
from pyupdate.tensorflow import update as keras_update


@pytest.fixture(autouse=True)
def without_the_compiled_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would step most of what is stepped here."""
    monkeypatch.setenv("PYUPDATE_BACKEND", "reference")


SHAPES = [(3, 5), (7,), (), (2, 2), (9,), (4,)]
KINDS: dict[str, Callable[[], Any]] = {
    "adam": lambda: keras.optimizers.Adam(0.01, global_clipnorm=1.0),
    "adamw": lambda: keras.optimizers.AdamW(0.01, use_ema=True),
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.5, clipvalue=0.5),
    "accumulating": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Lamb(0.01)),
    "rule": lambda: pyupdate.keras_optim.from_rule("adamw", **NUMBERS["adamw"]),
    "several": lambda: keras.optimizers.MultiOptimizer(
        OptimizerMap(keras.optimizers.SGD(0.1), {".*held[13]": keras.optimizers.Adam(0.01)})
    ),
}


def trained(kind: str, way: str, dtype: str) -> Any:
    drawn = np.random.default_rng(3)
    model = pyupdate.build(Known([drawn.normal(size=s) for s in SHAPES], dtype), KINDS[kind]())
    step = ways(lambda *grads: give(model, *grads))[way]
    for _ in range(4):
        step(*(tf.constant(drawn.normal(size=s), getattr(tf, dtype)) for s in SHAPES))
    assert keras_update.path_of(model) == "XLA"
    return model


OFTEN = ("adam", "sgd", "several")
CASES = [
    pytest.param(kind, "eager", "float32", marks=() if kind in OFTEN else pytest.mark.slow)
    for kind in KINDS
]
CASES += [("adam", "function", "float32"), ("adam", "eager", "float64")]
CASES += [("several", "eager", "bfloat16")]
RARE = [("adam", "jit", "float32"), ("adam", "eager", "bfloat16"), ("several", "eager", "float64")]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in RARE]


@pytest.mark.parametrize(("kind", "way", "dtype"), CASES)
def test_every_bit_is_kept(
    kind: str, way: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trained(kind, way, dtype)
    asked: list[Any] = []
    after = order._after
    monkeypatch.setattr(order, "LARGE", 1)
    monkeypatch.setattr(order, "AHEAD", 2)
    monkeypatch.setattr(order, "_after", lambda *given: asked.append(given) or after(*given))
    ordered = trained(kind, way, dtype)
    assert len(asked) == (0 if dtype == "float64" else len(SHAPES) - 2)
    for a, b in zip(weights(plain), weights(ordered), strict=True):
        assert a.tobytes() == b.tobytes()


def test_bits_of_a_gradient() -> None:
    """Zeros with a sign, subnormal numbers, inf and nan, whatever it waits for."""
    bits = [0, 0x80000000, 1, 0x80000001, 0x7F800000, 0xFF800000, 0x7FC12345, 0x3F800000]
    grad = np.array(bits, np.uint32)
    for value in (-1.0, -0.0, math.nan, -math.inf, 2.0):
        for compiled in (False, True):
            run = tf.function(order._after, jit_compile=compiled)
            found = run(tf.bitcast(tf.constant(grad), tf.float32), tf.constant([[value, 1.0]]))
            assert tf.bitcast(found, tf.uint32).numpy().tolist() == bits


@pytest.mark.parametrize("ahead", [1, 3])
def test_xla_keeps_what_it_waits_for(ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not find out that what is or-ed is zero: then nothing would wait."""
    monkeypatch.setattr(order, "LARGE", 1)
    monkeypatch.setattr(order, "AHEAD", ahead)
    optimizer = keras.optimizers.Adam()
    variables = Known([np.ones(8, np.float32)] * 6).trainable_variables
    optimizer.build(variables)

    def ors(compiled: bool) -> int:
        def step(*grads: Any) -> None:
            with order.kept(optimizer, compiled):
                optimizer.apply(list(grads), variables)

        made = tf.function(step, jit_compile=True, autograph=False)
        text = made.experimental_get_compiler_ir(*[tf.ones(8)] * 6)(stage="optimized_hlo")
        return sum(" or(" in line for line in text.splitlines())

    assert ors(compiled=False) == 0
    assert ors(compiled=True) >= 6 - ahead
