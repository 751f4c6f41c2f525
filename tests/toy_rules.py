# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RET504 - a stage returns the names that it assigned
"""Rules of several stages, compiled by the tests into a module of their own.

A shipped rule stands beside them: two modules may know one, and test_isa.py looks at its object.
"""

from __future__ import annotations

from pyupdate.kernels.language import divide, rule, sqrt, where
from pyupdate.kernels.rules import adamw


def prepare_toy(step: float, lr: float, momentum: float) -> tuple[float, ...]:
    """Hypers of both toys; the step count is in them, so that a wrong one shows."""
    rate = lr * divide(step, step + 1.0)
    return rate, momentum


# ----- two stages: layer-wise scaling in the manner of LARS
#         b <- mu b + g      p <- p - rate |p| / |b| b, with the norms over the tensor


def toy_moved(
    param: float, grad: float, momentum_buffer: float, momentum: float
) -> tuple[float, ...]:
    """Write the buffer and leave two sums."""
    momentum_buffer = momentum_buffer * momentum + grad
    moved = momentum_buffer * momentum_buffer
    kept = param * param
    return momentum_buffer, moved, kept


@rule(state={"momentum_buffer": 0.0}, prepare=prepare_toy, after=(toy_moved,))
def toy_two(param: float, momentum_buffer: float, moved: float, kept: float, rate: float) -> float:
    """Read both sums."""
    trust = where(moved > 0.0, divide(sqrt(kept), sqrt(moved)), rate)
    param = param - rate * trust * momentum_buffer
    return param


# ----- three stages: a sum of the second that needs the sum of the first, and a state that does not
#       start at zero. Nothing but a test of the order.


def toy_mean(param: float, grad: float, slow: float, rate: float) -> tuple[float, ...]:
    """Write one state and leave a sum."""
    slow = slow + (param - slow) * rate
    total = grad + slow
    return slow, total


def toy_spread(grad: float, total: float, spread: float) -> tuple[float, ...]:
    """Read the first sum, write the other state, leave the second sum."""
    distance = grad - total
    spread = spread * 0.5 + distance * distance
    squares = distance * distance
    return spread, squares


@rule(state={"slow": 0.25, "spread": 0.0}, prepare=prepare_toy, after=(toy_mean, toy_spread))
def toy_three(
    param: float, grad: float, slow: float, spread: float, total: float, squares: float, rate: float
) -> float:
    """Read the sums of both earlier stages."""
    scale = divide(grad, sqrt(spread) + sqrt(squares) + 1.0)
    param = param - rate * scale * (total - slow)
    return param


TOYS = {entry.name: entry for entry in (toy_two, toy_three)}
RULES = {adamw.name: adamw, **TOYS}
