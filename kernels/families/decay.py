# SPDX-License-Identifier: Apache-2.0
"""Weight decay that enters through the gradient, for every family that knows it."""

from __future__ import annotations

from ..language import where


def coupled_decay(param: float, grad: float, weight_decay: float) -> float:
    """L2 regularisation: the decay enters through the gradient."""
    return where(weight_decay != 0.0, grad + param * weight_decay, grad)
