# SPDX-License-Identifier: Apache-2.0
"""Every update rule, once. What runs on any device, in any library, comes from this text.

A rule gets the gradient after it was multiplied (unscale x clip x sign of `maximize`), the state of
one element and the hypers that its `prepare` made in fp64. Compute type: fp64 for fp64 storage,
fp32 for the others; every operation is rounded once. `language.py` says what may be written here.

Where torch leaves out a term whose factor is zero (weight decay), so does the rule: an infinite
parameter must not make a nan of 0 * inf.
"""

from __future__ import annotations

from .language import divide, maximum, minimum, rule, sqrt, where
from .scalar import integer_power

# ----- SGD with momentum: Sutskever et al. 2013, "On the importance of initialization and
#       momentum"; dampening and the first step (the buffer becomes the gradient) as in torch.
#         g <- g + wd p      b <- mu b + (1 - tau) g      p <- p - lr (g + mu b, or b)


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


def coupled_decay(param: float, grad: float, weight_decay: float) -> float:
    """L2 regularisation: the decay enters through the gradient."""
    return where(weight_decay != 0.0, grad + param * weight_decay, grad)


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


# ----- Adam: Kingma and Ba 2015, arXiv:1412.6980; AMSGrad: Reddi et al. 2018, arXiv:1904.09237;
#       AdamW (decoupled decay): Loshchilov and Hutter 2019, arXiv:1711.05101.
#         m <- m + (g - m)(1 - b1)      v <- b2 v + (1 - b2) g^2
#         p <- p - lr/(1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)


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


RULES = {
    entry.name: entry for entry in (sgd, sgd_momentum, adam, adam_amsgrad, adamw, adamw_amsgrad)
}
"""Every rule by name, in the order in which the compiled modules list them."""


# ----- what stands before every rule: the norm of the gradients and the one multiplier ------------


def squared(grad: float) -> float:
    """What the reduce pass adds up, per element of the unscaled gradient."""
    return grad * grad


def nonfinite(grad: float) -> float:
    """1 for an inf or nan, else 0: the reduce pass looks again where its sum is not finite."""
    return where(grad - grad == 0.0, 0.0, 1.0)


def multiplier(norm: float, unscale: float, max_norm: float) -> float:
    """unscale x clip of torch.nn.utils.clip_grad_norm_, in fp64; no clip where max_norm < 0.

    `norm` is that of the unscaled gradients. As in torch, an infinite norm gives 0, a nan norm nan.
    1e-6, torch's guard against a zero norm, is not exact in binary and is said as 1 / 1000000.
    """
    clip = minimum(divide(max_norm, norm + divide(1.0, 1000000.0)), 1.0)
    return unscale * where(max_norm < 0.0, 1.0, clip)
