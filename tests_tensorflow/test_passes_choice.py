# SPDX-License-Identifier: Apache-2.0
"""What goes by the compiled passes, and what does not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="tensorflow is not installed: pyupdate[tensorflow]")

import keras
from by_passes import PATH, SIZES, drawn
from test_keras_optim import numbers_of
from training import LACKS_PASSES, AdamByHand, Known, apart, give, weights

import pyupdate
from pyupdate import keras_optim
from pyupdate.tensorflow import native, passes
from pyupdate.tensorflow.update import _last, path_of

Adam, AdamW = keras.optimizers.Adam, keras.optimizers.AdamW

pytestmark = pytest.mark.skipif(LACKS_PASSES, reason=passes.why_not())


class OfOnesOwn(Adam):
    """Keras's, but it could do anything."""


def changed(**attributes: Any) -> Any:
    optimizer = Adam()
    for name, value in attributes.items():
        setattr(optimizer, name, value)
    return optimizer


OTHERS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a subclass": (OfOnesOwn, {}, "XLA"),
    "another optimizer": (keras.optimizers.RMSprop, {}, "XLA"),
    "a variable for a beta": (lambda: changed(beta_1=tf.Variable(0.5)), {}, "XLA"),
    "a tensor for a decay": (lambda: changed(weight_decay=tf.constant(0.5)), {}, "XLA"),
    "a method of its own": (lambda: changed(update_step=lambda g, v, _: v.assign(g)), {}, "XLA"),
    "Keras's average": (lambda: Adam(use_ema=True), {}, "XLA"),
    "Keras's micro-batches": (lambda: Adam(gradient_accumulation_steps=2), {}, "XLA"),
    "Keras's bounds": (lambda: Adam(clipvalue=1.0), {}, "XLA"),
    "a rule with scalars": (
        lambda: keras_optim.from_rule("nadam", **numbers_of("nadam")),
        {},
        "XLA",
    ),
    "an average": (Adam, {"ema_decay": 0.5}, "XLA"),
    "micro-batches": (Adam, {"accumulation_steps": 2}, PATH),
    "bounds": (Adam, {"clip_value": 0.5}, PATH),
    "a number for a scale": (lambda: Adam(loss_scale_factor=8.0), {}, PATH),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_goes_by_them(kind: str) -> None:
    make, options, path = OTHERS[kind]
    model = pyupdate.build(Known(drawn(1, SIZES)), make(), **options)
    for seed in range(2):
        give(model, *drawn(seed + 2, SIZES))
    assert path_of(model) == path


def test_a_method_of_its_own_and_variables_as_numbers_are_followed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "MANY", 9)
    for size in (1, native.MANY):  # XLA's, else kernels
        model = pyupdate.build(
            Known([np.float32([1.0])] * size), changed(update_step=lambda g, v, _: v.assign(g))
        )
        give(model, *[np.float32([3.0])] * size)
        assert weights(model)[-1].tolist() == [3.0]
        beta = tf.Variable(0.9)
        model, keras_model = (Known([np.float32([1.0])] * size) for _ in range(2))
        pyupdate.build(model, changed(beta_1=beta))
        theirs = changed(beta_1=beta)
        for value in (0.9, 0.1, 0.5):
            beta.assign(value)
            grads = [np.float32([value])] * size
            give(model, *grads)
            theirs.apply([tf.constant(g) for g in grads], keras_model.trainable_variables)
        assert apart(weights(model), weights(keras_model)) <= 8


