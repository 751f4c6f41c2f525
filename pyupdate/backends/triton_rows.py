# SPDX-License-Identifier: Apache-2.0
"""A row of the Triton back end, and its columns as kernels/triton_layout.py counts them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from ..kernels.language import Rule
from ..kernels.reduction import CHUNK
from ..pytorch.rows import Row
from .plain import is_plain
from .triton_memory import Extents

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

    def written(self) -> Iterator[tuple[int, int]]:
        """The address and the bytes of all that a step may write."""
        size = self.size
        yield self.addresses[0], size * self.param.itemsize
        for state in self.addresses[2:]:
            yield state, size * self.state.itemsize
        yield self.average, size * max(4, self.param.itemsize) if self.average else 0
        for number in (self.step, *self.scalars):
            is_wide = number & 1
            yield number - is_wide, (8 if is_wide else 4) if number else 0

    def columns(self) -> list[int]:
        """The table of rows up to its size."""
        absent = [0] * (AVERAGE - len(self.addresses))
        return [*self.addresses, *absent, self.average, self.size]

    def last_columns(self) -> list[int]:
        """The table behind its chunk and its class."""
        absent = [0] * (MAX_SCALARS - len(self.scalars))
        return [self.step, *self.scalars, *absent, self.identity]


class Rows:
    """The rows of a part that have a gradient, as it has found them.

    Attributes:
        entries: in order.
        averages: whether each has an average beside its state.
    """

    def __init__(self, entries: Sequence[Entry], *, averages: bool) -> None:
        self.entries = entries
        self.averages = averages

    @cached_property
    def written(self) -> Extents:
        """All that a step may write."""
        return Extents.of([piece for entry in self.entries for piece in entry.written()])

    @cached_property
    def gradient_bytes(self) -> torch.Tensor:
        """How many bytes each gradient has, on the host."""
        sizes = [entry.size * entry.param.itemsize for entry in self.entries]
        return torch.tensor(sizes, dtype=torch.int64, device="cpu")


class Drawn(NamedTuple):
    """What tables are made of; another one where anything is another one.

    Attributes:
        rows: all but where the gradients lie by now.
        gradients: their addresses, in the order of the rows (int64, on the host).
    """

    rows: Rows
    gradients: torch.Tensor

    @classmethod
    def of(cls, rows: Rows) -> Drawn:
        """As the entries say."""
        addresses = [entry.addresses[1] for entry in rows.entries]
        return cls(rows, torch.tensor(addresses, dtype=torch.int64, device="cpu"))


def chunks_of(size: int) -> int:
    """How many chunks a row has; one without elements has an empty one."""
    return max(1, -(-size // CHUNK))


def why_not_row(row: Row, rule: Rule) -> str | None:
    """The reason why a parameter must be stepped by another back end, None if it need not."""
    if len(rule.state) > MAX_STATES or len(rule.scalars) > MAX_SCALARS:
        return f"rule '{rule.name}' keeps more than the kernels take"
    if not is_plain(row.param):
        return f"parameter '{row.name}' does not lie in plain memory"
    return None
