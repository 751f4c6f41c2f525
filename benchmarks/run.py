# SPDX-License-Identifier: Apache-2.0
"""The matrix: every cell of `matrix.py`, measured, drawn, and written in docs/benchmarks.md.

    make bench                                 # all: 25 minutes on two cores
    make bench BENCH='--minutes 12'            # the most telling cells; the next run goes on
    make bench BENCH=--quick                   # a first look at every section: five minutes
    make bench BENCH='--section rules --rule Lion'
    .venv/bin/python benchmarks/run.py --list  # what there is

A cell is measured in a process of its own (`server.py`) and its record appended to build/bench/
cells.jsonl at once: an interruption loses one cell, and the next run goes on behind it. Records of
another machine, torch or source of pyupdate are measured again. A cell during which the machine did
not hold still is measured again a minute later, twice at most, and marked if it was never left
alone. When the minutes are over, what there is is published; of cells that were not reached, and
that this machine measured before, the published record stays, with the commit that it is of.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import matrix
import ratios
from budget import Budget
from measured import Record, absent
from publish import RESULTS, publish
from server import Server
from stamp import digest
from tqdm import tqdm
from workloads import EVERY

from pyupdate.bench import timing
from pyupdate.bench.contestants import KINDS

FOLDER = Path(__file__).resolve().parent.parent / "build" / "bench"
MINUTES = 25.0
SECONDS = 2.0
OF_QUICK = 0.3
ATTEMPTS = 3
LATER = 8
"""So many cells after it was disturbed a cell is measured again: the others may have gone then."""
FRESH = ("apart", "compiled", "costs")
"""Sections whose libraries do not bear others beside them, or that time what a start takes."""
LIMIT_S = 180.0
"""For one process: a peer that compiles for longer takes a tenth of the time of all cells."""


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing, then publish."""
    chosen = parse(arguments)
    among = matrix.QUICK if chosen.quick else tuple(matrix.cells())
    cells = matrix.chosen(
        among,
        only=chosen.only,
        sections=chosen.section,
        kinds=chosen.kind,
        rules=chosen.rule,
    )
    if chosen.list:
        print("\n".join(cell.key for cell in cells))
        return 0
    whole = len(cells) == len(list(matrix.cells()))
    folder = chosen.results or (RESULTS if whole or chosen.draw else chosen.folder)
    log = chosen.folder / "cells.jsonl"
    if chosen.fresh:
        log.unlink(missing_ok=True)
    missing = [] if chosen.draw else measure_all(cells, log, folder, chosen)
    here = Here(chosen.scale)
    records = [one for one in read(log) if here.made(one) or "why_not" in one]
    if not records:
        print("nothing was measured")
        return 0
    shown = publish(records, folder, absent=absent())
    print(f"{folder}: {len(shown)} cells of the matrix, {len(records)} of them from this run")
    if missing:
        print(f"{len(missing)} cells were not reached; the same command goes on with them")
    elif whole and not chosen.draw:
        log.replace(log.with_name("last.jsonl"))  # the next run measures anew
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="for all; 0: as long as it takes"
    )
    parser.add_argument("--quick", action="store_true", help="a few cells of every section")
    parser.add_argument("--only", default="", help="cells whose key contains this")
    parser.add_argument("--section", action="append", choices=matrix.SECTIONS)
    parser.add_argument("--kind", action="append", choices=KINDS)
    parser.add_argument("--rule", action="append", help="the name of an optimizer's class")
    parser.add_argument("--scale", type=float, default=1.0, help="of the models; 2: twice as deep")
    parser.add_argument("--seconds", type=float, help="of timing in a cell, at most")
    parser.add_argument("--attempts", type=int, default=ATTEMPTS, help="at a cell, if disturbed")
    parser.add_argument("--no-peers", action="store_true", help="torch and ours alone")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured")
    parser.add_argument("--list", action="store_true", help="print the cells and stop")
    parser.add_argument("--draw", action="store_true", help="publish what is there; measure none")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for cells.jsonl")
    parser.add_argument("--results", type=Path, help="in the place of benchmarks/results")
    chosen = parser.parse_args(arguments)
    if chosen.seconds is None:
        chosen.seconds = OF_QUICK if chosen.quick else SECONDS
    return chosen


