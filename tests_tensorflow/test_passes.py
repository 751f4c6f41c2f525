# SPDX-License-Identifier: Apache-2.0
"""Keras steps by the compiled passes, which XLA calls: what they are, and that they are right."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="tensorflow is not installed: pyupdate[tensorflow]")

import keras
from test_keras_optim import begun, numbers_of
from training import EPS, LACKS_PASSES, AdamByHand, Known, apart, give, ways, weights

import pyupdate
from pyupdate import keras_optim
from pyupdate.kernels import oracle
from pyupdate.kernels.rules import RULES
from pyupdate.tensorflow import native, passes
from pyupdate.tensorflow.update import _last, path_of

PATH = passes.PATH
SIZES = [7, 130, 1, 0, 33]
THREADS = [700_001, 3, 400_000]
"""Work for two threads and more."""
Adam, AdamW = keras.optimizers.Adam, keras.optimizers.AdamW

pytestmark = pytest.mark.skipif(LACKS_PASSES, reason=passes.why_not())


def drawn(seed: int, sizes: list[int], dtype: Any = np.float32) -> list[Any]:
    given = np.random.default_rng(seed)
    return [given.normal(size=size).astype(dtype) for size in sizes]


def scaled(inner: Any, scale: float = 1024.0) -> Any:
    return keras.optimizers.LossScaleOptimizer(inner, initial_scale=scale, dynamic_growth_steps=2)


def state_of(optimizer: Any) -> list[np.ndarray[Any, Any]]:
    return [variable.numpy() for variable in optimizer.variables]


# ----- the structs of XLA -------------------------------------------------------------------------

STRUCTS = {  # as csrc/xla_ffi.h calls them: as XLA does, the last member of ours, and of XLA's
    "Extension": ("Extension_Base", "next", "next"),
    "Version": ("Api_Version", "minor", "minor_version"),
    "ByteSpan": ("ByteSpan", "size", "len"),
    "Buffer": ("Buffer", "dims", "dims"),
    "Buffers": ("Args", "at", "args"),
    "Attributes": ("Attrs", "values", "attrs"),
    "CallFrame": ("CallFrame", "attributes", "attrs"),
    "Metadata": ("Metadata", "traits", "traits"),
    "MetadataExtension": ("Metadata_Extension", "metadata", "metadata"),
    "CreateError": ("Error_Create_Args", "code", "errc"),
    "ErrorMessage": ("Error_GetMessage_Args", "message", "message"),
    "DestroyError": ("Error_Destroy_Args", "error", "error"),
    "Register": ("Handler_Register_Args", "traits", "traits"),
    "CountThreads": ("ThreadPool_NumThreads_Args", "count", "num_threads"),
}
FUNCTIONS = {
    "create_error": "Error_Create",
    "error_message": "Error_GetMessage",
    "destroy_error": "Error_Destroy",
    "register_handler": "Handler_Register",
    "count_threads": "ThreadPool_NumThreads",
}
VALUES = {
    "kMetadataExtension": "Extension_Metadata",
    "kF16": "DataType_F16",
    "kF32": "DataType_F32",
    "kF64": "DataType_F64",
    "kBF16": "DataType_BF16",
    "kString": "AttrType_STRING",
    "kInvalidArgument": "Error_Code_INVALID_ARGUMENT",
    "kInternal": "Error_Code_INTERNAL",
    "kMajorVersion": "API_MAJOR",
    "kMinorVersion": "API_MINOR",
}


def test_the_structs_are_xlas(tmp_path: Path) -> None:
    """Against the header that TensorFlow ships."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler on PATH")
    offset = "static_assert(offsetof(ours::{}, {}) == offsetof(XLA_FFI_{}, {}));"
    lines = [offset.format(a, b, theirs, c) for a, (theirs, b, c) in STRUCTS.items()]
    lines += [
        f"static_assert(sizeof(ours::{a}) == sizeof(XLA_FFI_{theirs}));"
        for a, (theirs, *_) in STRUCTS.items()
    ]
    lines += [offset.format("Api", a, "Api", f"XLA_FFI_{b}") for a, b in FUNCTIONS.items()]
    lines += [f"static_assert(int(ours::{a}) == int(XLA_FFI_{b}));" for a, b in VALUES.items()]
    text = '#include "xla/ffi/api/c_api.h"\n#include "xla_ffi.h"\n'
    text += "namespace ours = pyupdate::xla::ffi;\n" + "\n".join(lines)
    source = tmp_path / "structs.cpp"
    source.write_text(text)
    csrc = Path(pyupdate.__file__).parent / "csrc"
    includes = (f"-I{tf.sysconfig.get_include()}", f"-I{csrc}")
    done = subprocess.run(
        [compiler, "-std=c++20", "-fsyntax-only", *includes, str(source)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# ----- the rules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if not rule.scalars])
def test_a_rule_has_the_oracles_bits(name: str, dtype: Any) -> None:
    """Those of PyTorch's steps, then; clipped, and a step skipped in between."""
    if name in ("muon", "adafactor"):
        with pytest.raises(ValueError, match="matrix products"):
            keras_optim.from_rule(name, **numbers_of(name))
        return
    rule, numbers = RULES[name], numbers_of(name)
    values = drawn(1, SIZES, dtype)
    optimizer = keras_optim.from_rule(name, **numbers)
    model = Known(values, np.dtype(dtype).name)
    pyupdate.build(model, optimizer, max_norm=5.0, skip_nonfinite=True, clip_value=0.75)
    true = [value.copy() for value in values]
    states = [{key: begun(i, numbers, p) for key, i in rule.state.items()} for p in true]
    for count, bad in enumerate((False, False, True, False), start=1):
        grads = drawn(count + 1, SIZES, dtype)
        if bad:
            grads[1][60] = math.inf
        give(model, *grads)
        found = pyupdate.last_update(model)
        assert found.skipped is bad
        if not bad:
            norm = math.sqrt(sum(float(np.sum(np.float64(g) ** 2)) for g in grads))
            assert found.norm == pytest.approx(norm, rel=1e-6)
            for i, grad in enumerate(grads):
                true[i], states[i] = oracle.step(
                    rule,
                    true[i],
                    grad,
                    states[i],
                    list(numbers.values()),
                    count=min(count, 3),
                    multiplier=found.multiplier,
                    clip_value=0.75,
                )
        for i, held in enumerate(weights(model)):
            assert held.tobytes() == true[i].tobytes()
            for key in rule.state:
                assert optimizer._state[key][i].numpy().tobytes() == states[i][key].tobytes()
    assert path_of(model) == PATH
    assert int(optimizer.iterations) == 3


def test_several_threads_have_the_bits_of_one() -> None:
    values = drawn(1, THREADS)
    optimizer = keras_optim.from_rule("adamw", **numbers_of("adamw"))
    model = pyupdate.build(Known(values), optimizer, max_norm=5.0)
    grads = drawn(2, THREADS)
    give(model, *grads)
    found = pyupdate.last_update(model)
    total = sum(float(np.sum(np.float64(g) ** 2)) for g in grads)
    assert found.norm == pytest.approx(math.sqrt(total), rel=1e-6)
    for value, grad, held in zip(values, grads, weights(model), strict=True):
        state = {key: np.zeros_like(value) for key in RULES["adamw"].state}
        numbers = list(numbers_of("adamw").values())
        given = {"count": 1, "multiplier": found.multiplier}
        true, _ = oracle.step(RULES["adamw"], value, grad, state, numbers, **given)
        assert held.tobytes() == true.tobytes()


def test_subnormal_numbers_are_kept() -> None:
    """TensorFlow's threads take them for zero."""
    model = Known([np.float32([0.0])])
    optimizer = keras_optim.from_rule(
        "sgd", **(numbers_of("sgd") | {"lr": 0.5, "weight_decay": 0.0})
    )
    pyupdate.build(model, optimizer, max_norm=1.0)
    give(model, np.float32([2.0**-126]))  # half of it is subnormal
    assert path_of(model) == PATH
    assert weights(model)[0].tolist() == [-(2.0**-127)]


# ----- Keras's own --------------------------------------------------------------------------------


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


# ----- what does not go by them -------------------------------------------------------------------


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
