# SPDX-License-Identifier: Apache-2.0
"""Adam: Kingma and Ba 2015, arXiv:1412.6980; AMSGrad: Reddi et al. 2018, arXiv:1904.09237.

AdamW, the decoupled decay: Loshchilov and Hutter 2019, arXiv:1711.05101.

    m <- m + (g - m)(1 - b1)      v <- b2 v + (1 - b2) g^2
    p <- p - lr/(1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)
"""

from __future__ import annotations

from ..language import divide, maximum, rule, sqrt
from ..scalar import integer_power
from .decay import coupled_decay


def prepare_adam(
    step: float, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> tuple[float, ...]:
    """Hypers of the Adam family; the bias corrections are done here, once a step, in fp64."""
    decay = 1.0 - lr * weight_decay
    one_minus_beta1 = 1.0 - beta1
    one_minus_beta2 = 1.0 - beta2
    step_size = divide(lr, 1.0 - integer_power(beta1, step))
    inv_sqrt_bias2 = divide(1.0, sqrt(1.0 - integer_power(beta2, step)))
    return (
        decay,
        weight_decay,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        step_size,
        inv_sqrt_bias2,
        eps,
    )


def adam_moments(
    grad: float,
    exp_avg: float,
    exp_avg_sq: float,
    one_minus_beta1: float,
    beta2: float,
    one_minus_beta2: float,
) -> tuple[float, ...]:
    """Both moving averages."""
    exp_avg = exp_avg + (grad - exp_avg) * one_minus_beta1
    exp_avg_sq = exp_avg_sq * beta2 + grad * grad * one_minus_beta2
    return exp_avg, exp_avg_sq


def adam_move(
    param: float,
    exp_avg: float,
    second_moment: float,
    step_size: float,
    inv_sqrt_bias2: float,
    eps: float,
) -> float:
    """The parameter after the bias-corrected move."""
    return param - step_size * divide(exp_avg, sqrt(second_moment) * inv_sqrt_bias2 + eps)


@rule(state={"exp_avg": 0.0, "exp_avg_sq": 0.0}, prepare=prepare_adam)
def adam(
    param: float,
    grad: float,
    exp_avg: float,
    exp_avg_sq: float,
    weight_decay: float,
    one_minus_beta1: float,
    beta2: float,
    one_minus_beta2: float,
    step_size: float,
    inv_sqrt_bias2: float,
    eps: float,
) -> tuple[float, ...]:
    """Adam with coupled decay."""
    grad = coupled_decay(param, grad, weight_decay)
    exp_avg, exp_avg_sq = adam_moments(
        grad, exp_avg, exp_avg_sq, one_minus_beta1, beta2, one_minus_beta2
    )
    param = adam_move(param, exp_avg, exp_avg_sq, step_size, inv_sqrt_bias2, eps)
    return param, exp_avg, exp_avg_sq


@rule(state={"exp_avg": 0.0, "exp_avg_sq": 0.0, "max_exp_avg_sq": 0.0}, prepare=prepare_adam)
def adam_amsgrad(
    param: float,
    grad: float,
    exp_avg: float,
    exp_avg_sq: float,
    max_exp_avg_sq: float,
    weight_decay: float,
    one_minus_beta1: float,
    beta2: float,
    one_minus_beta2: float,
    step_size: float,
    inv_sqrt_bias2: float,
    eps: float,
) -> tuple[float, ...]:
    """Adam with coupled decay and the running maximum of the second moment."""
    grad = coupled_decay(param, grad, weight_decay)
    exp_avg, exp_avg_sq = adam_moments(
        grad, exp_avg, exp_avg_sq, one_minus_beta1, beta2, one_minus_beta2
    )
    max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)
    param = adam_move(param, exp_avg, max_exp_avg_sq, step_size, inv_sqrt_bias2, eps)
    return param, exp_avg, exp_avg_sq, max_exp_avg_sq


@rule(state={"exp_avg": 0.0, "exp_avg_sq": 0.0}, prepare=prepare_adam)
def adamw(
    param: float,
    grad: float,
    exp_avg: float,
    exp_avg_sq: float,
    decay: float,
    one_minus_beta1: float,
    beta2: float,
    one_minus_beta2: float,
    step_size: float,
    inv_sqrt_bias2: float,
    eps: float,
) -> tuple[float, ...]:
    """Adam with decoupled decay."""
    param = param * decay
    exp_avg, exp_avg_sq = adam_moments(
        grad, exp_avg, exp_avg_sq, one_minus_beta1, beta2, one_minus_beta2
    )
    param = adam_move(param, exp_avg, exp_avg_sq, step_size, inv_sqrt_bias2, eps)
    return param, exp_avg, exp_avg_sq


@rule(state={"exp_avg": 0.0, "exp_avg_sq": 0.0, "max_exp_avg_sq": 0.0}, prepare=prepare_adam)
def adamw_amsgrad(
    param: float,
    grad: float,
    exp_avg: float,
    exp_avg_sq: float,
    max_exp_avg_sq: float,
    decay: float,
    one_minus_beta1: float,
    beta2: float,
    one_minus_beta2: float,
    step_size: float,
    inv_sqrt_bias2: float,
    eps: float,
) -> tuple[float, ...]:
    """Adam with decoupled decay and the running maximum of the second moment."""
    param = param * decay
    exp_avg, exp_avg_sq = adam_moments(
        grad, exp_avg, exp_avg_sq, one_minus_beta1, beta2, one_minus_beta2
    )
    max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)
    param = adam_move(param, exp_avg, max_exp_avg_sq, step_size, inv_sqrt_bias2, eps)
    return param, exp_avg, exp_avg_sq, max_exp_avg_sq
