# SPDX-License-Identifier: Apache-2.0
"""Adam's relatives that torch has: Adamax and RAdam.

Adamax: Kingma and Ba 2015, arXiv:1412.6980, section 7.1; eps joins the gradient, as in torch:

    g <- g + wd p      m <- m + (g - m)(1 - b1)      u <- max(b2 u, |g| + eps)
    p <- p - lr/(1 - b1^t) m / u

RAdam: Liu et al. 2020, arXiv:1908.03265. rho is the length of the average that v amounts to:

    rho_inf = 2/(1 - b2) - 1      rho = rho_inf - 2 t b2^t / (1 - b2^t)
    r = sqrt((rho - 4)(rho - 2) rho_inf / ((rho_inf - 4)(rho_inf - 2) rho))
    p <- p - lr/(1 - b1^t) m r sqrt(1 - b2^t) / (sqrt(v) + eps)  where rho > 5, else
    p <- p - lr/(1 - b1^t) m
"""

from __future__ import annotations

from ..language import absolute, divide, maximum, rule, sqrt, where
from ..scalar import integer_power
from .adam import adam_moments
from .decay import coupled_decay


def prepare_adamax(
    step: float, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> tuple[float, ...]:
    """Hypers of Adamax; its second average is a maximum, which has no bias."""
    one_minus_beta1 = 1.0 - beta1
    step_size = divide(lr, 1.0 - integer_power(beta1, step))
    return weight_decay, one_minus_beta1, beta2, step_size, eps


@rule(state={"exp_avg": 0.0, "exp_inf": 0.0}, prepare=prepare_adamax)
def adamax(
    param: float,
    grad: float,
    exp_avg: float,
    exp_inf: float,
    weight_decay: float,
    one_minus_beta1: float,
    beta2: float,
    step_size: float,
    eps: float,
) -> tuple[float, ...]:
    """Adam with the largest of the decaying gradients in the place of their root mean square."""
    grad = coupled_decay(param, grad, weight_decay)
    exp_avg = exp_avg + (grad - exp_avg) * one_minus_beta1
    exp_inf = maximum(exp_inf * beta2, absolute(grad) + eps)
    param = param - step_size * divide(exp_avg, exp_inf)
    return param, exp_avg, exp_inf


def prepare_radam(
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: float,
) -> tuple[float, ...]:
    """Hypers of RAdam; `rectified` is 1 where the second average says enough.

    rho in torch's order of operations: it is a small difference of large numbers, so that another
    order would give other digits of it.
    """
    decay = where(decoupled_weight_decay != 0.0, 1.0 - lr * weight_decay, 1.0)
    coupled = where(decoupled_weight_decay != 0.0, 0.0, weight_decay)
    one_minus_beta1 = 1.0 - beta1
    one_minus_beta2 = 1.0 - beta2
    power2 = integer_power(beta2, step)
    bias2 = 1.0 - power2
    rho_inf = divide(2.0, one_minus_beta2) - 1.0
    rho = rho_inf - divide(2.0 * step * power2, bias2)
    squared = divide((rho - 4.0) * (rho - 2.0) * rho_inf, (rho_inf - 4.0) * (rho_inf - 2.0) * rho)
    rectified = where(rho > 5.0, 1.0, 0.0)
    factor = where(rho > 5.0, sqrt(bias2) * sqrt(squared), 1.0)
    step_size = divide(lr, 1.0 - integer_power(beta1, step)) * factor
    return (
        decay,
        coupled,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        rectified,
        step_size,
        eps,
    )


@rule(state={"exp_avg": 0.0, "exp_avg_sq": 0.0}, prepare=prepare_radam)
def radam(
    param: float,
    grad: float,
    exp_avg: float,
    exp_avg_sq: float,
    decay: float,
    coupled: float,
    one_minus_beta1: float,
    beta2: float,
    one_minus_beta2: float,
    rectified: float,
    step_size: float,
    eps: float,
) -> tuple[float, ...]:
    """Adam that moves by its first moment alone until the second says enough."""
    grad = coupled_decay(param, grad, coupled)
    param = param * decay
    exp_avg, exp_avg_sq = adam_moments(
        grad, exp_avg, exp_avg_sq, one_minus_beta1, beta2, one_minus_beta2
    )
    divisor = where(rectified != 0.0, sqrt(exp_avg_sq) + eps, 1.0)
    param = param - step_size * divide(exp_avg, divisor)
    return param, exp_avg, exp_avg_sq
