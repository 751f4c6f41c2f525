# SPDX-License-Identifier: Apache-2.0
"""The ratios that README.md states: torch's time over pyupdate's, step by step in turn.

    python benchmarks/ratios.py                 # all workloads, three processes each: ten minutes
    python benchmarks/ratios.py --processes 1   # a first look

A pair is measured in a process of its own, with no other model alive: compared with the rule in
fp64, warmed up, then timed in rounds of one step each, in alternating order, with garbage
collection off. Said is the median over the rounds' ratios, and of the processes. Rounds during
which the machine moved are thrown away (`pyupdate.bench.watch`); a process that has too few others
is repeated. One of them also times torch against the bare loops of `bounds.py`, which says what no
update can pass here. `make bench` does all this too; benchmarks/results/latest.json keeps a pair
until it is measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bounds
from server import Server
from stamp import stamp
from tqdm import tqdm
from workloads import DEFAULTS, EVERY, HELD, LAYERWISE, THREADS, WORKLOADS, pair

from pyupdate import optim
from pyupdate.bench import timing, watch
from pyupdate.bench.contestants import KINDS, OURS, Workload
from pyupdate.bench.truth import check

SECONDS = 4.0  # of timing, at least
PROCESSES = 3
REPEATED = 2  # processes of a pair, at most, because the machine moved
PATIENCE = 2.0
ALL_KINDS = (*KINDS, *DEFAULTS, *LAYERWISE)
LATEST = Path(__file__).resolve().parent / "results" / "latest.json"

FINGERPRINT = ("machine", "processors", "python", "torch", "pyupdate", "backend", "compiler")
"""Facts of a machine that a result must share to stand beside new ones."""

Found = dict[str, Any]


def measure(workload: Workload, kind: str, *, seconds: float, bare: bool = False) -> Found:
    """One process's answer for one pair; with the bare loops' time, too."""
    with timing.settled(THREADS):
        baseline, ours = both = pair(workload, kind)
        rule = optim.AdamW(baseline.params) if kind in LAYERWISE else ours.optimizer
        off = {
            one.name: check(one, like)
            for one, like in zip(both, (rule, ours.optimizer), strict=True)
        }
        runs: timing.Runs = {one.name: (one.prepare, one.run) for one in both}
        timing.warm_up(runs, seconds=seconds)
        watched = watch.interleave(runs, seconds=seconds, patience=PATIENCE)
        times, name = watched.times, baseline.name
        found = {
            "ratio": timing.ratio(times[name], times[OURS]),
            "baseline": name,
            "baseline_ms": 1e3 * times[name].median,
            "pyupdate_ms": 1e3 * times[OURS].median,
            "bytes": ours.bytes,
            "off_eps": off,
            **watched.facts(),
        }
        if bare:
            theirs = {name: runs[name]}
            found["at_most"] = bounds.at_most(workload, kind, theirs, ours, seconds=seconds)
    return found


def cell(
    workload: Workload,
    kind: str,
    ask: Callable[..., Found],
    *,
    processes: int = PROCESSES,
    seconds: float = SECONDS,
    tick: Callable[[], object] = lambda: None,
) -> Found:
    """Several processes for one pair, those in which the machine moved repeated.

    Args:
        workload: what is stepped.
        kind: as `workloads.pair` takes it.
        ask: makes a process's answer, as `server.Server.target`.
        processes: quiet ones.
        seconds: of timing in each.
        tick: called after every process.
    """
    made = stamp()
    still: list[Found] = []
    moved: list[Found] = []
    while len(still) < processes and len(moved) <= REPEATED:
        bare = "float32" in str(workload.dtype) and not still
        found = ask(workload.name, kind, seconds=seconds, bare=bare)
        (moved if timing.disturbed(found) else still).append(found)
        tick()
    kept = (still + sorted(moved, key=lambda one: float(one["moved"])))[:processes]
    ratio = statistics.median(one["ratio"] for one in kept)
    bound = kept[0]["bytes"] * workload.elements / 1e6  # MB; over ms it is GB/s
    target = workload.targets.get(kind)
    taken = [one["others"] for one in kept if one["others"] is not None]
    return {
        "workload": workload.name,
        "kind": kind,
        "target": target,
        "ratio": ratio,
        "reached": None if target is None else ratio >= target,
        "at_most": next((one["at_most"] for one in kept if "at_most" in one), None),
        "baseline": kept[0]["baseline"],
        "baseline_ms": statistics.median(one["baseline_ms"] for one in kept),
        "pyupdate_ms": statistics.median(one["pyupdate_ms"] for one in kept),
        "pyupdate_GBps": bound / statistics.median(one["pyupdate_ms"] for one in kept),
        "moved": max(one["moved"] for one in kept),
        "others": max(taken, default=None),
        "processes": kept,
        "thrown_away": [one for one in moved if one not in kept],
        **made,
        "changed_meanwhile": stamp() != made,
        "machine": timing.machine(THREADS),
    }


def as_text(cells: list[Found]) -> str:
    """A line a pair."""
    lines = [
        f"{'':8} {'workload':24} {'against':11} {'target':>7} {'ratio':>7} {'at most':>8}  "
        f"{'of the processes':20} {'its ms':>9} {'ours ms':>9} {'ours GB/s':>10}"
    ]
    for one in cells:
        each = " ".join(f"{process['ratio']:.2f}" for process in one["processes"])
        its_ms = statistics.median(process["baseline_ms"] for process in one["processes"])
        ours_ms = statistics.median(process["pyupdate_ms"] for process in one["processes"])
        said = ["   below the target"] if one["reached"] is False else []
        said += ["   DISTURBED"] if timing.disturbed({"moved": 0.0} | one) else []
        lines.append(
            f"{one['kind']:8} {one['workload']:24} {one['baseline']:11} {_times(one['target'])} "
            f"{_times(one['ratio'])} {_times(one.get('at_most'), 7)}  {each:20} {its_ms:9.3f} "
            f"{ours_ms:9.3f} {one['pyupdate_GBps']:10.1f}{''.join(said)}"
        )
    return "\n".join(lines)


def _times(ratio: float | None, width: int = 6) -> str:
    return " " * (width + 1) if ratio is None else f"{ratio:{width}.2f}x"


def as_markdown(cells: list[Found]) -> str:
    """The table of README.md: what has targets."""
    found = {(one["workload"], one["kind"]): one for one in cells if one["target"] is not None}
    kinds = [kind for kind in ALL_KINDS if any(kind == known for _, known in found)]
    lines = [f"| workload | {' | '.join(kinds)} |", "|---" * (1 + len(kinds)) + "|"]
    for workload in dict.fromkeys(workload for workload, _ in found):
        row = [found.get((workload, kind)) for kind in kinds]
        shown = (f"{one['ratio']:.1f}x" if one else "" for one in row)
        lines.append(f"| {workload} | {' | '.join(shown)} |")
    return "\n".join(lines)


def every_pair() -> list[tuple[Workload, str]]:
    """Those with a target, by kind, then those that are only held."""
    pairs = [(w, kind) for kind in ALL_KINDS for w in WORKLOADS.values() if kind in w.targets]
    return pairs + [(EVERY[of], kind) for of, kind in HELD if of not in WORKLOADS]


def keep(path: Path, cells: list[Found]) -> list[Found]:
    """Write pairs into a file, in the place of what it said of them; all that it says now.

    What was measured on another machine, or with another torch or build, leaves the file.
    """
    here = cells[-1]["machine"]
    pairs = {
        (one["workload"], one["kind"]): one
        for one in (*(read(path, here) if path.exists() else ()), *cells)
    }
    order = [(workload.name, kind) for workload, kind in every_pair()]
    kept = [pairs[name] for name in order if name in pairs]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": here, "pairs": kept}, indent=1) + "\n")
    return kept


def read(path: Path, here: dict[str, Any] | None = None) -> list[Found]:
    """The pairs of a file, each with its machine; of `here` alone, where that is given."""
    found = json.loads(path.read_text())
    pairs = [{"machine": found["machine"], **one} for one in found["pairs"]]
    return [one for one in pairs if here is None or same(one["machine"], here)]


def same(there: dict[str, Any], here: dict[str, Any]) -> bool:
    """Whether figures of two machines can stand beside one another."""
    return all(there[fact] == here[fact] for fact in FINGERPRINT)


def main() -> int:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of timing in a process")
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    parser.add_argument("--kind", action="append", choices=ALL_KINDS, help="may be repeated")
    parser.add_argument("--output", type=Path, default=LATEST)
    chosen = parser.parse_args()
    pairs = [
        (workload, kind)
        for workload, kind in every_pair()
        if chosen.only in workload.name and (not chosen.kind or kind in chosen.kind)
    ]
    if not pairs:
        parser.error(f"no workload's name contains {chosen.only!r} and has such a kind")
    cells = []
    with Server() as server, tqdm(total=len(pairs) * chosen.processes, unit="process") as bar:
        for workload, kind in pairs:
            bar.set_postfix_str(f"{kind}: {workload.name}")
            cells.append(
                cell(
                    workload,
                    kind,
                    server.target,
                    processes=chosen.processes,
                    seconds=chosen.seconds,
                    tick=bar.update,
                )
            )
    print(as_text(cells))
    print(f"\n{as_markdown(keep(chosen.output, cells))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
