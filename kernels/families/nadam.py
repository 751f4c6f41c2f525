# SPDX-License-Identifier: Apache-2.0
"""NAdam: Dozat 2016, "Incorporating Nesterov momentum into Adam".

The momentum schedule is torch's, whose ``mu_product`` is the product of all momenta so far:

    mu_t = b1 (1 - 0.96^(t psi) / 2)      M_t = mu_1 ... mu_t
    p <- p - lr ((1 - mu_t)/(1 - M_t) g + mu_(t+1)/(1 - M_(t+1)) m) / (sqrt(v / (1 - b2^t)) + eps)
"""

from __future__ import annotations

from ..language import divide, rule, sqrt
from ..scalar import integer_power, power
from .adam import adam_moments
from .decay import coupled_decay


def scheduled_momentum(beta1: float, exponent: float) -> float:
    """b1 (1 - 0.96^exponent / 2)."""
    return beta1 * (1.0 - 0.5 * power(divide(96.0, 100.0), exponent))


def prepare_nadam(
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    momentum_decay: float,
    decoupled_weight_decay: float,
    mu_product: float,
) -> tuple[float, ...]:
    """Hypers of NAdam; one of the two decays is off: its factor is 1, or its addend 0."""
    coupled = weight_decay * (1.0 - decoupled_weight_decay)
    decay = 1.0 - lr * weight_decay * decoupled_weight_decay
    one_minus_beta1 = 1.0 - beta1
    one_minus_beta2 = 1.0 - beta2
    inv_sqrt_bias2 = divide(1.0, sqrt(1.0 - integer_power(beta2, step)))
    mu = scheduled_momentum(beta1, step * momentum_decay)
    mu_next = scheduled_momentum(beta1, (step + 1.0) * momentum_decay)
    mu_product = mu_product * mu
    grad_rate = divide(lr * (1.0 - mu), 1.0 - mu_product)
    avg_rate = divide(lr * mu_next, 1.0 - mu_product * mu_next)
    return (
        decay,
        coupled,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        inv_sqrt_bias2,
        eps,
        grad_rate,
        avg_rate,
        mu_product,
    )


@rule(
    state={"exp_avg": 0.0, "exp_avg_sq": 0.0},
    scalars={"mu_product": 1.0},
    prepare=prepare_nadam,
)
def nadam(
    param: float,
    grad: float,
    exp_avg: float,
    exp_avg_sq: float,
    decay: float,
    coupled: float,
    one_minus_beta1: float,
    beta2: float,
    one_minus_beta2: float,
    inv_sqrt_bias2: float,
    eps: float,
    grad_rate: float,
    avg_rate: float,
) -> tuple[float, ...]:
    """NAdam with coupled or decoupled decay."""
    grad = coupled_decay(param, grad, coupled)
    param = param * decay
    exp_avg, exp_avg_sq = adam_moments(
        grad, exp_avg, exp_avg_sq, one_minus_beta1, beta2, one_minus_beta2
    )
    move = grad * grad_rate + exp_avg * avg_rate
    param = param - divide(move, sqrt(exp_avg_sq) * inv_sqrt_bias2 + eps)
    return param, exp_avg, exp_avg_sq
