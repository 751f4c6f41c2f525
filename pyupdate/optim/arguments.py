# SPDX-License-Identifier: Apache-2.0
"""What constructors of optimizers that torch has not refuse, in one text."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..pytorch.rows import NO_NUMBER, number_of


def at_least_zero(**numbers: object) -> None:
    """Refuse what is no number, negative numbers and nan.

    Raises:
        TypeError: one is no number.
        ValueError: one is out of its range, or a tensor of several numbers.
    """
    for name, value in numbers.items():
        if not _number(name, value) >= 0.0:
            message = f"{name} must be at least 0, but is {value!r}: give 0 or more"
            raise ValueError(message)


def not_nan(**numbers: object) -> None:
    """Refuse what is no number, and nan.

    Raises:
        TypeError: one is no number.
        ValueError: one is nan, or a tensor of several numbers.
    """
    for name, value in numbers.items():
        if math.isnan(_number(name, value)):
            message = f"{name} must be a number, but is {value!r}: give one of any size"
            raise ValueError(message)


def decay_rates(betas: Any, count: int = 2) -> None:
    """Refuse betas that are not `count` numbers of at least 0 and less than 1.

    Raises:
        TypeError: they are no sequence, or one is no number.
        ValueError: there are more or fewer, or one is out of its range.
    """
    mend = (
        f"give {count} numbers of at least 0 and less than 1, such as ({'0.9, ' * (count - 1)}0.99)"
    )
    try:
        if isinstance(betas, str | bytes):
            raise TypeError
        found = len(betas)
        rates = [betas[index] for index in range(found)]
    except (LookupError, TypeError) as error:
        message = f"betas must be a tuple of {count} numbers, but is {betas!r}: {mend}"
        raise TypeError(message) from error
    if found != count:
        message = f"betas must be {count} numbers, but are {found}, {betas!r}: {mend}"
        raise ValueError(message)
    for index, beta in enumerate(rates):
        if not 0.0 <= _number(f"betas[{index}]", beta) < 1.0:
            message = f"betas[{index}] must be at least 0 and less than 1, but is {beta!r}: {mend}"
            raise ValueError(message)


def flags(**given: object) -> None:
    """Refuse what is neither True nor False: a text says yes, whatever it says.

    Raises:
        TypeError: names the argument and what was given.
    """
    for name, value in given.items():
        if not isinstance(value, bool):
            message = f"{name} must be True or False, but is {value!r}: give one of them"
            raise TypeError(message)


def _number(name: str, value: Any) -> float:
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        message = (
            f"{name} must be one number, but is a tensor of shape {tuple(value.shape)}, {value!r}: "
            "give a tensor of one element, or parameter groups where each has a number of its own"
        )
        raise ValueError(message)
    try:
        if isinstance(value, bool):
            raise TypeError
        return number_of(value)
    except NO_NUMBER as error:
        message = f"{name} must be a number, but is {value!r}: give one, or a tensor of one element"
        raise TypeError(message) from error
