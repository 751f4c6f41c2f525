# SPDX-License-Identifier: Apache-2.0
"""The self-test: one step of every rule on every back end, held against the two numpy oracles.

A step here is the whole of it: reduce pass with a finite check, unscale, clip, apply pass, from
state in mid-training. The fp32 oracle (kernels/oracle.py on stored values) must be met bit for bit;
the fp64 oracle, which shares no rounding with it, within `PARAM_BOUND` and `STATE_BOUND`. Keras
steps some rules too, within the bounds: XLA may contract (pyupdate/tensorflow/selftest.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from . import backends, info
from . import selftest_truth as truth
from .kernels import oracle
from .kernels.language import Rule
from .kernels.rules import RULES
from .options import Options
from .pytorch.plan import Plan
from .pytorch.request import Scaling
from .pytorch.rows import GroupRule, Inputs, Row
from .selftest_truth import PARAM_BOUND, STATE_BOUND, Array, Result, Stored

PROMISE = (
    "self-test: the fp32 oracle's bits, and the fp64 oracle within "
    f"{PARAM_BOUND:g} eps (parameters) and {STATE_BOUND:g} eps (state); keras: the latter"
)

STORAGES = (
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
)
"""The dtypes of a parameter and of its state."""


def run() -> Iterator[Result]:
    """Every back end of CPU tensors (every instruction set of one that has several), every rule."""
    on_cpu = {backend.name for backend in backends.BACKENDS if backend.takes("cpu")}
    for name, reason in backends.available():
        if name not in on_cpu:
            continue
        if reason is not None:
            yield Result(name, "every rule", None, reason=reason)
            continue
        for label in _variants(name):
            for rule in RULES.values():
                with _in_force(name, label):
                    yield _try(label, rule)
    yield from keras_models()


def keras_models() -> Iterator[Result]:
    """Keras models, in a process of their own: TensorFlow and torch do not share one gladly."""
    reason = info.keras_models()["reason"]
    if reason is None and find_spec("keras") is None:
        reason = "rules are stepped by Keras 3, and only tf-keras is installed"
    if reason is not None:
        yield Result("keras", "every rule", None, reason=reason)
        return
    done = subprocess.run(
        [sys.executable, "-m", "pyupdate.tensorflow.selftest"],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    for line in done.stdout.splitlines():
        yield Result(**json.loads(line))
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [""]
        yield Result("keras", "every rule", False, reason=f"exit {done.returncode}: {last[0]}")


def _variants(name: str) -> list[str]:
    if name != "cpu":
        return [name]
    from . import _C

    return [f"{name}/{isa}" for isa in _C.isas()]


@contextmanager
def _in_force(name: str, label: str) -> Iterator[None]:
    with backends.use_backend(name):
        if name != "cpu":
            yield
            return
        from . import _C

        before = _C.isa()
        _C.use_isa(label.partition("/")[2])
        try:
            yield
        finally:
            _C.use_isa(before)


def _try(label: str, rule: Rule) -> Result:
    try:
        found = [_step(rule, *storage) for storage in STORAGES]
    except Exception as error:  # a line that says so, then the next
        return Result(label, rule.name, False, reason=f"{type(error).__name__}: {error}")
    bits = all(same for same, _ in found)
    worst = max(part for _, part in found)
    return Result(label, rule.name, bits and worst <= 1.0, bits, worst)


def _step(rule: Rule, dtype: torch.dtype, state_dtype: torch.dtype) -> tuple[bool, float]:
    """Whether the bits are the fp32 oracle's; the largest error as a part of its bound."""
    generator = torch.Generator("cpu").manual_seed(20_260_101)

    def uniform(size: int, low: float, high: float, kind: torch.dtype = dtype) -> torch.Tensor:
        values = torch.rand(size, dtype=torch.float64, device="cpu", generator=generator)
        return (values * (high - low) + low).to(kind)

    rows: list[Row] = []
    state: dict[torch.Tensor, dict[str, Any]] = {}
    before: list[Stored] = []
    for position, size in enumerate(truth.SIZES):
        param: torch.Tensor = torch.nn.Parameter(uniform(size, -1.0, 1.0))
        param.grad = uniform(size, -4.0, 4.0)
        state[param] = {
            key: uniform(size, *truth.STATE.get(key, (0.01, 1.0)), state_dtype)
            for key in rule.state
        }
        state[param] |= {key: torch.tensor(0.5, device="cpu") for key in rule.scalars}
        state[param]["step"] = torch.tensor(float(truth.COUNT - 1), device="cpu")
        rows.append(Row(param, 0, position, f"tensor {position}"))
        before.append(_stored(rule, param, param.grad, state[param]))
    numbers = [truth.NUMBERS.get(name, 0.5) for name in rule.numbers]
    inputs = Inputs([{"params": [row.param for row in rows]}], state, [[1.0, *numbers]])
    plan = Plan(rows, [GroupRule(rule, counts_steps=True)])
    plan.step(inputs, Options(max_norm=truth.MAX_NORM), Scaling(unscale=truth.UNSCALE, check=True))

    same = True
    worst = 0.0
    given = truth.multiplier([stored.grad for stored in before])
    exact = truth.exact_multiplier([oracle.load(stored.grad) for stored in before])
    for row, stored in zip(rows, before, strict=True):
        assert row.param.grad is not None
        after = _stored(rule, row.param, row.param.grad, state[row.param])
        same &= float(state[row.param]["step"]) == truth.COUNT
        same &= truth.same(after, stored.stepped(rule, numbers, given), stored)
        wide = stored.in_fp64()
        true = wide.stepped(rule, numbers, exact)
        part = truth.part(after, true, wide, np.abs(wide.grad * exact))
        worst = max(worst, part / torch.finfo(dtype).eps)
    return same, worst


def _stored(
    rule: Rule, param: torch.Tensor, grad: torch.Tensor, state: dict[str, torch.Tensor]
) -> Stored:
    kept = {key: _numpy(state[key]) for key in (*rule.state, *rule.scalars)}
    return Stored(_numpy(param), _numpy(grad), kept)


def _numpy(tensor: torch.Tensor) -> Array:
    """A copy of the stored values; bf16 as its bit patterns."""
    tensor = tensor.detach().cpu().clone()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    found: Array = tensor.numpy()
    return found