@pytest.mark.each_value
@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("kind", ["float64", "float16", "bfloat16"])
def test_a_gradient_of_the_users_own_precision(
    kind: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keras casts it to that of the variable."""
    monkeypatch.setattr(native, "MANY", 9)

    @tf.custom_gradient
    def total(value: Any) -> Any:
        return tf.reduce_sum(value), lambda _: tf.constant([0.5, -2.0], kind)

    for options in ({}, {"max_norm": 1.0}, {"clip_value": 1.0}):
        model = pyupdate.build(
            Known([np.float32([1.0, 2.0])] * count), Adam(0.01, epsilon=1e-12), **options
        )
        with tf.GradientTape() as tape:
            loss = tf.add_n([total(held.value) for held in model.held])
        pyupdate.update_model(model, loss, tape=tape)
        assert path_of(model) == (PATH if count == 1 else "TensorFlow's fused kernels")
        assert apart(weights(model), [np.float64([0.99, 2.01])] * count) <= 8
        if "max_norm" in options:
            norm = math.sqrt(4.25 * count)
            assert pyupdate.last_update(model).norm == pytest.approx(norm, rel=1e-6)


def test_a_constraint_and_other_precisions_do_not() -> None:
    model = Known(drawn(1, SIZES))
    model.held[0].constraint = keras.constraints.NonNeg()
    give(pyupdate.build(model, Adam()), *drawn(2, SIZES))
    assert path_of(model) == "XLA"
    for dtype in ("float16", "bfloat16"):
        model = pyupdate.build(Known(drawn(1, SIZES), dtype), Adam())
        give(model, *drawn(2, SIZES))
        assert path_of(model) == "XLA"


def test_many_small_ones_go_by_kernels_and_many_large_ones_do_not() -> None:
    for size, path in ((3, "TensorFlow's fused kernels"), (native.LARGE, PATH)):
        sizes = [size] * native.MANY
        model = pyupdate.build(Known(drawn(1, sizes)), Adam(), max_norm=1.0)
        give(model, *drawn(2, sizes))
        assert path_of(model) == path


def test_accumulated_and_bounded_by_hand() -> None:
    sizes = [7, 130]
    values = drawn(1, sizes)
    options = {"accumulation_steps": 2, "clip_value": 0.5, "max_norm": 6.0}
    model = pyupdate.build(Known(values), Adam(0.01), **options)
    hand = AdamByHand(values, float(np.float32(0.01)))
    for turn in range(3):
        parts = [drawn(10 * turn + part, sizes) for part in range(2)]
        for part in parts:
            give(model, *part)
        means = [(np.float64(a) + b) / 2 for a, b in zip(*parts, strict=True)]
        norm = math.sqrt(sum(float(np.sum(mean**2)) for mean in means))
        factor = min(1.0, 6.0 / (norm + 1e-6))
        hand.step([np.clip(mean * factor, -0.5, 0.5) for mean in means])
        assert apart(weights(model), hand.values, floor=0.1) <= 8
    assert path_of(model) == PATH


def test_the_choice_of_a_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pyupdate.build(Known(drawn(1, SIZES)), Adam(0.01))
    give(model, *drawn(2, SIZES))
    assert path_of(model) == PATH
    with pyupdate.use_backend("reference"):
        give(model, *drawn(2, SIZES))
        assert path_of(model) == "XLA"
    give(model, *drawn(2, SIZES))
    assert path_of(model) == PATH
    monkeypatch.setenv("PYUPDATE_BACKEND", "reference")
    give(model, *drawn(2, SIZES))
    assert path_of(model) == "XLA"
    monkeypatch.setenv("PYUPDATE_BACKEND", "refrence")
    before = weights(model)
    with pytest.raises(ValueError, match="PYUPDATE_BACKEND: no back end is named 'refrence'"):
        give(model, *drawn(2, SIZES))
    assert all(map(np.array_equal, weights(model), before))


def test_functions_that_run_eagerly_do_not_go_by_them() -> None:
    model = pyupdate.build(Known(drawn(1, SIZES)), Adam(0.01), max_norm=1.0)
    for eagerly in (False, True, False):
        tf.config.run_functions_eagerly(eagerly)
        try:
            give(model, *drawn(2, SIZES))
            assert (path_of(model) == PATH) is not eagerly
        finally:
            tf.config.run_functions_eagerly(False)
    assert int(model.current_optimizer.iterations) == 3


def saved(model: Any, path: Path) -> Any:
    """A step in a SavedModel, loaded again."""
    module = tf.Module()
    shape = tf.TensorSpec([1])
    module.step = tf.function(lambda grad: give(model, grad), input_signature=[shape])
    module.step(tf.constant([2.0]))
    module.held = [v.value for v in (*model.held, *model.current_optimizer.variables)]
    module.found = _last.get(model.current_optimizer)
    tf.saved_model.save(module, str(path))
    return tf.saved_model.load(str(path))


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_a_saved_function_is_for_other_processes_where_it_was_saved_without(
    tmp_path: Path, name: str
) -> None:
    model = pyupdate.build(Known([np.float32([1.0])]), Adam(0.01), max_norm=1.0)
    give(model, np.float32([2.0]))
    with pyupdate.use_backend(name):
        loaded = saved(model, tmp_path)
    for grad in (np.float32([2.0]), np.float32([-1.0])):
        loaded.step(tf.constant(grad))
        give(model, grad)
    assert apart([loaded.held[0].numpy()], weights(model)) <= 8
    calls = (tmp_path / "saved_model.pb").read_bytes().count(passes.MARK)
    assert bool(calls) is (name == "auto")


def test_a_tensorflow_that_does_not_show_the_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "GET_API", "_ZN3xla3ffi9NotThereEv")
    assert "does not show XLA's foreign function interface" in passes.why_not.__wrapped__()
    monkeypatch.setattr(passes, "why_not", lambda: "for the sake of this test")
    model = pyupdate.build(Known(drawn(1, SIZES)), Adam(0.01))
    give(model, *drawn(2, SIZES))
    assert path_of(model) == "XLA"


@pytest.mark.parametrize(
    ("name", "operands", "given", "message"),
    [
        ("step", [[0.0, math.inf, 1.0], [1.0]], {"rule": "sgd"}, "numbers must be"),
        ("step", [[0.0] * 9, [1.0]], {"rule": "no such rule"}, "no compiled rule is named"),
        ("step", [[0.0] * 9, [1.0]], {}, "the attribute 'rule' is missing"),
        ("step", [[0.0] * 9, [1.0]], {"rule": "nadam"}, "a rule with scalars has no handler"),
        ("measure", [], {}, "too few buffers"),
    ],
)
def test_a_call_that_is_wrong_is_refused(
    name: str, operands: list[Any], given: dict[str, str], message: str
) -> None:
    """Before a byte is written; no plan makes such a call."""

    @tf.function(jit_compile=True)
    def call(value: Any) -> Any:
        wide = [tf.constant(numbers, tf.float64) for numbers in operands]
        sent = [*wide, value, value] if name == "step" else wide
        return passes._called(f"{passes.PREFIX}_{name}", sent, [value], **given)

    with pytest.raises(tf.errors.OpError, match=message):
        call(tf.constant([1.0, 2.0]))
