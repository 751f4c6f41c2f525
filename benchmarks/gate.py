# SPDX-License-Identifier: Apache-2.0
"""`make bench-check`: a few ratios again, beside the committed ones.

    make bench-check        # three minutes on two cores, five at most

Ratios to torch of the same process are compared, never times, and those of benchmarks/results/
latest.json, where `make bench` and `ratios.py` put three processes each. Here, too, three have a
say: a ratio fails where their median is more than 25 % worse than the worst of the committed ones
(the same code gives 2.9x in one process and 3.6x in another: NAdam). Two that hold, or two that do
not, decide the median, so the third is asked only where they differ. A process during which the
machine did not hold still says nothing. On another machine than latest.json's, compare with your
own: `make bench BENCH='--section targets'` writes build/bench/latest.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ratios
from server import Server
from tqdm import tqdm
from workloads import HELD

from pyupdate.bench.timing import disturbed

WORSE = 0.25
SECONDS = 1.5
"""Of timing in a process, which takes two to ten in all."""
PROCESSES = 3
REPEATED = 2
"""Processes of a pair, at most, because the machine moved."""

Found = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """What became of a pair: ``held``, ``WORSE``, ``disturbed``, ``not measured`` or ``new``."""

    pair: tuple[str, str]
    said: str
    committed: float | None = None
    found: tuple[float, ...] = ()

    @property
    def line(self) -> str:
        """For the report."""
        committed = f"{'':8}" if self.committed is None else f"{self.committed:7.2f}x"
        found = " ".join(f"{ratio:.2f}x" for ratio in self.found)
        return f"{self.said:13} {committed}  {found:21} {self.pair[1]:8} {self.pair[0]}"


def checked(
    pair: tuple[str, str], committed: float | None, measure: Callable[[str, str], Found]
) -> Verdict:
    """Measure a pair until its median is known.

    Args:
        pair: a workload and a kind, as `ratios.py` calls them.
        committed: the ratio that it had, at least.
        measure: makes a process's answer; raises RuntimeError where there is none.
    """
    if committed is None:
        return Verdict(pair, "new")
    still: list[float] = []
    moved: list[float] = []
    while max(votes := _votes(still, committed)) <= PROCESSES // 2 and len(moved) <= REPEATED:
        try:
            found = measure(*pair)
        except RuntimeError as error:
            tqdm.write(f"{pair[1]}: {pair[0]}: {error}", file=sys.stderr)
            return Verdict(pair, "not measured", committed)
        (moved if disturbed(found) else still).append(found["ratio"])
    if max(votes) <= PROCESSES // 2:
        return Verdict(pair, "disturbed", committed, (*still, *moved))
    return Verdict(pair, "held" if votes[0] > votes[1] else "WORSE", committed, tuple(still))


def least(one: Found) -> float:
    """The worst ratio that a pair of latest.json had in any of its processes."""
    return float(min(process["ratio"] for process in one["processes"]))


def _votes(ratios_found: list[float], committed: float) -> tuple[int, int]:
    """How many hold, and how many do not."""
    hold = sum(committed <= ratio * (1.0 + WORSE) for ratio in ratios_found)
    return hold, len(ratios_found) - hold


def main() -> int:
    """1 where a ratio is worse or cannot be measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    parser.add_argument("--against", type=Path, default=ratios.LATEST)
    chosen = parser.parse_args()
    committed = {(one["workload"], one["kind"]): least(one) for one in ratios.read(chosen.against)}
    pairs = [pair for pair in HELD if chosen.only in pair[0]]
    with Server() as server:
        measure = partial(server.target, seconds=SECONDS)
        verdicts = [
            checked(pair, committed.get(pair), measure) for pair in tqdm(pairs, unit="pair")
        ]
    print(f"{'':13} {'at least':>8}  now")
    print("\n".join(verdict.line for verdict in verdicts))
    bad = [verdict for verdict in verdicts if verdict.said in ("WORSE", "not measured")]
    print(f"bench-check: {f'FAILED: {len(bad)} ratios' if bad else 'no ratio is worse'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
