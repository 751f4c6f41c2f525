# SPDX-License-Identifier: Apache-2.0
"""The compiled passes, which XLA calls: its structs, and every rule's bits."""

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

from by_passes import PATH, SIZES, drawn
from test_keras_optim import begun, numbers_of
from training import LACKS_PASSES, Known, give, weights

import pyupdate
from pyupdate import keras_optim
from pyupdate.kernels import oracle
from pyupdate.kernels.rules import RULES
from pyupdate.tensorflow import passes
from pyupdate.tensorflow.update import path_of

THREADS = [700_001, 3, 400_000]
"""Work for two threads and more."""

pytestmark = pytest.mark.skipif(LACKS_PASSES, reason=passes.why_not())

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


@pytest.mark.each_value
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
