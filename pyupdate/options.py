# SPDX-License-Identifier: Apache-2.0
"""What a user adds to a plain step, and what a step leaves to be read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """What is added to a plain step.

    Attributes:
        max_norm: the bound of the gradients' global 2-norm, as in torch's ``clip_grad_norm_``;
            None for no clip.
    """

    max_norm: float | None = None

    def __post_init__(self) -> None:
        if self.max_norm is None:
            return
        if isinstance(self.max_norm, bool) or not isinstance(self.max_norm, int | float):
            message = f"max_norm must be a number or None, not {type(self.max_norm).__name__}"
            raise TypeError(message)
        if not self.max_norm >= 0.0:
            message = f"max_norm must not be negative or nan, but is {self.max_norm}"
            raise ValueError(message)


@dataclass(frozen=True)
class LastUpdate:
    """What the last update of an optimizer did.

    Attributes:
        norm: the global 2-norm of the unscaled gradients before clipping; None where nobody asked
            for it (no scaler and no ``max_norm``).
        skipped: whether nothing was written because a gradient was inf or nan.
        multiplier: what every gradient was multiplied by (unscale x clip).
    """

    norm: float | None
    skipped: bool
    multiplier: float