def measure_all(
    cells: list[matrix.Cell], log: Path, folder: Path, chosen: argparse.Namespace
) -> list[matrix.Cell]:
    """Measure the cells of which there is no record, and those again that were disturbed.

    Returns:
        Those that are still without a record when the time is over.
    """
    budget = Budget(chosen.minutes or None)
    for record in (*read(folder / "matrix.jsonl"), *read(log)):
        budget.learn(record)
    here = Here(chosen.scale)
    tried = Counter(one["key"] for one in lines(log) if here.has(one))
    done = {one["key"]: one for one in read(log) if here.has(one)}
    left = [
        cell
        for cell in matrix.by_worth(cells)
        if cell.key not in done
        or (not settled(done[cell.key]) and tried[cell.key] < chosen.attempts)
    ]
    keys = {cell.key for cell in cells}
    with (
        Server() as server,
        tqdm(total=len(cells), initial=len(done.keys() & keys), unit="cell") as bar,
    ):
        while left:
            cell, *left = left
            seconds = budget.seconds([cell, *left], chosen.seconds)
            if not budget.fits(cell, seconds):
                continue
            ahead = sum(budget.takes(one, seconds) for one in (cell, *left))
            over = time.localtime(time.time() + min(ahead, budget.left()))
            bar.set_postfix_str(f"{cell.key}; over at {time.strftime('%H:%M', over)}")
            record = in_a_process(
                cell,
                server,
                seconds=seconds,
                scale=chosen.scale,
                with_peers=not chosen.no_peers,
                processes=1 if chosen.quick else ratios.PROCESSES,
                limit=min(LIMIT_S, 30.0 + budget.left()),
            )
            append(log, record)
            budget.learn(record)
            tried[cell.key] += 1
            if not settled(record) and tried[cell.key] < chosen.attempts:
                left.insert(LATER, cell)
            bar.update(cell.key not in done)
            done[cell.key] = record
    return [cell for cell in cells if cell.key not in done]


def settled(record: Record) -> bool:
    """Whether measuring a cell again would say no more."""
    return "why_not" in record or not timing.disturbed(record)


def in_a_process(
    cell: matrix.Cell,
    server: Server,
    *,
    seconds: float,
    scale: float = 1.0,
    with_peers: bool = True,
    processes: int = ratios.PROCESSES,
    limit: float = LIMIT_S,
) -> Record:
    """The record of a cell, with the time that it took; of one that fails, why."""
    begun = time.monotonic()
    told = {"seconds": seconds, "scale": scale, "with_peers": with_peers}
    try:
        if cell.section == "targets":
            found = of_target(cell, server, seconds=seconds, scale=scale, processes=processes)
        elif cell.section in FRESH:
            found = of_fresh(cell, limit=limit, **told)
        else:
            found = server.ask("cell", limit=limit, key=cell.key, **told)
    except RuntimeError as error:
        tqdm.write(f"{cell.key}: not measured: {error}", file=sys.stderr)
        found = without(cell, str(error))
    return found | {"took_s": round(time.monotonic() - begun, 2), "asked_s": seconds}


def of_fresh(
    cell: matrix.Cell, *, limit: float, seconds: float, scale: float, with_peers: bool
) -> Record:
    """What measured.py finds, in a new Python."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "record.json"
        program = Path(__file__).with_name("measured.py")
        told = ["--seconds", str(seconds), "--scale", str(scale)]
        told += [] if with_peers else ["--no-peers"]
        command = [sys.executable, str(program), cell.key, str(out), *told]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=limit
            )
        except subprocess.TimeoutExpired as error:
            message = f"it took more than {limit:.0f} s"
            raise RuntimeError(message) from error
        if not out.exists():
            raise RuntimeError((done.stderr.strip().splitlines() or ["it said nothing"])[-1])
        record: Record = json.loads(out.read_text())
        return record


def of_target(
    cell: matrix.Cell, server: Server, *, seconds: float, scale: float, processes: int
) -> Record:
    """What ratios.py finds, in several processes."""
    of, kind = cell.pair
    found = ratios.cell(EVERY[of], kind, server.target, processes=processes, seconds=seconds)
    return {"key": cell.key, **found, **cell.facts(), "scale": scale, "pair": [of, kind]}


def without(cell: matrix.Cell, why: str) -> Record:
    """The record of a cell that failed."""
    return {"key": cell.key, **cell.facts(), "why_not": why}


class Here:
    """This machine with these sources: which records stand. Sources may change during a run."""

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.machine = timing.machine(matrix.THREADS)
        self.sources = digest()

    def made(self, record: Record) -> bool:
        """Whether a record is of this machine, of whatever sources."""
        return (
            "machine" in record
            and ratios.same(record["machine"], self.machine)
            and record["scale"] == self.scale
        )

    def has(self, record: Record) -> bool:
        """Whether a cell needs no other record."""
        return self.made(record) and record["sources"] == self.sources


def append(path: Path, record: Record) -> None:
    """Keep a record, whatever happens next."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("\n" + json.dumps(record))  # ends what an interruption left of a line


def lines(path: Path) -> list[Record]:
    """All records of a file; half a line was interrupted."""
    found: list[Record] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:  # an empty one, too
            continue
    return found


def read(path: Path) -> list[Record]:
    """The quietest record of every key that is of its newest sources, in the matrix's order."""
    found: dict[str, list[Record]] = {}
    for record in lines(path):
        found.setdefault(record["key"], []).append(record)
    return [quietest(found[cell.key]) for cell in matrix.cells() if cell.key in found]


def quietest(records: list[Record]) -> Record:
    """The last of a cell's records that is undisturbed, or the least disturbed."""
    ran = [record for record in records if "why_not" not in record]
    of = [record for record in ran if record.get("sources") == ran[-1].get("sources")]
    return min(reversed(of), key=_disturbance) if of else records[-1]


def _disturbance(record: Record) -> float:
    others = (record.get("others") or 0.0) / timing.OTHERS
    return max(1.0, record["moved"] / timing.MOVED, others)


if __name__ == "__main__":
    sys.exit(main())
