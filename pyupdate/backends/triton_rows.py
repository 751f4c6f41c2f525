# SPDX-License-Identifier: Apache-2.0
"""A row of the Triton back end, and its columns as kernels/triton_layout.py counts them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernels.language import Rule
from ..kernels.reduction import CHUNK

AVERAGE = 6  # the column of the average's address
MAX_STATES, MAX_SCALARS = 4, 2


@dataclass(frozen=True)
class Entry:
    """A row as the device sees it.

    Attributes:
        rule: of its group.
        group: index of its group.
        addresses: of the parameter, its gradient and its states.
        average: the average's address, 0 where there is none.
        param: the dtype of parameter and gradient.
        state: the dtype of its states.
        size: elements.
        counts: what rows have in common that were stepped alike: step count and counted scalars.
        step: address of its step counter, with 1 added where it is fp64.
        scalars: addresses of its scalars, said likewise.
        identity: which parameter it is, for stochastic rounding.
    """

    rule: Rule
    group: int
    addresses: tuple[int, ...]
    average: int
    param: torch.dtype
    state: torch.dtype
    size: int
    counts: tuple[float, ...]
    step: int
    scalars: tuple[int, ...]
    identity: int

    @property
    def is_aligned(self) -> bool:
        """Whether every address is one of 16 bytes."""
        return all(address % 16 == 0 for address in (*self.addresses, self.average))

    def columns(self) -> list[int]:
        """The table of rows up to its size."""
        absent = [0] * (AVERAGE - len(self.addresses))
        return [*self.addresses, *absent, self.average, self.size]

    def last_columns(self) -> list[int]:
        """The table behind its chunk and its class."""
        absent = [0] * (MAX_SCALARS - len(self.scalars))
        return [self.step, *self.scalars, *absent, self.identity]


def chunks_of(size: int) -> int:
    """How many chunks a row has; one without elements has an empty one."""
    return max(1, -(-size // CHUNK))
