# SPDX-License-Identifier: Apache-2.0
"""Elementwise texts around the framework's own operations: of optimizers that no rule can say.

Muon, with momentum b of `families/muon.py` (d: direction, O: its orthogonalisation):

    d = g + (b - g) mu, or b        p <- p (1 - lr wd) - lr' O

Adafactor, with the schedules of `families/adafactor.py` (R, C: averages of the means of g^2 over
rows and over columns; V: of g^2 itself, for vectors; rms: the root of the mean square):

    R <- R + (mean(g^2) - R)(1 - b2_t), and so C, V
    s = sqrt(R / max(mean(R), eps1)) sqrt(C), or sqrt(V)        u = g / max(s, eps1)
    p <- p (1 - lr wd) - u max(eps2, rms(p)) rho_t / max(1, rms(u) / d)

(u and the move are made in place, over all of a parameter: `pyupdate/optim/adafactor_passes.py`.)
"""

from __future__ import annotations

from .language import divide, maximum, sqrt, where


def muon_direction(grad: float, momentum_buffer: float, momentum: float) -> float:
    """Nesterov's look ahead."""
    return grad + (momentum_buffer - grad) * momentum


def muon_move(param: float, update: float, decay: float, step_size: float) -> float:
    """The parameter after its decay and the move along the orthogonalised direction."""
    return param * decay - step_size * update


def adafactor_average(average: float, squares: float, one_minus_beta2: float) -> float:
    """R, C or V after a step, from the nearer end: in the first steps nearly all of it is new."""
    change = squares - average
    from_old = average + change * one_minus_beta2
    from_new = squares - change * (1.0 - one_minus_beta2)
    return where(one_minus_beta2 < 0.5, from_old, from_new)


def adafactor_root(second: float) -> float:
    """The root of a second moment: of a vector's element, or of a column."""
    return sqrt(second)


def adafactor_row_root(row_var: float, mean: float, eps1: float) -> float:
    """What a row's elements multiply the roots of their columns by: no root an element."""
    return sqrt(divide(row_var, maximum(mean, eps1)))


def adafactor_size(
    param_rms: float, direction_rms: float, rho: float, eps2: float, threshold: float
) -> float:
    """What a direction is multiplied by; as in torch, a nan among the elements has no say."""
    relative = where(param_rms > eps2, param_rms, eps2)
    excess = divide(direction_rms, threshold)
    return divide(relative * rho, where(excess > 1.0, excess, 1.0))
