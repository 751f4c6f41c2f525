# SPDX-License-Identifier: Apache-2.0
"""RMSprop: Hinton 2012, lecture 6e of "Neural Networks for Machine Learning"; as torch has it.

g <- g + wd p      v <- a v + (1 - a) g^2
d = sqrt(v) + eps, or centered (Graves 2013, arXiv:1308.0850), with m <- m + (g - m)(1 - a),
    sqrt(v - m^2) + eps
p <- p - lr g / d, or with momentum b <- mu b + g / d, p <- p - lr b
"""

from __future__ import annotations

from ..language import divide, rule, sqrt
from .decay import coupled_decay


def prepare_rmsprop(
    step: float, lr: float, alpha: float, eps: float, weight_decay: float, momentum: float
) -> tuple[float, ...]:
    """Hypers of all four; no bias is corrected, so the step does not count."""
    one_minus_alpha = 1.0 - alpha
    return lr, alpha, one_minus_alpha, eps, weight_decay, momentum


def centered_root(square_avg: float, grad_avg: float) -> float:
    """The root of the variance of the gradients."""
    return sqrt(square_avg - grad_avg * grad_avg)


@rule(state={"square_avg": 0.0}, prepare=prepare_rmsprop)
def rmsprop(
    param: float,
    grad: float,
    square_avg: float,
    weight_decay: float,
    alpha: float,
    one_minus_alpha: float,
    eps: float,
    lr: float,
) -> tuple[float, ...]:
    """RMSprop."""
    grad = coupled_decay(param, grad, weight_decay)
    square_avg = square_avg * alpha + grad * grad * one_minus_alpha
    param = param - lr * divide(grad, sqrt(square_avg) + eps)
    return param, square_avg


@rule(state={"square_avg": 0.0, "momentum_buffer": 0.0}, prepare=prepare_rmsprop)
def rmsprop_momentum(
    param: float,
    grad: float,
    square_avg: float,
    momentum_buffer: float,
    weight_decay: float,
    alpha: float,
    one_minus_alpha: float,
    eps: float,
    momentum: float,
    lr: float,
) -> tuple[float, ...]:
    """RMSprop with momentum on what is divided already."""
    grad = coupled_decay(param, grad, weight_decay)
    square_avg = square_avg * alpha + grad * grad * one_minus_alpha
    momentum_buffer = momentum_buffer * momentum + divide(grad, sqrt(square_avg) + eps)
    param = param - lr * momentum_buffer
    return param, square_avg, momentum_buffer


@rule(state={"square_avg": 0.0, "grad_avg": 0.0}, prepare=prepare_rmsprop)
def rmsprop_centered(
    param: float,
    grad: float,
    square_avg: float,
    grad_avg: float,
    weight_decay: float,
    alpha: float,
    one_minus_alpha: float,
    eps: float,
    lr: float,
) -> tuple[float, ...]:
    """RMSprop, divided by the root of the variance."""
    grad = coupled_decay(param, grad, weight_decay)
    square_avg = square_avg * alpha + grad * grad * one_minus_alpha
    grad_avg = grad_avg + (grad - grad_avg) * one_minus_alpha
    param = param - lr * divide(grad, centered_root(square_avg, grad_avg) + eps)
    return param, square_avg, grad_avg


@rule(state={"square_avg": 0.0, "momentum_buffer": 0.0, "grad_avg": 0.0}, prepare=prepare_rmsprop)
def rmsprop_centered_momentum(
    param: float,
    grad: float,
    square_avg: float,
    momentum_buffer: float,
    grad_avg: float,
    weight_decay: float,
    alpha: float,
    one_minus_alpha: float,
    eps: float,
    momentum: float,
    lr: float,
) -> tuple[float, ...]:
    """RMSprop with both."""
    grad = coupled_decay(param, grad, weight_decay)
    square_avg = square_avg * alpha + grad * grad * one_minus_alpha
    grad_avg = grad_avg + (grad - grad_avg) * one_minus_alpha
    direction = divide(grad, centered_root(square_avg, grad_avg) + eps)
    momentum_buffer = momentum_buffer * momentum + direction
    param = param - lr * momentum_buffer
    return param, square_avg, momentum_buffer, grad_avg
