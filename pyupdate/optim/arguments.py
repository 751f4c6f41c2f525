# SPDX-License-Identifier: Apache-2.0
"""What constructors of optimizers that torch has not refuse, in one text."""

from __future__ import annotations

from collections.abc import Sequence


def at_least_zero(**numbers: float) -> None:
    """Refuse negative numbers and nan.

    Raises:
        ValueError: names the argument and what was given.
    """
    for name, value in numbers.items():
        if not value >= 0.0:
            message = f"{name} must be at least 0, but is {value}"
            raise ValueError(message)


def decay_rates(betas: Sequence[float], count: int = 2) -> None:
    """Refuse betas that are not `count` numbers of at least 0 and less than 1.

    Raises:
        ValueError: says which.
    """
    if len(betas) != count:
        message = f"betas must be {count} numbers, but are {len(betas)}"
        raise ValueError(message)
    for index, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            message = f"betas[{index}] must be at least 0 and less than 1, but is {beta}"
            raise ValueError(message)
