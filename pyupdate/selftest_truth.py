# SPDX-License-Identifier: Apache-2.0
"""What the self-test steps from, and what it holds the outcome against; without a framework."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .kernels import oracle
from .kernels.language import Rule
from .kernels.rules import multiplier as multiplier_rule

Array = np.ndarray[Any, Any]

PARAM_BOUND = 8.0
"""Largest error of a parameter against fp64, in eps x max(|param|, lr, largest move)."""
STATE_BOUND = 4.0
"""Largest error of state against fp64, in eps x max(|state|, |grad|, grad^2, largest move)."""
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
        bits: whether the fp32 oracle's bits were met; None where they are not promised.
        worst: the largest error against fp64 as a part of its bound.
        reason: why it was left out, or what was raised.
    """

    backend: str
    rule: str
    passed: bool | None
    bits: bool | None = False
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
        said = {True: "bits equal, ", False: "BITS DIFFER, ", None: ""}[self.bits]
        return f"{head} {verdict:<6} {said}{self.worst:.2f} of the bound"

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Stored:
    """Copies of a row as numpy has them; bf16 as its bit patterns."""

    param: Array
    grad: Array
    state: dict[str, Array]

    def in_fp64(self) -> Stored:
        """The same values in fp64."""
        state = {key: oracle.load(value).astype(np.float64) for key, value in self.state.items()}
        param, grad = (oracle.load(value).astype(np.float64) for value in (self.param, self.grad))
        return Stored(param, grad, state)

    def stepped(self, rule: Rule, numbers: list[float], multiplier: float) -> Stored:
        """What the oracle makes of it, in the precision that it is in."""
        param, state = oracle.step(
            rule,
            self.param,
            self.grad,
            self.state,
            numbers,
            count=COUNT,
            multiplier=multiplier,
        )
        return Stored(param, self.grad, state)


def same(found: Stored, known: Stored, before: Stored) -> bool:
    """Whether the bits are those that are known, and the gradient's what they were."""
    return (
        found.param.tobytes() == known.param.tobytes()
        and found.grad.tobytes() == before.grad.tobytes()
        and all(found.state[key].tobytes() == known.state[key].tobytes() for key in known.state)
    )


def part(found: Stored, true: Stored, before: Stored, grad: Array) -> float:
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


def multiplier(grads: list[Array]) -> float:
    """Unscale x clip, in the reduction order of the back ends."""
    from .kernels.reduction import halving_tree

    total = halving_tree([oracle.sum_of_squares(grad, UNSCALE) for grad in grads])
    return float(multiplier_rule(float(np.sqrt(total)), UNSCALE, MAX_NORM))


def exact_multiplier(grads: list[Array]) -> float:
    """The same without the rules, in fp64."""
    flat = np.concatenate([grad.astype(np.float64) * UNSCALE for grad in grads])
    return UNSCALE * min(MAX_NORM / (float(np.linalg.norm(flat)) + 1e-6), 1.0)
