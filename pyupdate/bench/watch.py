# SPDX-License-Identifier: Apache-2.0
"""Rounds of `timing.interleave`, without those during which the machine did not hold still.

On a shared machine the speed of memory changes within seconds, by a third and more: what is timed
before and after a cell then differs, though most of its rounds were quiet. So rounds are taken in
pieces of half a second, with a gauge between them, and a piece counts where the gauge read the same
at both of its ends and nobody else took the processors.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from . import timing

PIECE_S = 0.5
"""Long beside the gauge (40 ms), and beside the 10 ms in which the kernel counts others' time."""
SETTLES = 3
"""In a piece of more rounds the first does not count: it finds what the gauge left in caches."""
READS = 7


class Gauge:
    """A stream through memory that stays the same: new pages would have a speed of their own."""

    def __init__(self) -> None:
        self._a, self._b, self._c = (torch.ones(timing.CALIBRATION, device="cpu") for _ in range(3))
        self.read()  # the pages' first touch

    def read(self) -> float:
        """The median time of a turn."""
        times = []
        for _ in range(READS):
            start = time.perf_counter()
            torch.add(self._a, self._b, out=self._c)
            times.append(time.perf_counter() - start)
        return statistics.median(times)


@dataclass(frozen=True)
class Piece:
    """Some rounds, with what the machine did meanwhile."""

    seconds: dict[str, list[float]]
    moved: float
    others: float | None

    @property
    def rounds(self) -> int:
        """How many count."""
        return len(next(iter(self.seconds.values())))

    @property
    def took(self) -> float:
        """The time that was measured."""
        return sum(map(sum, self.seconds.values()))

    @property
    def disturbed(self) -> bool:
        """Whether it says little."""
        return timing.disturbed({"moved": self.moved, "others": self.others})


@dataclass(frozen=True)
class Watched:
    """Times, and how the machine was while they were taken.

    Attributes:
        times: of the rounds that count; of all, where too few of them were quiet.
        moved: by what part the gauge differed between the ends of a piece that counts, at most.
        others: the part of the processors' time that others took during such a piece, at most.
        thrown_away: rounds that do not count.
        gauge_ms: what the gauge read, in turn.
    """

    times: dict[str, timing.Times]
    moved: float
    others: float | None
    thrown_away: int
    gauge_ms: list[float]

    def facts(self) -> dict[str, Any]:
        """For a record; `timing.disturbed` reads it."""
        return {
            "rounds": len(next(iter(self.times.values())).seconds),
            "thrown_away": self.thrown_away,
            "moved": self.moved,
            "others": self.others,
            "gauge_ms": [round(1e3 * one, 2) for one in self.gauge_ms],
        }


def interleave(
    runs: timing.Runs, *, seconds: float, rounds: int = timing.ROUNDS, patience: float = 1.0
) -> Watched:
    """Time several warm things in turns, until enough quiet rounds are there.

    Args:
        runs: as `timing.interleave` takes them.
        seconds: of quiet rounds, at least, if the patience lasts.
        rounds: quiet ones, at least.
        patience: how many times as long as the quickest way may be waited for a machine that does
            not hold still. If by then there are fewer than `rounds` quiet rounds, all rounds count,
            and the result is disturbed.
    """
    gauge = Gauge()
    read = [gauge.read()]
    pieces: list[Piece] = []
    begun = time.perf_counter()
    count = 0
    while True:
        taken = timing.others()
        length = min(PIECE_S, seconds)
        found = timing.interleave(runs, seconds=length, rounds=1, first=count)
        others = taken()
        made = len(next(iter(found.values())).seconds)
        count += made
        read.append(gauge.read())
        left_out = 1 if made > SETTLES else 0
        kept = {name: list(times.seconds[left_out:]) for name, times in found.items()}
        pieces.append(Piece(kept, timing.moved(*read[-2:]), others))
        still = [piece for piece in pieces if not piece.disturbed]
        enough = sum(piece.rounds for piece in still) >= rounds
        if enough and sum(piece.took for piece in still) >= seconds:
            break
        spent = time.perf_counter() - begun
        if spent >= patience * max(seconds, spent / count * rounds):
            break
    chosen = still if enough else pieces
    return Watched(
        {name: timing.Times([t for p in chosen for t in p.seconds[name]]) for name in runs},
        max(piece.moved for piece in chosen),
        max((piece.others for piece in chosen if piece.others is not None), default=None),
        count - sum(piece.rounds for piece in chosen),
        read,
    )
