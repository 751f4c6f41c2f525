# SPDX-License-Identifier: Apache-2.0
"""The self-test: one step of every rule on every back end, held against the two numpy oracles.

A step here is the whole of it: reduce pass with a finite check, unscale, clip, apply pass, from
state in mid-training. The fp32 oracle (kernels/oracle.py on stored values) must be met bit for bit;
the fp64 oracle, which shares no rounding with it, within `PARAM_BOUND` and `STATE_BOUND`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from . import backends
from .kernels import oracle
from .kernels.language import Rule
from .kernels.rules import RULES
from .kernels.rules import multiplier as multiplier_rule
from .options import Options
from .pytorch.plan import Plan
from .pytorch.request import Scaling
from .pytorch.rows import GroupRule, Inputs, Row

Array = np.ndarray[Any, Any]

PARAM_BOUND = 8.0
"""Largest error of a parameter against fp64, in eps x max(|param|, lr, largest move)."""
STATE_BOUND = 4.0
"""Largest error of state against fp64, in eps x max(|state|, |grad|, grad^2, largest move)."""
PROMISE = (
    "self-test: the fp32 oracle's bits, and the fp64 oracle within "
    f"{PARAM_BOUND:g} eps (parameters) and {STATE_BOUND:g} eps (state)"
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
SIZES = (1, 70, 16_389)
"""One element, a few lanes, and a chunk of 16,384 elements with a short one after it."""
COUNT = 3  # the step that is made
UNSCALE = 0.25
MAX_NORM = 40.0  # of a norm of 74: the clip halves the gradients
NUMBERS = {
    "lr": 1e-3,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.01,
    "momentum": 0.9,
    "dampening": 0.1,
    "nesterov": 1.0,
}
"""What groups hold, by the names of rules; a name that is not here is 0.5."""
STATE = {"grad_avg": (0.001, 0.05)}
"""Where state lies, if not from 0.01 to 1: an average is below the root of that of the squares."""


@dataclass(frozen=True)
class Result:
    """One line of the self-test.

    Attributes:
        backend: its name, with the instruction set where it has one.
        rule: what was stepped.
        passed: None where the back end cannot run.
        bits: whether the fp32 oracle's bits were met.
        worst: the largest error against fp64 as a part of its bound.
        reason: why it was left out, or what was raised.
    """

    backend: str
    rule: str
    passed: bool | None
    bits: bool = False
    worst: float = 0.0
    reason: str = ""

    def line(self) -> str:
        """As text."""
        head = f"{self.backend:<12} {self.rule:<16}"
        if self.passed is None:
            return f"{head} left out: {self.reason}"
        if self.reason:
            return f"{head} FAILED: {self.reason}"
        verdict = "ok" if self.passed else "FAILED"
        bits = "bits equal" if self.bits else "BITS DIFFER"
        return f"{head} {verdict:<6} {bits}, {self.worst:.2f} of the bound"

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


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
    generator = torch.Generator().manual_seed(20_260_101)

    def uniform(size: int, low: float, high: float, kind: torch.dtype = dtype) -> torch.Tensor:
        values = torch.rand(size, dtype=torch.float64, generator=generator)
        return (values * (high - low) + low).to(kind)

    rows: list[Row] = []
    state: dict[torch.Tensor, dict[str, Any]] = {}
    before: list[_Stored] = []
    for position, size in enumerate(SIZES):
        param: torch.Tensor = torch.nn.Parameter(uniform(size, -1.0, 1.0))
        param.grad = uniform(size, -4.0, 4.0)
        state[param] = {
            key: uniform(size, *STATE.get(key, (0.01, 1.0)), state_dtype) for key in rule.state
        }
        state[param] |= {key: torch.tensor(0.5) for key in rule.scalars}
        state[param]["step"] = torch.tensor(float(COUNT - 1))
        rows.append(Row(param, 0, position, f"tensor {position}"))
        before.append(_stored(rule, param, param.grad, state[param]))
    numbers = [NUMBERS.get(name, 0.5) for name in rule.numbers]
    inputs = Inputs([{"params": [row.param for row in rows]}], state, [[1.0, *numbers]])
    plan = Plan(rows, [GroupRule(rule, counts_steps=True)])
    plan.step(inputs, Options(max_norm=MAX_NORM), Scaling(unscale=UNSCALE, check=True))

    same = True
    worst = 0.0
    given = _multiplier([stored.grad for stored in before])
    exact = _exact_multiplier([oracle.load(stored.grad) for stored in before])
    for row, stored in zip(rows, before, strict=True):
        assert row.param.grad is not None
        after = _stored(rule, row.param, row.param.grad, state[row.param])
        same &= float(state[row.param]["step"]) == COUNT
        same &= _same(after, stored.stepped(rule, numbers, given), stored)
        wide = stored.in_fp64()
        true = wide.stepped(rule, numbers, exact)
        part = _part(after, true, wide, np.abs(wide.grad * exact))
        worst = max(worst, part / torch.finfo(dtype).eps)
    return same, worst


@dataclass(frozen=True)
class _Stored:
    """Copies of a row as numpy has them; bf16 as its bit patterns."""

    param: Array
    grad: Array
    state: dict[str, Array]

    def in_fp64(self) -> _Stored:
        state = {key: oracle.load(value).astype(np.float64) for key, value in self.state.items()}
        param, grad = (oracle.load(value).astype(np.float64) for value in (self.param, self.grad))
        return _Stored(param, grad, state)

    def stepped(self, rule: Rule, numbers: list[float], multiplier: float) -> _Stored:
        param, state = oracle.step(
            rule,
            self.param,
            self.grad,
            self.state,
            numbers,
            count=COUNT,
            multiplier=multiplier,
        )
        return _Stored(param, self.grad, state)


def _stored(
    rule: Rule, param: torch.Tensor, grad: torch.Tensor, state: dict[str, torch.Tensor]
) -> _Stored:
    kept = {key: _numpy(state[key]) for key in (*rule.state, *rule.scalars)}
    return _Stored(_numpy(param), _numpy(grad), kept)


def _same(found: _Stored, known: _Stored, before: _Stored) -> bool:
    """Whether the bits are those that are known, and the gradient's what they were."""
    return (
        found.param.tobytes() == known.param.tobytes()
        and found.grad.tobytes() == before.grad.tobytes()
        and all(found.state[key].tobytes() == known.state[key].tobytes() for key in known.state)
    )


