# SPDX-License-Identifier: Apache-2.0
"""Adafactor's schedules: Shazeer and Stern 2018, arXiv:1804.04235, in the variant that torch has.

    rho_t = min(lr, 1 / sqrt(t))        1 - b2_t = t^beta2_decay

All else needs the means of rows and columns, which no rule can say: `pyupdate/optim/adafactor.py`
takes them, with the texts of `kernels/composite.py` before and behind. The planned pass unscales,
checks, clips and counts as everywhere, and leaves the parameter as it is: its root mean square
before the decay sets the size of the step. (A compiler makes nothing of that pass: 1 ms for all of
a step of 12 x 1024 x 1024 besides the means.)
"""

from __future__ import annotations

from ..language import divide, minimum, rule, sqrt
from ..scalar import power


def prepare_adafactor(
    step: float, lr: float, beta2_decay: float, weight_decay: float
) -> tuple[float, ...]:
    """Hypers of what follows the pass."""
    decay = 1.0 - lr * weight_decay
    rho = minimum(lr, divide(1.0, sqrt(step)))
    one_minus_beta2 = power(step, beta2_decay)
    return decay, rho, one_minus_beta2


@rule(state={}, prepare=prepare_adafactor)
def adafactor(param: float) -> float:
    """The parameter as it was; it is moved when all means are there."""
    return param
