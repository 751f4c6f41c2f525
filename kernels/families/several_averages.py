# SPDX-License-Identifier: Apache-2.0
"""Adam with more, or other, averages: AdEMAMix, ADOPT, Adan.

AdEMAMix: Pagliardini, Ablin and Grangier 2024, arXiv:2409.03137. A slow average s without
correction of its bias; its weight and its length grow over the first T steps:

    alpha_t = alpha min(t/T, 1)
    b3_t = min(exp(ln b1 ln b3 / ((1 - t/T) ln b3 + t/T ln b1)), b3)
    p <- p (1 - lr wd)      m <- m + (g - m)(1 - b1)      s <- s + (g - s)(1 - b3_t)
    v <- b2 v + (1 - b2) g^2
    p <- p - lr (m / (1 - b1^t) + alpha_t s) / (sqrt(v) / sqrt(1 - b2^t) + eps)

ADOPT: Taniguchi et al. 2024, arXiv:2411.02853, algorithm 2, with the authors' clip. The gradient is
divided by the average of those before it, so the first step only begins that average:

    t = 1:  v <- g^2
    t > 1:  p <- p (1 - lr wd)      n = clip(g / max(sqrt(v), eps), (t - 1)^(1/4))
            m <- m + (n - m)(1 - b1)      p <- p - lr m      v <- b2 v + (1 - b2) g^2

Adan: Xie et al. 2022, arXiv:2208.06677, in the authors' code: betas are decay rates, all averages
are corrected, the decay is proximal; d = 0 in the first step.

    d = g - previous g      m <- m + (g - m)(1 - b1)      n <- n + (d - n)(1 - b2)
    v <- b3 v + (1 - b3)(g + b2 d)^2
    p <- (p - lr (m / (1 - b1^t) + b2 n / (1 - b2^t)) / (sqrt(v) / sqrt(1 - b3^t) + eps))
         / (1 + lr wd)
"""

from __future__ import annotations

from ..language import divide, minimum, rule, sqrt, where
from ..scalar import exp, integer_power, log
from .adam import adam_moments


def prepare_ademamix(
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    warmup: float,
    eps: float,
    weight_decay: float,
) -> tuple[float, ...]:
    """Hypers of AdEMAMix; `warmup` is T, 0 for neither schedule."""
    decay = 1.0 - lr * weight_decay
    part = minimum(divide(step, warmup), 1.0)
    slow_weight = alpha * part
    log_beta1 = log(beta1)
    log_beta3 = log(beta3)
    mixed = (1.0 - part) * log_beta3 + part * log_beta1
    growing = minimum(exp(divide(log_beta1 * log_beta3, mixed)), beta3)
    beta3 = where(warmup > 0.0, growing, beta3)
    one_minus_beta1 = 1.0 - beta1
    one_minus_beta2 = 1.0 - beta2
    one_minus_beta3 = 1.0 - beta3
    inv_bias1 = divide(1.0, 1.0 - integer_power(beta1, step))
    inv_sqrt_bias2 = divide(1.0, sqrt(1.0 - integer_power(beta2, step)))
    return (
        decay,
        lr,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        one_minus_beta3,
        slow_weight,
        inv_bias1,
        inv_sqrt_bias2,
        eps,
    )


@rule(state={"exp_avg": 0.0, "exp_avg_sq": 0.0, "exp_avg_slow": 0.0}, prepare=prepare_ademamix)
def ademamix(
    param: float,
    grad: float,
    exp_avg: float,
    exp_avg_sq: float,
    exp_avg_slow: float,
    decay: float,
    lr: float,
    one_minus_beta1: float,
    beta2: float,
    one_minus_beta2: float,
    one_minus_beta3: float,
    slow_weight: float,
    inv_bias1: float,
    inv_sqrt_bias2: float,
    eps: float,
) -> tuple[float, ...]:
    """AdamW with a second, slow first moment."""
    param = param * decay
    exp_avg, exp_avg_sq = adam_moments(
        grad, exp_avg, exp_avg_sq, one_minus_beta1, beta2, one_minus_beta2
    )
    exp_avg_slow = exp_avg_slow + (grad - exp_avg_slow) * one_minus_beta3
    direction = exp_avg * inv_bias1 + exp_avg_slow * slow_weight
    param = param - lr * divide(direction, sqrt(exp_avg_sq) * inv_sqrt_bias2 + eps)
    return param, exp_avg, exp_avg_sq, exp_avg_slow


