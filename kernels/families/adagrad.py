# SPDX-License-Identifier: Apache-2.0
"""Adagrad: Duchi, Hazan and Singer 2011, JMLR 12; Adadelta: Zeiler 2012, arXiv:1212.5701.

Adagrad, with torch's decay of the learning rate (t counts from 1):

    g <- g + wd p      s <- s + g^2      p <- p - lr / (1 + (t - 1) lr_decay) g / (sqrt(s) + eps)

Adadelta:

    g <- g + wd p      v <- rho v + (1 - rho) g^2      d = sqrt(u + eps) / sqrt(v + eps) g
    u <- rho u + (1 - rho) d^2      p <- p - lr d
"""

from __future__ import annotations

from ..language import divide, rule, sqrt
from .decay import coupled_decay


def prepare_adagrad(
    step: float,
    lr: float,
    lr_decay: float,
    weight_decay: float,
    eps: float,
    initial_accumulator_value: float,
) -> tuple[float, ...]:
    """Hypers of Adagrad."""
    decayed_lr = divide(lr, 1.0 + (step - 1.0) * lr_decay)
    return decayed_lr, weight_decay, eps


@rule(state={"sum": "initial_accumulator_value"}, prepare=prepare_adagrad)
def adagrad(
    param: float, grad: float, sum: float, weight_decay: float, decayed_lr: float, eps: float
) -> tuple[float, ...]:
    """Adagrad; ``sum`` is torch's name of the sum of squares."""
    grad = coupled_decay(param, grad, weight_decay)
    sum = sum + grad * grad
    param = param - decayed_lr * divide(grad, sqrt(sum) + eps)
    return param, sum


def prepare_adadelta(
    step: float, lr: float, rho: float, eps: float, weight_decay: float
) -> tuple[float, ...]:
    """Hypers of Adadelta."""
    one_minus_rho = 1.0 - rho
    return lr, rho, one_minus_rho, eps, weight_decay


@rule(state={"square_avg": 0.0, "acc_delta": 0.0}, prepare=prepare_adadelta)
def adadelta(
    param: float,
    grad: float,
    square_avg: float,
    acc_delta: float,
    weight_decay: float,
    rho: float,
    one_minus_rho: float,
    eps: float,
    lr: float,
) -> tuple[float, ...]:
    """Adadelta."""
    grad = coupled_decay(param, grad, weight_decay)
    square_avg = square_avg * rho + grad * grad * one_minus_rho
    delta = divide(sqrt(acc_delta + eps), sqrt(square_avg + eps)) * grad
    acc_delta = acc_delta * rho + delta * delta * one_minus_rho
    param = param - lr * delta
    return param, square_avg, acc_delta
