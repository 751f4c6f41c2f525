# SPDX-License-Identifier: Apache-2.0
"""Elementwise texts around the framework's matrix products: of optimizers that no rule can say.

Muon, with momentum b of `families/muon.py` (d: direction, O: its orthogonalisation):

    d = g + (b - g) mu, or b        p <- p (1 - lr wd) - lr' O
"""

from __future__ import annotations


def muon_direction(grad: float, momentum_buffer: float, momentum: float) -> float:
    """Nesterov's look ahead."""
    return grad + (momentum_buffer - grad) * momentum


def muon_move(param: float, update: float, decay: float, step_size: float) -> float:
    """The parameter after its decay and the move along the orthogonalised direction."""
    return param * decay - step_size * update
