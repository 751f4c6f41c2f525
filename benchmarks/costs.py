# SPDX-License-Identifier: Apache-2.0
"""What a user pays once: import time, the first step's time, and memory at its peak.

Every figure is the median of fresh processes. Peak memory is what the kernel saw resident above
what parameters and gradients took before the optimizer was made (Linux: VmHWM, reset), after three
steps.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from matrix import Cell

from pyupdate.bench import timing
from pyupdate.bench.contestants import Contestant, of_torch

STEPS = 3
PROCESSES = 3  # of each; the median counts
IMPORTS = """
import json, time
start = time.perf_counter()
import torch
between = time.perf_counter()
import pyupdate
pyupdate.optim.AdamW
print(json.dumps([between - start, time.perf_counter() - between]))
"""


def measured(cell: Cell) -> dict[str, Any]:
    """Import, first step and memory of every contestant of a cell."""
    taken = timing.others()
    imports = [json.loads(_child("-c", IMPORTS)) for _ in range(PROCESSES)]
    costs: dict[str, dict[str, float]] = {}
    moved = []
    for name in of_torch(cell.kind, cell.rule):
        given = json.dumps([cell.of, cell.kind, cell.rule, name])
        found = [json.loads(_child(__file__, given)) for _ in range(PROCESSES)]
        moved.append(statistics.median(one.pop("moved") for one in found))
        costs[name] = {key: statistics.median(one[key] for one in found) for key in found[0]}
    torch_s, ours_s = (statistics.median(times) for times in zip(*imports, strict=True))
    return {
        "costs": costs,
        "import_ms": {"torch": 1e3 * torch_s, "pyupdate": 1e3 * ours_s},
        "moved": max(moved),
        "others": taken(),
    }


def of_one(of: str, kind: str, rule: str, name: str) -> dict[str, float]:
    """In a process of its own: one contestant's first step, its next, and its memory."""
    workload = Cell("costs", of, kind, rule).workload()
    make = of_torch(kind, rule)[name]
    before = [0.0]

    def made(params: Any) -> Any:
        before[0] = peak(reset=True)
        return make(params)

    gauged = timing.calibrate()  # before `made` looks at the memory that is taken
    one = Contestant(name, workload, kind, made)
    times = []
    for _ in range(STEPS):
        one.prepare()
        start = time.perf_counter()
        one.run()
        times.append(time.perf_counter() - start)
    most = peak() - before[0]
    return {
        "first_ms": 1e3 * times[0],
        "third_ms": 1e3 * times[-1],
        "peak_bytes": most / workload.elements,
        "moved": timing.moved(gauged, timing.calibrate()),
    }


def peak(*, reset: bool = False) -> float:
    """The most bytes that were resident since the last reset; after a reset, those that are."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024.0 * float(status.split("VmHWM:")[1].split()[0])


def _child(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


if __name__ == "__main__":
    print(json.dumps(of_one(*json.loads(sys.argv[1]))))