def _part(found: _Stored, true: _Stored, before: _Stored, grad: Array) -> float:
    """The largest error over its bound without eps; infinite where a value is not finite."""

    def largest_move(now: Array, then: Array) -> float:
        return float(np.abs(now - then).max())

    moved = largest_move(true.param, before.param)
    scale = np.maximum(np.abs(true.param), max(moved, NUMBERS["lr"])) * PARAM_BOUND
    parts = [np.abs(found.in_fp64().param - true.param) / scale]
    for key, value in true.state.items():
        if value.ndim == 0:  # a scalar has another eps; its bits are looked at, and what it does
            continue
        scale = np.maximum(np.maximum(np.abs(value), grad), grad * grad)
        scale = np.maximum(scale, largest_move(value, before.state[key])) * STATE_BOUND
        parts.append(np.abs(found.in_fp64().state[key] - value) / scale)
    return max(float(np.max(np.where(np.isfinite(part), part, np.inf))) for part in parts)


def _multiplier(grads: list[Array]) -> float:
    """Unscale x clip, in the reduction order of the back ends."""
    from .kernels.reduction import halving_tree

    total = halving_tree([oracle.sum_of_squares(grad, UNSCALE) for grad in grads])
    return float(multiplier_rule(float(np.sqrt(total)), UNSCALE, MAX_NORM))


def _exact_multiplier(grads: list[Array]) -> float:
    """The same without the rules, in fp64."""
    flat = np.concatenate([grad.astype(np.float64) * UNSCALE for grad in grads])
    return UNSCALE * min(MAX_NORM / (float(np.linalg.norm(flat)) + 1e-6), 1.0)


def _numpy(tensor: torch.Tensor) -> Array:
    """A copy of the stored values; bf16 as its bit patterns."""
    tensor = tensor.detach().cpu().clone()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    found: Array = tensor.numpy()
    return found