def prepare_adopt(
    step: float, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> tuple[float, ...]:
    """Hypers of ADOPT; in the first step the clip is 0, nothing decays and v is all gradient."""
    decay = where(step > 1.0, 1.0 - lr * weight_decay, 1.0)
    kept = where(step > 1.0, beta2, 0.0)
    entering = 1.0 - kept
    largest = sqrt(sqrt(step - 1.0))
    one_minus_beta1 = 1.0 - beta1
    return decay, lr, one_minus_beta1, kept, entering, largest, eps


@rule(state={"exp_avg": 0.0, "exp_avg_sq": 0.0}, prepare=prepare_adopt)
def adopt(
    param: float,
    grad: float,
    exp_avg: float,
    exp_avg_sq: float,
    decay: float,
    lr: float,
    one_minus_beta1: float,
    kept: float,
    entering: float,
    largest: float,
    eps: float,
) -> tuple[float, ...]:
    """Adam whose second moment does not know the gradient that it divides."""
    # Not maximum and minimum, of which g++ 12 makes branches: these choices keep a nan as well.
    root = sqrt(exp_avg_sq)
    normed = divide(grad, where(root < eps, eps, root))
    least = 0.0 - largest
    normed = where(normed > largest, largest, where(normed < least, least, normed))
    exp_avg = exp_avg + (normed - exp_avg) * one_minus_beta1
    param = param * decay - lr * exp_avg
    exp_avg_sq = exp_avg_sq * kept + grad * grad * entering
    return param, exp_avg, exp_avg_sq


def prepare_adan(
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    beta3: float,
    eps: float,
    weight_decay: float,
) -> tuple[float, ...]:
    """Hypers of Adan; `first` is 1 on the step that has no gradient before it."""
    first = where(step > 1.0, 0.0, 1.0)
    shrink = divide(1.0, 1.0 + lr * weight_decay)
    one_minus_beta1 = 1.0 - beta1
    one_minus_beta2 = 1.0 - beta2
    one_minus_beta3 = 1.0 - beta3
    step_size = divide(lr, 1.0 - integer_power(beta1, step))
    diff_step_size = divide(lr * beta2, 1.0 - integer_power(beta2, step))
    inv_sqrt_bias3 = divide(1.0, sqrt(1.0 - integer_power(beta3, step)))
    return (
        shrink,
        beta2,
        beta3,
        one_minus_beta1,
        one_minus_beta2,
        one_minus_beta3,
        step_size,
        diff_step_size,
        inv_sqrt_bias3,
        first,
        eps,
    )


@rule(
    state={"exp_avg": 0.0, "exp_avg_sq": 0.0, "exp_avg_diff": 0.0, "previous_grad": 0.0},
    prepare=prepare_adan,
)
def adan(
    param: float,
    grad: float,
    exp_avg: float,
    exp_avg_sq: float,
    exp_avg_diff: float,
    previous_grad: float,
    shrink: float,
    beta2: float,
    beta3: float,
    one_minus_beta1: float,
    one_minus_beta2: float,
    one_minus_beta3: float,
    step_size: float,
    diff_step_size: float,
    inv_sqrt_bias3: float,
    first: float,
    eps: float,
) -> tuple[float, ...]:
    """Adam with Nesterov's look ahead, from the change of the gradient."""
    diff = where(first != 0.0, 0.0, grad - previous_grad)
    exp_avg = exp_avg + (grad - exp_avg) * one_minus_beta1
    exp_avg_diff = exp_avg_diff + (diff - exp_avg_diff) * one_minus_beta2
    ahead = grad + diff * beta2
    exp_avg_sq = exp_avg_sq * beta3 + ahead * ahead * one_minus_beta3
    direction = exp_avg * step_size + exp_avg_diff * diff_step_size
    param = (param - divide(direction, sqrt(exp_avg_sq) * inv_sqrt_bias3 + eps)) * shrink
    previous_grad = grad
    return param, exp_avg, exp_avg_sq, exp_avg_diff, previous_grad
