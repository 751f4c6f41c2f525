# SPDX-License-Identifier: Apache-2.0
"""How it is timed: a step each in turn, medians, quartiles, and whether the machine held still."""

from __future__ import annotations

import datetime
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__, info

Runs = dict[str, tuple[Callable[[], object], Callable[[], object]]]
"""By name what is done off the clock, and then on it."""

MOVED = 0.15
"""A machine whose calibration moved by more was not the same throughout."""

WINDOW = 3
STEADY = 0.05
MOST_WARM = 30
"""Warm-up ends where, for everything that is timed, the medians of the last two windows of rounds
differ by less than a twentieth, or after so many rounds: on a shared machine they may never."""

ROUNDS = 30

CALIBRATION = 1 << 24
"""Elements of each of three arrays: 192 MiB, which no cache holds."""


@dataclass(frozen=True)
class Times:
    """Seconds of one contestant's rounds."""

    seconds: Sequence[float]

    @property
    def median(self) -> float:
        """Half of the rounds took less."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """A quarter of the rounds took less than the first, a quarter more than the second."""
        first, _, third = statistics.quantiles(self.seconds, n=4)
        return first, third


def ratio(theirs: Times, ours: Times) -> float:
    """The median over the rounds' ratios: what drifts enters both sides of each."""
    pairs = zip(theirs.seconds, ours.seconds, strict=True)
    return statistics.median(a / b for a, b in pairs)


def calibrate() -> float:
    """The median time of a stream through memory: a + b -> c."""
    a, b, c = (torch.ones(CALIBRATION, device="cpu") for _ in range(3))
    times = []
    for _ in range(15):
        start = time.perf_counter()
        torch.add(a, b, out=c)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def moved(before: float, after: float) -> float:
    """By what part two calibrations differ."""
    return max(before, after) / min(before, after) - 1.0


OTHERS = 0.1
"""Of the processors' time; where other processes took more, a measurement says little."""


def others() -> Callable[[], float | None]:
    """Watch what other processes take; the calibration does not see who is there all the time.

    Returns:
        Called later, the part of the processors' time that others took since, the hypervisor's
        included; None where the kernel does not tell (it is Linux that does).
    """
    start, busy, own = time.perf_counter(), _busy(), _own()

    def taken() -> float | None:
        now = _busy()
        if busy is None or now is None:
            return None
        whole = (time.perf_counter() - start) * (os.cpu_count() or 1)
        return max(0.0, (now - busy) - (_own() - own)) / whole

    return taken


def _busy() -> float | None:
    """Seconds that all processors were not idle since the machine began."""
    try:
        numbers = [
            int(one) for one in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        ]
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, steal = numbers
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    found = os.times()
    return found.user + found.system + found.children_user + found.children_system


def disturbed(record: dict[str, Any]) -> bool:
    """Whether the machine was not a measurement's own, by its ``moved`` and ``others``."""
    return record["moved"] > MOVED or (record.get("others") or 0.0) > OTHERS


@contextmanager
def settled(threads: int) -> Iterator[None]:
    """So many threads, and no garbage collection while the clock runs."""
    threads_before, collects = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(threads)
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
        torch.set_num_threads(threads_before)


def warm_up(runs: Runs, *, seconds: float = 10.0) -> tuple[int, bool]:
    """Take turns until the times stand still.

    Args:
        runs: as `interleave` takes them.
        seconds: after so long no further round begins, once two windows are there.

    Returns:
        The rounds that it took, and whether the times stood still.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    for count in range(1, MOST_WARM + 1):
        for name, run in runs.items():
            times[name].append(_timed(*run))
        if count >= 2 * WINDOW:
            if all(steady(found) for found in times.values()):
                return count, True
            if time.perf_counter() > end:
                return count, False
    return MOST_WARM, False


def steady(seconds: Sequence[float]) -> bool:
    """Whether the medians of the last two windows agree."""
    before = statistics.median(seconds[-2 * WINDOW : -WINDOW])
    return moved(before, statistics.median(seconds[-WINDOW:])) < STEADY


def _timed(prepare: Callable[[], object], run: Callable[[], object]) -> float:
    prepare()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleave(
    runs: Runs,
    *,
    seconds: float,
    rounds: int = ROUNDS,
    first: int = 0,
) -> dict[str, Times]:
    """Time several warm things in rounds of one turn each, the order reversed every other round.

    Args:
        runs: by name what is done off the clock, and then on it; `warm_up` has run them.
        seconds: for so long at least.
        rounds: and so many at least; quartiles need two.
        first: the number of the first round, which says in which order it is: an odd one reversed.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs.items())
    end = time.perf_counter() + seconds
    count = 0
    while count < rounds or time.perf_counter() < end:
        for name, run in order if (first + count) % 2 == 0 else reversed(order):
            times[name].append(_timed(*run))
        count += 1
    return {name: Times(found) for name, found in times.items()}


def stream(elements: int, threads: int) -> tuple[Callable[[], object], int] | None:
    """A turn through AdamW's seven streams without AdamW, and its bytes an element.

    None where pyupdate is not compiled, or from sources that had no such loop: Python has none.
    """
    try:
        from .. import _C
    except ImportError:
        return None
    kind = getattr(_C, "Stream", None)
    if kind is None:
        return None
    made = kind(elements)
    return (lambda: made.run(threads)), int(made.bytes)


def machine(threads: int) -> dict[str, Any]:
    """What a result has to say of where it was measured."""
    found = info.report()
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": found["machine"],
        "processors": found["threads"]["processors"],
        "threads": threads,
        "python": platform.python_version(),
        "torch": f"{torch.__version__} ({found['torch_build']})",
        "pyupdate": __version__,
        "backend": found["backend"],
        "instruction_set": (found["instruction_sets"] or {}).get("chosen"),
        "compiler": (found["build"] or {}).get("compiler"),
        "flags": (found["build"] or {}).get("flags"),
    }
