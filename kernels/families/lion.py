# SPDX-License-Identifier: Apache-2.0
"""Lion: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675.

p <- p (1 - lr wd)      p <- p - lr sign(b1 m + (1 - b1) g)      m <- b2 m + (1 - b2) g
"""

from __future__ import annotations

from ..language import rule, sign


def prepare_lion(
    step: float, lr: float, beta1: float, beta2: float, weight_decay: float
) -> tuple[float, ...]:
    """Hypers of Lion; nothing depends on the step."""
    decay = 1.0 - lr * weight_decay
    one_minus_beta1 = 1.0 - beta1
    one_minus_beta2 = 1.0 - beta2
    return decay, lr, one_minus_beta1, one_minus_beta2


@rule(state={"exp_avg": 0.0}, prepare=prepare_lion)
def lion(
    param: float,
    grad: float,
    exp_avg: float,
    decay: float,
    lr: float,
    one_minus_beta1: float,
    one_minus_beta2: float,
) -> tuple[float, ...]:
    """The sign of a mixture of average and gradient; a nan of either stays one."""
    mixed = exp_avg + (grad - exp_avg) * one_minus_beta1
    param = param * decay - lr * sign(mixed)
    exp_avg = exp_avg + (grad - exp_avg) * one_minus_beta2
    return param, exp_avg
