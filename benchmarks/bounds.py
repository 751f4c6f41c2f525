# SPDX-License-Identifier: Apache-2.0
"""How far the ratios of `ratios.py` can go on this machine: torch's time over that of bare loops.

    python benchmarks/bounds.py

The bare loops move the bytes of a step of ours and compute nothing of it: one turn through AdamW's
seven streams, before it one through the gradients where there is a norm, with two streams more
where there is an average. A workload of many small tensors also does, from C++, what every step
must that keeps the promise to trust no pointer of the one before and to tell autograd what it
wrote: it asks for every gradient, reads each tensor once through torch's exchange API, and has
torch count one version more of every parameter. Torch, pyupdate and the loops take turns in one
process, so each finds the caches as the others have left them; of one thread and two the faster
counts. Where torch's time over the loops' is below a target, no update in so many passes reaches
the target on this machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from torch.autograd.graph import increment_version
from workloads import THREADS, WORKLOADS, pair

from pyupdate import _C
from pyupdate.bench import timing, watch
from pyupdate.bench.contestants import CLIPPED, KINDS, OURS, Contestant, Workload
from pyupdate.bench.truth import check

BARE = "bare"
BYTES = 28.0  # that the loops move an element, as AdamW in float32
SECONDS = 4.0  # of timing a pair, at least
SMALL = 1 << 12  # elements of a tensor, below which its objects cost as much as its numbers
ONE_THREAD = 1 << 19  # elements, below which a second thread may be no gain


def bare_loops(workload: Workload, kind: str, ours: Contestant, threads: int) -> Callable[[], None]:
    """What moves the bytes of a step, whose state exists already, and computes nothing of it."""
    stream = _C.Stream(workload.elements, kind == "average")
    small = workload.elements // len(workload.shapes) < SMALL
    rows = _rows(ours) if small else []
    reader = _C.Reader(torch.Tensor, rows)
    written = [row[0] for row in rows]

    def run() -> None:
        reader.read()
        if kind in CLIPPED:
            stream.read(threads)
        increment_version(written)
        stream.run(threads)

    return run


def _rows(ours: Contestant) -> list[list[torch.Tensor]]:
    """Each parameter and its state."""
    rows = []
    for param in ours.params:
        of_state = ours.optimizer.state[param].values()
        rows.append([param, *(value for value in of_state if torch.is_tensor(value))])
    return rows


def _timed(
    workload: Workload, kind: str, theirs: timing.Runs, ours: Contestant, seconds: float
) -> watch.Watched:
    """A baseline and the bare loops in turns, those of the faster number of threads."""
    found = []
    small = workload.elements < ONE_THREAD
    for threads in (1, THREADS) if small else (THREADS,):
        loops = bare_loops(workload, kind, ours, threads)
        runs: timing.Runs = theirs | {BARE: (lambda: None, loops)}
        timing.warm_up(runs, seconds=seconds)
        found.append(watch.interleave(runs, seconds=seconds, patience=2.0))
    (name,) = theirs
    return max(found, key=lambda one: timing.ratio(one.times[name], one.times[BARE]))


def at_most(
    workload: Workload, kind: str, theirs: timing.Runs, ours: Contestant, *, seconds: float
) -> float:
    """What a baseline's time over ours can be here: its time over that of the bare loops.

    The loops have the streams of AdamW. For a rule with fewer bytes or more their time counts in
    that proportion, which takes reading for as fast as writing.

    Args:
        workload: what is stepped.
        kind: as `workloads.pair` takes it.
        theirs: the baseline, proven, and nobody else.
        ours: proven, for its bytes and its tensors' objects.
        seconds: of timing, at least.
    """
    times = _timed(workload, kind, theirs, ours, seconds).times
    (name,) = theirs
    found = timing.ratio(times[name], times[BARE])
    return found if kind in KINDS else found * BYTES / ours.bytes


def measure(workload: Workload, kind: str) -> dict[str, float]:
    """Milliseconds of torch, of ours and of the loops, and torch's over both."""
    with timing.settled(THREADS):
        baseline, ours = both = pair(workload, kind)
        for one in both:
            check(one, ours.optimizer)
        theirs: timing.Runs = {baseline.name: (baseline.prepare, baseline.run)}
        runs: timing.Runs = theirs | {OURS: (ours.prepare, ours.run)}
        timing.warm_up(runs, seconds=SECONDS)
        watched = {
            OURS: watch.interleave(runs, seconds=SECONDS, patience=2.0),
            BARE: _timed(workload, kind, theirs, ours, SECONDS),
        }
    times: dict[str, timing.Times] = {}
    ratios: dict[str, float] = {}
    for name, one in watched.items():
        times |= one.times
        ratios[name] = timing.ratio(one.times[baseline.name], one.times[name])
    moved = [one.moved for one in watched.values()]
    return {
        "torch": 1e3 * times[baseline.name].median,
        "ours": 1e3 * times[OURS].median,
        "bare": 1e3 * times[BARE].median,
        "reached": ratios[OURS],
        "at most": ratios[BARE],
        "target": workload.targets[kind],
        "moved": max(moved),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    parser.add_argument("--kind", action="append", choices=KINDS, help="may be repeated")
    chosen = parser.parse_args()
    print(f"{timing.machine(THREADS)['machine']}, {THREADS} threads, AdamW, float32")
    print(
        f"{'workload':26}{'kind':9}{'torch ms':>10}{'ours ms':>10}{'bare ms':>10}"
        f"{'reached':>10}{'at most':>10}{'target':>9}",
        flush=True,
    )
    for workload in WORKLOADS.values():
        for kind in chosen.kind or KINDS:
            if chosen.only not in workload.name or kind not in workload.targets:
                continue
            found = measure(workload, kind)
            times = "".join(f"{found[name]:10.3f}" for name in ("torch", "ours", "bare"))
            ratios = f"{found['reached']:9.2f}x{found['at most']:9.2f}x{found['target']:8.2f}x"
            mark = "  DISTURBED" if found["moved"] > timing.MOVED else ""
            print(f"{workload.name:26}{kind:9}{times}{ratios}{mark}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
