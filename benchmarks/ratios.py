# SPDX-License-Identifier: Apache-2.0
"""The ratios that README.md states: torch's time over pyupdate's, step by step in turn.

    python benchmarks/ratios.py                 # all workloads, three processes each
    python benchmarks/ratios.py --processes 1   # a first look

A pair is measured in a process of its own, with no other model alive: compared with the rule in
fp64, warmed up, then timed in rounds of one step each, in alternating order, with garbage
collection off. Said is the median over the rounds' ratios. Before and after, a fixed stream of
memory is timed; where the two differ by more than 15 %, the machine was not the same throughout,
and the process is thrown away and repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm
from workloads import DEFAULTS, LAYERWISE, THREADS, WORKLOADS, pair

from pyupdate import optim
from pyupdate.bench import timing
from pyupdate.bench.contestants import KINDS, OURS, Workload
from pyupdate.bench.timing import MOVED
from pyupdate.bench.truth import check

SECONDS = 4.0  # of timing, at least
ATTEMPTS = 5
ALL_KINDS = (*KINDS, *DEFAULTS, *LAYERWISE)
RESULTS = Path(__file__).resolve().parent / "results"


def measure(workload: Workload, kind: str) -> dict[str, Any]:
    """One process's answer for one pair."""
    with timing.settled(THREADS):
        before = timing.calibrate()
        baseline, ours = both = pair(workload, kind)
        rule = optim.AdamW(baseline.params) if kind in LAYERWISE else ours.optimizer
        off = {
            one.name: check(one, like)
            for one, like in zip(both, (rule, ours.optimizer), strict=True)
        }
        moved = ours.bytes
        runs = {one.name: (one.prepare, one.run) for one in both}
        timing.warm_up(runs)
        times = timing.interleave(runs, seconds=SECONDS)
        name = baseline.name
        del baseline, ours, both, runs, rule
        after = timing.calibrate()
    return {
        "ratio": timing.ratio(times[name], times[OURS]),
        "rounds": len(times[OURS].seconds),
        "baseline": name,
        "baseline_ms": 1e3 * times[name].median,
        "pyupdate_ms": 1e3 * times[OURS].median,
        "bytes": moved,
        "off_eps": off,
        "calibration_ms": [1e3 * before, 1e3 * after],
        "moved": timing.moved(before, after),
    }


def in_a_process(workload: str, kind: str) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__)), "--one", workload, kind]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def cell(workload: Workload, kind: str, processes: int, bar: Any) -> dict[str, Any]:
    """Several processes for one pair, without those in which the machine moved."""
    kept: list[dict[str, Any]] = []
    thrown: list[dict[str, Any]] = []
    while len(kept) < processes:
        bar.set_postfix_str(f"{kind}: {workload.name}")
        found = in_a_process(workload.name, kind)
        if found["moved"] <= MOVED:
            kept.append(found)
            bar.update()
        else:
            thrown.append(found)
            if len(thrown) > processes * ATTEMPTS:
                message = f"the machine is not steady: {len(thrown)} processes were thrown away"
                raise RuntimeError(message)
    ratio = statistics.median(one["ratio"] for one in kept)
    bound = kept[0]["bytes"] * workload.elements / 1e6  # MB; over ms it is GB/s
    return {
        "workload": workload.name,
        "kind": kind,
        "target": workload.targets[kind],
        "ratio": ratio,
        "reached": ratio >= workload.targets[kind],
        "baseline": kept[0]["baseline"],
        "pyupdate_GBps": bound / statistics.median(one["pyupdate_ms"] for one in kept),
        "processes": kept,
        "thrown_away": thrown,
    }


def as_text(cells: list[dict[str, Any]]) -> str:
    lines = [
        f"{'':8} {'workload':24} {'against':11} {'target':>7} {'ratio':>7}  "
        f"{'of the processes':20} {'its ms':>9} {'ours ms':>9} {'ours GB/s':>10}"
    ]
    for one in cells:
        each = " ".join(f"{process['ratio']:.2f}" for process in one["processes"])
        its_ms = statistics.median(process["baseline_ms"] for process in one["processes"])
        ours_ms = statistics.median(process["pyupdate_ms"] for process in one["processes"])
        lines.append(
            f"{one['kind']:8} {one['workload']:24} {one['baseline']:11} {one['target']:6.2f}x "
            f"{one['ratio']:6.2f}x  {each:20} {its_ms:9.3f} {ours_ms:9.3f} "
            f"{one['pyupdate_GBps']:10.1f}{'' if one['reached'] else '   below the target'}"
        )
    return "\n".join(lines)


def as_markdown(cells: list[dict[str, Any]]) -> str:
    """The table of README.md."""
    found = {(one["workload"], one["kind"]): one for one in cells}
    kinds = [kind for kind in ALL_KINDS if any(one["kind"] == kind for one in cells)]
    lines = [f"| workload | {' | '.join(kinds)} |", "|---" * (1 + len(kinds)) + "|"]
    for workload in dict.fromkeys(one["workload"] for one in cells):
        row = [found.get((workload, kind)) for kind in kinds]
        shown = (f"{one['ratio']:.1f}x" if one else "" for one in row)
        lines.append(f"| {workload} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--only", help="workloads whose name contains this")
    parser.add_argument("--kind", action="append", choices=ALL_KINDS, help="may be repeated")
    parser.add_argument("--output", type=Path, default=RESULTS / "latest.json")
    parser.add_argument("--one", nargs=2, metavar=("WORKLOAD", "KIND"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(measure(WORKLOADS[chosen.one[0]], chosen.one[1])))
        return 0
    workloads = [w for w in WORKLOADS.values() if chosen.only is None or chosen.only in w.name]
    kinds = chosen.kind or ALL_KINDS
    pairs = [(w, kind) for kind in kinds for w in workloads if kind in w.targets]
    if not pairs:
        parser.error(f"no workload's name contains {chosen.only!r} and has such a kind")
    with tqdm(total=len(pairs) * chosen.processes, unit="process") as bar:
        cells = [cell(*pair, chosen.processes, bar) for pair in pairs]
    print(as_text(cells))
    print(f"\n{as_markdown(cells)}")
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(
        json.dumps({"machine": timing.machine(THREADS), "pairs": cells}, indent=2) + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
