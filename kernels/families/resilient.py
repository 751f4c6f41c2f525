# SPDX-License-Identifier: Apache-2.0
"""Rprop: Riedmiller and Braun 1993, "A direct adaptive method for faster backpropagation learning".

A step size an element, which grows while the gradient keeps its sign and shrinks where it turns;
the element rests on the step on which it turned.

    s <- clamp(s eta+ or s eta- or s)      g <- 0 where it turned      p <- p - sign(g) s
"""

from __future__ import annotations

from ..language import rule, where


def prepare_rprop(
    step: float, lr: float, eta1: float, eta2: float, step_size1: float, step_size2: float
) -> tuple[float, ...]:
    """Hypers of Rprop: torch's ``etas`` and ``step_sizes``; lr is where step sizes begin."""
    etaminus = eta1
    etaplus = eta2
    step_size_min = step_size1
    step_size_max = step_size2
    return etaminus, etaplus, step_size_min, step_size_max


@rule(state={"prev": 0.0, "step_size": "lr"}, prepare=prepare_rprop)
def rprop(
    param: float,
    grad: float,
    prev: float,
    step_size: float,
    etaminus: float,
    etaplus: float,
    step_size_min: float,
    step_size_max: float,
) -> tuple[float, ...]:
    """Rprop; where the gradient is nan the element rests, as in torch, whose sign(nan) is 0."""
    agreement = grad * prev
    factor = where(agreement > 0.0, etaplus, where(agreement < 0.0, etaminus, 1.0))
    step_size = step_size * factor
    step_size = where(step_size < step_size_min, step_size_min, step_size)
    step_size = where(step_size > step_size_max, step_size_max, step_size)
    prev = where(agreement < 0.0, 0.0, grad)
    move = where(prev > 0.0, step_size, where(prev < 0.0, 0.0 - step_size, 0.0))
    param = param - move
    return param, prev, step_size
