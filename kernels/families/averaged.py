# SPDX-License-Identifier: Apache-2.0
"""Rules that train one point and keep the average of its path.

ASGD: Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging"; rates and
decay as in torch, whose ``eta`` and ``mu`` were made at the end of the step before.
ScheduleFree AdamW: Defazio et al. 2024, arXiv:2405.15682; the parameter holds the paper's y, in
which gradients are taken, ``z`` is the point that moves, and x, the average, lies behind y as seen
from z.

    ASGD          p <- (1 - lambda eta) p - eta g      ax <- ax + mu (p - ax)
                  eta <- lr / (1 + lambda lr t)^alpha      mu <- 1 / max(1, t - t0)
    ScheduleFree  c = w / (w_1 + ... + w_t), w = t^r lr_max^k
                  d = g / (sqrt(v / bias2) + eps) + wd y
                  y <- y + c (z - y) - lr (1 - b1 (1 - c)) d      z <- z - lr d
"""

from __future__ import annotations

from ..language import divide, maximum, rule, sqrt, where
from ..scalar import integer_power, power
from .decay import coupled_decay


def prepare_asgd(
    step: float,
    lr: float,
    lambd: float,
    alpha: float,
    t0: float,
    weight_decay: float,
    eta: float,
    mu: float,
) -> tuple[float, ...]:
    """Hypers of ASGD: the rates that the last step has left."""
    decay = 1.0 - lambd * eta
    rate = eta
    weight = mu
    eta = divide(lr, power(1.0 + lambd * lr * step, alpha))
    mu = divide(1.0, maximum(1.0, step - t0))
    return weight_decay, decay, rate, weight, eta, mu


@rule(state={"ax": 0.0}, scalars={"eta": "lr", "mu": 1.0}, prepare=prepare_asgd)
def asgd(
    param: float,
    grad: float,
    ax: float,
    weight_decay: float,
    decay: float,
    rate: float,
    weight: float,
) -> tuple[float, ...]:
    """Averaged SGD; until t0 the average is the parameter."""
    grad = coupled_decay(param, grad, weight_decay)
    param = param * decay - rate * grad
    ax = where(weight == 1.0, param, ax + (param - ax) * weight)
    return param, ax


def prepare_schedulefree(
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    r: float,
    weight_lr_power: float,
    warmup_steps: float,
    weight_sum: float,
    lr_max: float,
) -> tuple[float, ...]:
    """Hypers of ScheduleFree AdamW; the learning rate rises linearly through the warm-up."""
    warm = divide(step, maximum(warmup_steps, 1.0))
    rate = lr * where(step < warmup_steps, warm, 1.0)
    lr_max = maximum(rate, lr_max)
    weight = power(step, r) * power(lr_max, weight_lr_power)
    weight_sum = weight_sum + weight
    share = where(weight_sum == 0.0, 0.0, divide(weight, weight_sum))
    one_minus_beta2 = 1.0 - beta2
    inv_sqrt_bias2 = divide(1.0, sqrt(1.0 - integer_power(beta2, step)))
    rate_of_y = rate * (1.0 - beta1 * (1.0 - share))
    return (
        rate,
        rate_of_y,
        share,
        beta2,
        one_minus_beta2,
        inv_sqrt_bias2,
        eps,
        weight_decay,
        weight_sum,
        lr_max,
    )


@rule(
    state={"z": "param", "exp_avg_sq": 0.0},
    scalars={"weight_sum": 0.0, "lr_max": 0.0},
    prepare=prepare_schedulefree,
)
def schedulefree_adamw(
    param: float,
    grad: float,
    z: float,
    exp_avg_sq: float,
    rate: float,
    rate_of_y: float,
    share: float,
    beta2: float,
    one_minus_beta2: float,
    inv_sqrt_bias2: float,
    eps: float,
    weight_decay: float,
) -> tuple[float, ...]:
    """One step of y and z; the decay is taken at y, as the authors do."""
    exp_avg_sq = exp_avg_sq * beta2 + grad * grad * one_minus_beta2
    direction = divide(grad, sqrt(exp_avg_sq) * inv_sqrt_bias2 + eps)
    direction = coupled_decay(param, direction, weight_decay)
    param = param + (z - param) * share
    param = param - rate_of_y * direction
    z = z - rate * direction
    return param, z, exp_avg_sq
