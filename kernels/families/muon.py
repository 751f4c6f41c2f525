# SPDX-License-Identifier: Apache-2.0
"""Muon's momentum: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".

    b <- b + (g - b)(1 - mu)

The rest of Muon is a matrix product of all of a parameter, which no rule can say:
`pyupdate/optim/muon.py` makes it, with the texts of `kernels/composite.py` before and behind.
"""

from __future__ import annotations

from ..language import rule


def prepare_muon(step: float, momentum: float) -> float:
    """The one hyper of Muon's momentum."""
    one_minus_momentum = 1.0 - momentum
    return one_minus_momentum


@rule(state={"momentum_buffer": 0.0}, prepare=prepare_muon)
def muon(grad: float, momentum_buffer: float, one_minus_momentum: float) -> float:
    """The moving average; the parameter is moved when all of it is there."""
    momentum_buffer = momentum_buffer + (grad - momentum_buffer) * one_minus_momentum
    return momentum_buffer
