# SPDX-License-Identifier: Apache-2.0
"""Rules that look at a whole tensor: its norm, or that of its gradient, sets the tensor's step.

LARS: You, Gitman and Ginsburg 2017, arXiv:1708.03888. LAMB: You et al. 2020, arXiv:1904.00962,
algorithm 2. NovoGrad: Ginsburg et al. 2019, arXiv:1905.11286. StableAdamW: Wortsman et al. 2023,
arXiv:2304.13013, algorithm 2.

    LARS         g <- c |p| / (|g| + wd |p|) (g + wd p)      b <- mu b + (1 - tau) g
                 p <- p - lr b
    LAMB         u = m / bias1 / (sqrt(v) / sqrt(bias2) + eps) + wd p      p <- p - lr |p| / |u| u
    NovoGrad     v <- b2 v + (1 - b2) |g|^2      m <- b1 m + g / (sqrt(v) + eps) + wd p
                 p <- p - lr m
    StableAdamW  r = lr / max(1, sqrt(mean(g^2 / max(v, eps^2))))
                 p <- p - r wd p - r m / (sqrt(v) + eps)

The first stage leaves sums over the tensor, the turn makes the tensor's rate of them, the last
stage moves: three passes with the reduce pass, whatever the number of tensors.
"""

from __future__ import annotations

from ..language import divide, maximum, minimum, rule, sqrt, where
from ..scalar import integer_power

# ----- LARS --------------------------------------------------------------------------------------


def prepare_lars(
    step: float,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: float,
    trust_coefficient: float,
    adapt: float,
) -> tuple[float, ...]:
    """Hypers of LARS; the first step dampens too, unlike SGD's (the buffer begins at zero)."""
    one_minus_dampening = 1.0 - dampening
    return (
        lr,
        momentum,
        one_minus_dampening,
        weight_decay,
        nesterov,
        trust_coefficient,
        adapt,
    )


def lars_norms(param: float, grad: float) -> tuple[float, ...]:
    """The squares of both norms."""
    weight_squares = param * param
    grad_squares = grad * grad
    return weight_squares, grad_squares


def lars_trust(
    weight_squares: float,
    grad_squares: float,
    weight_decay: float,
    trust_coefficient: float,
    adapt: float,
) -> float:
    """How much of the decayed gradient is taken; all of it where a norm is zero."""
    weight_norm = sqrt(weight_squares)
    whole = sqrt(grad_squares) + weight_decay * weight_norm
    ratio = divide(trust_coefficient * weight_norm, whole)
    some = where(whole == 0.0, 1.0, where(weight_norm == 0.0, 1.0, ratio))
    trust = where(adapt == 0.0, 1.0, some)
    return trust


@rule(state={}, prepare=prepare_lars, after=((lars_norms, lars_trust),))
def lars(param: float, grad: float, trust: float, weight_decay: float, lr: float) -> float:
    """LARS without momentum, which keeps no state."""
    grad = where(weight_decay != 0.0, grad + param * weight_decay, grad) * trust
    param = param - lr * grad
    return param


@rule(state={"momentum_buffer": 0.0}, prepare=prepare_lars, after=((lars_norms, lars_trust),))
def lars_momentum(
    param: float,
    grad: float,
    momentum_buffer: float,
    trust: float,
    weight_decay: float,
    momentum: float,
    one_minus_dampening: float,
    nesterov: float,
    lr: float,
) -> tuple[float, ...]:
    """LARS with momentum, Nesterov's or Polyak's."""
    grad = where(weight_decay != 0.0, grad + param * weight_decay, grad) * trust
    momentum_buffer = momentum_buffer * momentum + grad * one_minus_dampening
    direction = where(nesterov != 0.0, grad + momentum_buffer * momentum, momentum_buffer)
    param = param - lr * direction
    return param, momentum_buffer


# ----- LAMB --------------------------------------------------------------------------------------


def prepare_lamb(
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    bias_correction: float,
    max_weight_norm: float,
    adapt: float,
) -> tuple[float, ...]:
    """Hypers of LAMB; both corrections are 1 where there is to be none."""
    one_minus_beta1 = 1.0 - beta1
    one_minus_beta2 = 1.0 - beta2
    bias1 = where(bias_correction != 0.0, 1.0 - integer_power(beta1, step), 1.0)
    bias2 = where(bias_correction != 0.0, 1.0 - integer_power(beta2, step), 1.0)
    inv_bias1 = divide(1.0, bias1)
    inv_sqrt_bias2 = divide(1.0, sqrt(bias2))
    return (
        lr,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        inv_bias1,
        inv_sqrt_bias2,
        eps,
        weight_decay,
        max_weight_norm,
        adapt,
    )


def lamb_direction(
    param: float,
    exp_avg: float,
    exp_avg_sq: float,
    inv_bias1: float,
    inv_sqrt_bias2: float,
    eps: float,
    weight_decay: float,
) -> float:
    """Adam's direction with the decay in it, of which both stages need the same bits."""
    adam = divide(exp_avg * inv_bias1, sqrt(exp_avg_sq) * inv_sqrt_bias2 + eps)
    return where(weight_decay != 0.0, adam + param * weight_decay, adam)


def lamb_moments(
    param: float,
    grad: float,
    exp_avg: float,
    exp_avg_sq: float,
    one_minus_beta1: float,
    beta2: float,
    one_minus_beta2: float,
    inv_bias1: float,
    inv_sqrt_bias2: float,
    eps: float,
    weight_decay: float,
) -> tuple[float, ...]:
    """Both moving averages, and the squares of the weight's and the direction's norm."""
    exp_avg = exp_avg + (grad - exp_avg) * one_minus_beta1
    exp_avg_sq = exp_avg_sq * beta2 + grad * grad * one_minus_beta2
    direction = lamb_direction(
        param, exp_avg, exp_avg_sq, inv_bias1, inv_sqrt_bias2, eps, weight_decay
    )
    weight_squares = param * param
    direction_squares = direction * direction
    return exp_avg, exp_avg_sq, weight_squares, direction_squares


