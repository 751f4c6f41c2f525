# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RET504 - a stage returns the names that it assigned
"""Rules of several stages, compiled by the tests into a module of their own.

A shipped rule stands beside them: two modules may know one, and test_isa.py looks at its object.
"""

from __future__ import annotations

from pyupdate.kernels.language import divide, maximum, rule, sqrt, where
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


# ----- what happens once a tensor: a scalar that prepare advances, one that a turn advances, a
#       value that the next stage reads; state that begins as the parameter or as a group's number


def prepare_turned(step: float, lr: float, momentum: float, product: float) -> tuple[float, ...]:
    """A running product, as NAdam keeps one."""
    rate = lr * (1.5 - product)
    product = product * divide(step, step + momentum)
    return rate, momentum, product


def toy_squares(param: float, grad: float, start: float) -> tuple[float, ...]:
    """Leave a sum and write a state."""
    start = start + (param - start) * 0.25
    squares = grad * grad
    return start, squares


def toy_turn(squares: float, numel: float, level: float, momentum: float) -> tuple[float, ...]:
    """Advance the level and leave how much of the gradient is taken."""
    level = level + (divide(squares, maximum(numel, 1.0)) - level) * momentum
    taken = divide(1.0, sqrt(level) + 0.5)
    return level, taken


@rule(
    state={"start": "param", "slow": "lr"},
    scalars={"level": "momentum", "product": 1.0},
    prepare=prepare_turned,
    after=((toy_squares, toy_turn),),
)
def toy_turned(
    param: float, grad: float, start: float, slow: float, taken: float, rate: float
) -> tuple[float, ...]:
    """Read the value of the turn."""
    slow = slow + (grad - slow) * taken
    param = param - rate * slow * taken + rate * (start - param)
    return param, slow


TOYS = {entry.name: entry for entry in (toy_two, toy_three, toy_turned)}
RULES = {adamw.name: adamw, **TOYS}
