# SPDX-License-Identifier: Apache-2.0
"""`make bench-check`: a few cells again, their ratios beside the committed ones.

    make bench-check        # two minutes on two cores

Ratios to torch of the same run are compared, never times. A cell whose ratio is more than 25 %
worse is measured once more; if it stays so, the check fails. A run during which the machine did not
hold still says nothing: it is marked, and does not fail. The ratios are those of the machine that
benchmarks/results/matrix.jsonl names; on another one, compare with your own `make bench`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matrix
from measured import Record, against
from run import RESULTS, in_a_process, read
from tqdm import tqdm

from pyupdate.bench.timing import disturbed

WORSE = 0.25
TOLD = ["--no-peers", "--seconds", "4"]
"""Longer than a cell of the matrix: after one second each, a plain step of 1,000 tiny tensors had
ratios of 7.3 and 4.5 in two runs."""


@dataclass(frozen=True)
class Verdict:
    """What became of a cell: ``held``, ``WORSE``, ``disturbed``, ``not measured`` or ``new``."""

    key: str
    said: str
    committed: float | None = None
    found: float | None = None

    @property
    def line(self) -> str:
        """For the report."""
        shown = [f"{x:7.2f}x" if x is not None else f"{'':8}" for x in (self.committed, self.found)]
        return f"{self.said:13} {' '.join(shown)}  {self.key}"


def judged(committed: Record | None, tries: list[Record], key: str) -> Verdict:
    """Compare a cell's records with the committed one; the best that is undisturbed counts."""
    name = against(committed) if committed else None
    if committed is None or name is None:
        return Verdict(key, "new")
    before = committed["ratio"][name]
    ran = [record for record in tries if name in record.get("ratio", {})]
    if not ran:
        return Verdict(key, "not measured", before)
    still = [record for record in ran if not disturbed(record)]
    best = max(record["ratio"][name] for record in still or ran)
    if before <= best * (1.0 + WORSE):
        return Verdict(key, "held", before, best)
    return Verdict(key, "WORSE" if still else "disturbed", before, best)


def checked(
    cell: matrix.Cell, committed: Record | None, measure: Callable[[matrix.Cell], Record]
) -> Verdict:
    """Measure a cell, and once more where it did not hold."""
    tries = [measure(cell)]
    verdict = judged(committed, tries, cell.key)
    if verdict.said in ("held", "new"):
        return verdict
    return judged(committed, [*tries, measure(cell)], cell.key)


def main() -> int:
    """1 where a cell is worse or cannot be measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="cells whose key contains this")
    parser.add_argument("--against", type=Path, default=RESULTS / "matrix.jsonl")
    chosen = parser.parse_args()
    committed = {record["key"]: record for record in read(chosen.against)}
    cells = matrix.chosen(matrix.CHECKED, only=chosen.only)
    verdicts = [
        checked(cell, committed.get(cell.key), lambda one: in_a_process(one, TOLD))
        for cell in tqdm(cells, unit="cell")
    ]
    print(f"{'':13} {'committed':>8} {'now':>7}")
    print("\n".join(verdict.line for verdict in verdicts))
    bad = [verdict for verdict in verdicts if verdict.said in ("WORSE", "not measured")]
    print(f"bench-check: {f'FAILED: {len(bad)} cells' if bad else 'no ratio is worse'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