def lamb_rate(
    weight_squares: float,
    direction_squares: float,
    lr: float,
    max_weight_norm: float,
    adapt: float,
) -> float:
    """The tensor's learning rate: the group's where a norm is zero."""
    weight_norm = minimum(sqrt(weight_squares), max_weight_norm)
    direction_norm = sqrt(direction_squares)
    ratio = divide(weight_norm, direction_norm)
    some = where(weight_norm == 0.0, 1.0, where(direction_norm == 0.0, 1.0, ratio))
    rate = lr * where(adapt == 0.0, 1.0, some)
    return rate


@rule(
    state={"exp_avg": 0.0, "exp_avg_sq": 0.0},
    prepare=prepare_lamb,
    after=((lamb_moments, lamb_rate),),
)
def lamb(
    param: float,
    exp_avg: float,
    exp_avg_sq: float,
    rate: float,
    inv_bias1: float,
    inv_sqrt_bias2: float,
    eps: float,
    weight_decay: float,
) -> float:
    """The move along the direction that the first stage has measured."""
    direction = lamb_direction(
        param, exp_avg, exp_avg_sq, inv_bias1, inv_sqrt_bias2, eps, weight_decay
    )
    param = param - rate * direction
    return param


# ----- NovoGrad ----------------------------------------------------------------------------------


def prepare_novograd(
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_averaging: float,
) -> tuple[float, ...]:
    """Hypers of NovoGrad; the first step makes both averages of one gradient."""
    first = where(step > 1.0, 0.0, 1.0)
    one_minus_beta2 = 1.0 - beta2
    taken = where(grad_averaging != 0.0, 1.0 - beta1, 1.0)
    kept = where(first != 0.0, 0.0, beta1)
    mixed = where(first != 0.0, 1.0, taken)
    return lr, kept, mixed, beta2, one_minus_beta2, eps, weight_decay, first


def novograd_squares(grad: float) -> float:
    """The square of the gradient's norm."""
    grad_squares = grad * grad
    return grad_squares


def novograd_scale(
    grad_squares: float,
    second_moment: float,
    beta2: float,
    one_minus_beta2: float,
    eps: float,
    first: float,
) -> tuple[float, ...]:
    """The tensor's second moment, and what its gradient is multiplied by."""
    mixed_squares = second_moment * beta2 + grad_squares * one_minus_beta2
    second_moment = where(first != 0.0, grad_squares, mixed_squares)
    scale = divide(1.0, sqrt(second_moment) + eps)
    return second_moment, scale


@rule(
    state={"exp_avg": 0.0},
    scalars={"second_moment": 0.0},
    prepare=prepare_novograd,
    after=((novograd_squares, novograd_scale),),
)
def novograd(
    param: float,
    grad: float,
    exp_avg: float,
    scale: float,
    kept: float,
    mixed: float,
    weight_decay: float,
    lr: float,
) -> tuple[float, ...]:
    """The average of normalised, decayed gradients."""
    grad = grad * scale
    grad = where(weight_decay != 0.0, grad + param * weight_decay, grad)
    exp_avg = exp_avg * kept + grad * mixed
    param = param - lr * exp_avg
    return param, exp_avg


# ----- StableAdamW -------------------------------------------------------------------------------


def prepare_stable_adamw(
    step: float, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> tuple[float, ...]:
    """Hypers of StableAdamW, whose betas are corrected instead of its averages."""
    one_minus_beta1 = divide(1.0 - beta1, 1.0 - integer_power(beta1, step))
    one_minus_beta2 = divide(1.0 - beta2, 1.0 - integer_power(beta2, step))
    kept2 = 1.0 - one_minus_beta2
    eps_squared = eps * eps
    return lr, one_minus_beta1, kept2, one_minus_beta2, eps, eps_squared, weight_decay


def stable_moments(
    grad: float,
    exp_avg: float,
    exp_avg_sq: float,
    one_minus_beta1: float,
    kept2: float,
    one_minus_beta2: float,
    eps_squared: float,
) -> tuple[float, ...]:
    """Both moving averages, and how far the squared gradient exceeds its average."""
    exp_avg = exp_avg + (grad - exp_avg) * one_minus_beta1
    exp_avg_sq = exp_avg_sq * kept2 + grad * grad * one_minus_beta2
    excess = divide(grad * grad, maximum(exp_avg_sq, eps_squared))
    return exp_avg, exp_avg_sq, excess


def stable_rate(excess: float, numel: float, lr: float, weight_decay: float) -> tuple[float, ...]:
    """The tensor's learning rate, lower where its second moment lags behind its gradient."""
    rms = sqrt(divide(excess, maximum(numel, 1.0)))
    rate = divide(lr, maximum(rms, 1.0))
    decay = 1.0 - rate * weight_decay
    return rate, decay


@rule(
    state={"exp_avg": 0.0, "exp_avg_sq": 0.0},
    prepare=prepare_stable_adamw,
    after=((stable_moments, stable_rate),),
)
def stable_adamw(
    param: float, exp_avg: float, exp_avg_sq: float, rate: float, decay: float, eps: float
) -> float:
    """AdamW's move at the tensor's own rate."""
    param = param * decay - rate * divide(exp_avg, sqrt(exp_avg_sq) + eps)
    return param
