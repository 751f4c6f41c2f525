# SPDX-License-Identifier: Apache-2.0
"""The matrix: every cell of `matrix.py`, measured, drawn, and written in docs/benchmarks.md.

    make bench                                 # all: about half an hour on two cores
    make bench BENCH=--quick                   # a first look: three minutes
    make bench BENCH='--section rules --rule Lion'
    .venv/bin/python benchmarks/run.py --list  # what there is

A cell is measured in a process of its own and its record appended to build/bench/cells.jsonl at
once: an interruption loses one cell, and the next run goes on behind it. Records of another
machine, torch or build of pyupdate are measured again. Where the machine's calibration moved by
more than 15 %, or other processes took more than a tenth of the processors' time, a cell is
repeated, twice at most, and marked if it was never left alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matrix
from measured import Record, absent, measured
from publish import publish
from tqdm import tqdm

from pyupdate.bench import timing
from pyupdate.bench.contestants import KINDS

ROOT = Path(__file__).resolve().parent.parent
CELLS = ROOT / "build" / "bench" / "cells.jsonl"
RESULTS = ROOT / "benchmarks" / "results"
SECONDS = 2.0
ATTEMPTS = 3
LIMIT_S = 300
"""For one process: a peer that compiles for longer is no use in a table of a hundred cells."""

FINGERPRINT = ("machine", "processors", "python", "torch", "pyupdate", "backend", "compiler")
"""Facts of a machine that a record must share to stand beside new ones."""


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing, then publish."""
    chosen = parse(arguments)
    if chosen.one:
        cell = next(cell for cell in matrix.cells() if cell.key == chosen.one)
        found = measured(
            cell, seconds=chosen.seconds, scale=chosen.scale, with_peers=not chosen.no_peers
        )
        chosen.output.write_text(json.dumps(found))
        return 0
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
    if chosen.fresh:
        CELLS.unlink(missing_ok=True)
    complete = chosen.draw or measure_all(cells, chosen)
    if not complete:
        return 0
    whole = len(cells) == len(list(matrix.cells()))
    folder = RESULTS if whole or chosen.draw else CELLS.parent
    records = read(CELLS)
    publish(records, folder, absent=absent())
    print(f"{folder}: {len(records)} cells of the matrix")
    if whole and not chosen.draw:
        CELLS.replace(CELLS.with_name("last.jsonl"))  # the next run measures anew
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few cells, some three minutes")
    parser.add_argument("--only", default="", help="cells whose key contains this")
    parser.add_argument("--section", action="append", choices=matrix.SECTIONS)
    parser.add_argument("--kind", action="append", choices=KINDS)
    parser.add_argument("--rule", action="append", help="the name of an optimizer's class")
    parser.add_argument("--scale", type=float, default=1.0, help="of the models; 2: twice as deep")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of timing in a cell")
    parser.add_argument("--attempts", type=int, default=ATTEMPTS, help="at a cell, if disturbed")
    parser.add_argument("--within", type=float, help="begin no cell after so many seconds")
    parser.add_argument("--no-peers", action="store_true", help="torch and ours alone")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured")
    parser.add_argument("--list", action="store_true", help="print the cells and stop")
    parser.add_argument("--draw", action="store_true", help="publish what is there; measure none")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def measure_all(cells: list[matrix.Cell], chosen: argparse.Namespace) -> bool:
    """Measure the cells of which there is no record; whether there is one of each now."""
    here = timing.machine(matrix.THREADS)
    done = {record["key"] for record in read(CELLS) if stands(record, here, chosen.scale)}
    missing = [cell for cell in cells if cell.key not in done]
    begun = time.monotonic()
    with tqdm(total=len(cells), initial=len(cells) - len(missing), unit="cell") as bar:
        for cell in missing:
            if chosen.within is not None and time.monotonic() - begun > chosen.within:
                return False
            bar.set_postfix_str(cell.key)
            append(CELLS, steadiest(cell, given(chosen), chosen.attempts))
            bar.update()
    return True


def given(chosen: argparse.Namespace) -> list[str]:
    """What a cell's process is told of the command line."""
    told = ["--seconds", str(chosen.seconds), "--scale", str(chosen.scale)]
    return [*told, *(["--no-peers"] if chosen.no_peers else [])]


def steadiest(cell: matrix.Cell, told: list[str], attempts: int = ATTEMPTS) -> Record:
    """The first record during which the machine held still, or the one in which it moved least."""
    found: list[Record] = []
    while len(found) < attempts:
        found.append(in_a_process(cell, told))
        if "why_not" in found[-1] or not timing.disturbed(found[-1]):
            break
    return min(found, key=_disturbance)


def _disturbance(record: Record) -> float:
    return max(
        record.get("moved", 0.0) / timing.MOVED, (record.get("others") or 0.0) / timing.OTHERS
    )


def in_a_process(cell: matrix.Cell, told: list[str]) -> Record:
    """The record of a cell; of one that fails, why."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "record.json"
        command = [sys.executable, __file__, "--one", cell.key, "--output", str(out), *told]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=LIMIT_S
            )
            why = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        except subprocess.TimeoutExpired:
            why = f"it took more than {LIMIT_S} s"
        if out.exists():
            record: Record = json.loads(out.read_text())
            return record
    tqdm.write(f"{cell.key}: not measured: {why}", file=sys.stderr)
    return {"key": cell.key, **cell.facts(), "why_not": why}


def stands(record: Record, here: dict[str, Any], scale: float) -> bool:
    """Whether a record can stand beside what this machine measures now."""
    there = record.get("machine")
    if there is None or record["scale"] != scale:
        return False
    return all(there[fact] == here[fact] for fact in FINGERPRINT)


def append(path: Path, record: Record) -> None:
    """Keep a record, whatever happens next."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("\n" + json.dumps(record))  # ends what an interruption left of a line


def read(path: Path) -> list[Record]:
    """The last record of every key, in the order of the matrix; half a line was interrupted."""
    found: dict[str, Record] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # an empty one, too
            continue
        found[record["key"]] = record
    return [found[cell.key] for cell in matrix.cells() if cell.key in found]


if __name__ == "__main__":
    sys.exit(main())
