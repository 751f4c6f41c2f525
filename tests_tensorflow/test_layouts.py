# SPDX-License-Identifier: Apache-2.0
"""State of optimizers wherever they keep it, and optimizers of several; by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="tensorflow is not installed: pyupdate[tensorflow]")

import keras
from keras.src.optimizers.multi_optimizer import OptimizerMap
from replicated import held, made, repeated
from test_left import reach
from training import Known, apart, give, ways, weights

import pyupdate
from pyupdate.tensorflow import left

WINDOWS = [((0, 1), (0,)), ((0,), (0,)), ((1,), (0,)), ((0,), (1,)), ((0,), (0,)), ((1,), (1,))]


class Kept(keras.optimizers.SGD):
    """Steps by the sum of a momentum and a sum of gradients, both kept as a test says."""

    def __init__(self, layout: str) -> None:
        super().__init__(1.0)
        self.layout = layout

    def build(self, variables: Any) -> None:
        super().build(variables)
        slow = [self.add_variable_from_reference(v, "slow") for v in variables]
        fast = [self.add_variable_from_reference(v, "fast") for v in variables]
        names = [v.path for v in variables]
        pairs = list(zip(slow, fast, strict=True))
        more = [(*pair, {"last": pair[1]}) for pair in pairs]
        self.kept = {
            "lists": lambda: {"slow": slow, "more": {"fast": tuple(fast)}},
            "several": lambda: {"several": more},
            "by path": lambda: dict(zip(names, pairs, strict=True)),
            "by key": lambda: dict(zip(map(self._var_key, variables), pairs, strict=True)),
            "list of lists": lambda: [slow, fast, []],
            "flat": lambda: [*slow, *fast],
            "square": lambda: [list(pair) for pair in pairs],
        }[self.layout]()
        self.pair = dict(zip(names, pairs, strict=True)).__getitem__
        self.names = dict(zip(map(self._var_key, variables), names, strict=True))

    def update_step(self, grad: Any, variable: Any, rate: Any) -> None:
        slow, fast = self.pair(self.names[self._var_key(variable)])
        self.assign(slow, 0.5 * slow + grad)
        self.assign(fast, fast + 1.0)
        self.assign_sub(variable, slow + fast)


def by_hand() -> list[list[float]]:
    values, slow, fast = [1.0, -2.0], [0.0, 0.0], [0.0, 0.0]
    for window in WINDOWS:
        for i in range(2):
            hits = sum(i in micro for micro in window)
            if hits:
                slow[i] = 0.5 * slow[i] + (i + 1.0) * hits / 2.0
                fast[i] += 1.0
                values[i] -= slow[i] + fast[i]
    return [[value] for value in values]


TOLD = ["lists", "several", "by path", "by key", "list of lists"]
UNTOLD = ["flat", "square"]
"""Two entries a variable in one list; two lists of two, of two variables: which is which?"""


@pytest.mark.parametrize("layout", TOLD + UNTOLD)
def test_state_of_what_is_not_reached_keeps_its_bits(
    layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    optimizer = Kept(layout)
    model = pyupdate.build(Known([[1.0], [-2.0]]), optimizer, accumulation_steps=2)
    for window in WINDOWS:
        for micro in window:
            reach(model, micro)
    lines = [line for line in caplog.messages if "nothing tells of which variable" in line]
    if layout in UNTOLD:
        (line,) = lines
        assert "held0_slow" in line and "held1_fast" in line
        assert [v.tolist() for v in weights(model)] != by_hand()
    else:
        assert not lines
        assert [v.tolist() for v in weights(model)] == by_hand()


def test_every_state_of_keras_has_its_place() -> None:
    kinds = [kind for kind in vars(keras.optimizers).values() if isinstance(kind, type)]
    kinds = [kind for kind in kinds if issubclass(kind, keras.optimizers.Optimizer)]
    around = ("Optimizer", "LossScaleOptimizer", "MultiOptimizer")
    several = [kind(use_ema=True) for kind in kinds if kind.__name__ not in around]
    assert len(several) >= 14
    values = [np.ones((3, 4), np.float32), np.ones(3, np.float32), np.ones((2, 3), np.float32)]
    for optimizer in several:
        variables = Known(values).trainable_variables
        optimizer.build(variables)
        found = [[id(v) for v in left.slots(optimizer, target)] for target in variables]
        flat = [i for several in found for i in several]
        assert len(set(flat)) == len(flat), optimizer.name
        every = {id(v.value) for v in optimizer.variables if v.shape.rank}
        assert every <= set(flat), optimizer.name


def several(factor: float | None = None, **given: Any) -> Any:
    """Momentum for one variable, plain steps for the other."""
    parts = {".*held0": keras.optimizers.SGD(0.5, momentum=0.5, **given)}
    default = keras.optimizers.SGD(0.25, **given)
    return keras.optimizers.MultiOptimizer(OptimizerMap(default, parts), factor)


@pytest.mark.each_value
@pytest.mark.parametrize("how", ["factor", "scaled", "bounded", "clipped"])
@pytest.mark.parametrize("way", ["eager", "function", "jit"])
def test_a_multi_optimizer_and_scales(way: str, how: str) -> None:
    """Its loss scale factor is divided by once, though each of its optimizers has it as well."""
    options: dict[str, Any] = {"max_norm": 1.0} if how == "bounded" else {}
    inner = several(8.0 if how in ("factor", "bounded") else None)
    if how == "clipped":  # each part by the norm of its own gradients
        inner = several(8.0, global_clipnorm=1.0)
    outer = keras.optimizers.LossScaleOptimizer(inner) if how == "scaled" else inner
    model = pyupdate.build(Known([[1.0], [-2.0]]), outer, **options)
    step = ways(lambda a, b: give(model, a, b))[way]
    first, second = np.float32([3.0]), np.float32([4.0])
    buffer, values = 0.0, [1.0, -2.0]
    for _ in range(3):
        step(tf.constant(first), tf.constant(second))
        bound = 1.0 / (5.0 + 1e-6)  # torch's guard
        grads = {"bounded": (3.0 * bound, 4.0 * bound), "clipped": (1.0, 1.0)}.get(how, (3.0, 4.0))
        buffer = 0.5 * buffer - 0.5 * grads[0]
        values = [values[0] + buffer, values[1] - 0.25 * grads[1]]
    assert apart(weights(model), [[v] for v in values]) <= 4
    assert int(inner.iterations) == 3
    assert inner.loss_scale_factor == (None if how == "scaled" else 8.0)
    assert {one.loss_scale_factor for one in inner.optimizers} == {inner.loss_scale_factor}


def test_a_multi_optimizer_where_a_variable_is_not_reached() -> None:
    model = pyupdate.build(Known([[1.0], [-2.0]]), several())
    for positions in ((0, 1), (1,), (0,)):
        reach(model, positions)
    assert [v.tolist() for v in weights(model)] == [[1.0 - 0.5 - 0.75], [-2.0 - 0.5 - 0.5]]
    model.held[1].trainable = False
    reach(model, (0,))
    assert [v.tolist() for v in weights(model)] == [[-0.25 - 0.875], [-3.0]]


def test_a_multi_optimizer_that_accumulates() -> None:
    """What a window does not reach keeps its momentum: an optimizer in the optimizer has it."""
    model = pyupdate.build(Known([[1.0], [-2.0]]), several(), accumulation_steps=2)
    buffer, values = 0.0, [1.0, -2.0]
    for window in WINDOWS:
        for micro in window:
            reach(model, micro)
        hits = [sum(i in micro for micro in window) for i in range(2)]
        if hits[0]:
            buffer = 0.5 * buffer - 0.5 * hits[0] / 2.0
            values[0] += buffer
        values[1] -= 0.25 * 2.0 * hits[1] / 2.0
    assert [v.tolist() for v in weights(model)] == [[v] for v in values]


@pytest.mark.parametrize("way", ["eager", "function", "functions that run eagerly"])
def test_a_multi_optimizer_on_replicas(strategy: Any, way: str) -> None:
    values = [np.float32([1.0]), np.float32([-2.0])]
    model = made(strategy, values, lambda: several(8.0), max_norm=20.0)
    tf.config.run_functions_eagerly(way == "functions that run eagerly")
    try:
        step = repeated(strategy, model, way == "function")
        for _ in range(2):
            step([[[2.0], [4.0]], [[0.0], [8.0]]])
    finally:
        tf.config.run_functions_eagerly(False)
    expected = [1.0 - 1.5 - 2.25, -2.0 - 2.0]  # the means over both are 3 and 4
    for each, value in zip(held(strategy, model), expected, strict=True):
        assert [float(own[0]) for own in each] == [value, value]
    assert math.isclose(pyupdate.last_update(model).norm, 5.0, rel_tol=1e-6)
