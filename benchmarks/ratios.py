# SPDX-License-Identifier: Apache-2.0
"""The ratios that README.md states: torch's time over pyupdate's, step by step in turn.

    python benchmarks/ratios.py                 # all workloads, three processes each
    python benchmarks/ratios.py --processes 1   # a first look

A pair is measured in a process of its own, with no other model alive: compared, warmed up, then
timed in rounds of one step each, in alternating order, with garbage collection off. Said is the
median over the rounds' ratios. Before and after, a fixed stream of memory is timed; where the two
differ by more than 15 %, the machine was not the same throughout, and the process is thrown away
and repeated.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from workloads import (
    DEFAULTS,
    KINDS,
    LAYERWISE,
    OURS,
    THREADS,
    WORKLOADS,
    Contestant,
    Workload,
    check_alike,
    optimizers,
)

import pyupdate
from pyupdate import info

ROUNDS = 30  # at least
SECONDS = 4.0  # of timing, at least
WARM = 5
MOVED = 0.15
ATTEMPTS = 5
ALL_KINDS = (*KINDS, *DEFAULTS, *LAYERWISE)
RESULTS = Path(__file__).resolve().parent / "results"


def calibrate() -> float:
    """The median time of a stream through 192 MiB, which no cache holds: a + b -> c."""
    a, b, c = (torch.ones(1 << 24) for _ in range(3))
    times = []
    for _ in range(15):
        start = time.perf_counter()
        torch.add(a, b, out=c)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def timed(contestant: Contestant) -> float:
    contestant.prepare()
    start = time.perf_counter()
    contestant.run()
    return time.perf_counter() - start


def measure(workload: Workload, kind: str) -> dict[str, Any]:
    """One process's answer for one pair."""
    torch.set_num_threads(THREADS)
    before = calibrate()
    baseline = next(iter(optimizers(kind)))
    pair = [Contestant(baseline, workload, kind), Contestant(OURS, workload, kind)]
    eps = None if kind in LAYERWISE else check_alike(*pair)  # LAMB is no AdamW
    moved = pair[1].bytes
    for contestant in pair * WARM:
        timed(contestant)
    gc.collect()
    gc.disable()
    times: dict[str, list[float]] = {baseline: [], OURS: []}
    end = time.perf_counter() + SECONDS
    while len(times[OURS]) < ROUNDS or time.perf_counter() < end:
        for contestant in pair if len(times[OURS]) % 2 == 0 else reversed(pair):
            times[contestant.name].append(timed(contestant))
    gc.enable()
    pair.clear()
    after = calibrate()
    ratios = [a / b for a, b in zip(times[baseline], times[OURS], strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "rounds": len(ratios),
        "baseline": baseline,
        "baseline_ms": 1e3 * statistics.median(times[baseline]),
        "pyupdate_ms": 1e3 * statistics.median(times[OURS]),
        "bytes": moved,
        "differ_eps": eps,
        "calibration_ms": [1e3 * before, 1e3 * after],
        "moved": max(before, after) / min(before, after) - 1.0,
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


def machine() -> dict[str, Any]:
    found = info.report()
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": found["machine"],
        "processors": found["threads"]["processors"],
        "threads": THREADS,
        "python": platform.python_version(),
        "torch": f"{torch.__version__} ({found['torch_build']})",
        "pyupdate": pyupdate.__version__,
        "backend": found["backend"],
        "instruction_set": (found["instruction_sets"] or {}).get("chosen"),
        "compiler": (found["build"] or {}).get("compiler"),
        "flags": (found["build"] or {}).get("flags"),
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
    chosen.output.write_text(json.dumps({"machine": machine(), "pairs": cells}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
