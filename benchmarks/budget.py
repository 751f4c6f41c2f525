# SPDX-License-Identifier: Apache-2.0
"""How long cells take, and how a run's minutes are spread over those that are left.

A cell costs what it takes to start, to make and prove its contestants, and to warm them up; and the
seconds of timing, which is what can be spread. What it cost before is the best guess of what it
will cost.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from matrix import SIDE_BY_SIDE, WITH_PEERS, Cell
from ratios import PROCESSES
from workloads import EVERY

MOST_S = 2.0
LEAST_S = 0.5
"""Of timing in a cell."""
WARM = 2.0
"""Warm-up may take as long as timing does."""
PUBLISHING_S = 10.0
OTHERS = {"apart": 12.0, "compiled": 60.0, "costs": 40.0, "training": 4.0}
"""Seconds of a cell that is no step of contestants that share a process."""

Record = dict[str, Any]


@dataclass
class Budget:
    """Minutes, and what the cells take of them.

    Attributes:
        minutes: of the whole run; None: as long as it takes.
        known: by a cell's key, the seconds that it took beside the timing.
        begun: when the clock started.
    """

    minutes: float | None
    known: dict[str, float] = field(default_factory=dict)
    begun: float = field(default_factory=time.monotonic)

    def learn(self, record: Record) -> None:
        """Remember what a cell took."""
        if "took_s" in record:
            asked = WARM * record["asked_s"] * _processes(record["section"])
            self.known[record["key"]] = max(1.0, record["took_s"] - asked)

    def left(self) -> float:
        """Seconds until a run has to end; infinite without a budget."""
        if self.minutes is None:
            return float("inf")
        return 60.0 * self.minutes - PUBLISHING_S - (time.monotonic() - self.begun)

    def seconds(self, cells: list[Cell], most: float = MOST_S) -> float:
        """Of timing in the first of the cells that are left, if all are to have as many."""
        if self.minutes is None:
            return most
        turns = sum(WARM * _processes(cell.section) for cell in cells if cell.section != "costs")
        spare = self.left() - sum(self.fixed(cell) for cell in cells)
        return min(most, max(min(most, LEAST_S), spare / max(1.0, turns)))

    def fits(self, cell: Cell, seconds: float) -> bool:
        """Whether a cell can be over in time."""
        return self.takes(cell, seconds) <= self.left()

    def takes(self, cell: Cell, seconds: float) -> float:
        """A cell's seconds in all."""
        return self.fixed(cell) + WARM * seconds * _processes(cell.section)

    def fixed(self, cell: Cell) -> float:
        """Those beside the timing, as they were the last time, or by what is to be made."""
        return self.known.get(cell.key) or guess(cell)


def _processes(section: str) -> int:
    return PROCESSES if section == "targets" else 1


def guess(cell: Cell) -> float:
    """Seconds of a cell beside its timing, on two cores: from a run on an EPYC."""
    if cell.section in OTHERS:
        return OTHERS[cell.section]
    if cell.section == "targets":
        return PROCESSES * (1.8 + 0.08e-6 * EVERY[cell.of].elements)
    workload = cell.workload()
    # One thread is asked of two contestants only.
    found = (0.17e-6 * workload.elements + 1.5e-3 * len(workload.shapes)) * cell.threads / 2
    if cell.section in SIDE_BY_SIDE and cell.of in WITH_PEERS:
        found += 5.0
    if cell.section == "backends":  # Python takes a hundred times as long
        found += 6.0 + 1e-6 * workload.elements
    return 1.5 + found
