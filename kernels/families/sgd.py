# SPDX-License-Identifier: Apache-2.0
"""SGD with momentum: Sutskever et al. 2013, "On the importance of initialization and momentum".

    g <- g + wd p      b <- mu b + (1 - tau) g      p <- p - lr (g + mu b, or b)

Dampening tau and the first step (the buffer becomes the gradient) are as in torch.
"""

from __future__ import annotations

from ..language import rule, where
from .decay import coupled_decay


def prepare_sgd(
    step: float,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: float,
) -> tuple[float, ...]:
    """Hypers of SGD; `first` is 1 on the step that makes the momentum buffer."""
    one_minus_dampening = 1.0 - dampening
    first = where(step > 1.0, 0.0, 1.0)
    return lr, momentum, one_minus_dampening, weight_decay, nesterov, first


@rule(state={}, prepare=prepare_sgd)
def sgd(param: float, grad: float, weight_decay: float, lr: float) -> float:
    """SGD without momentum, which keeps no state."""
    grad = coupled_decay(param, grad, weight_decay)
    param = param - lr * grad
    return param


@rule(state={"momentum_buffer": 0.0}, prepare=prepare_sgd)
def sgd_momentum(
    param: float,
    grad: float,
    momentum_buffer: float,
    weight_decay: float,
    momentum: float,
    one_minus_dampening: float,
    nesterov: float,
    first: float,
    lr: float,
) -> tuple[float, ...]:
    """SGD with momentum, Nesterov's or Polyak's."""
    grad = coupled_decay(param, grad, weight_decay)
    mixed = momentum_buffer * momentum + grad * one_minus_dampening
    momentum_buffer = where(first != 0.0, grad, mixed)
    direction = where(nesterov != 0.0, grad + momentum_buffer * momentum, momentum_buffer)
    param = param - lr * direction
    return param, momentum_buffer
