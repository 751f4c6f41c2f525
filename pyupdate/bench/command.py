# SPDX-License-Identifier: Apache-2.0
"""``python -m pyupdate bench``: a minute on the user's own machine, and a table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from . import timing
from .contestants import BASELINE, OURS, Workload, contestants, of_torch
from .truth import check

WORKLOADS = (
    Workload("8 x 1024x1024", ((1024, 1024),) * 8),
    Workload("20 x 512x512, 100 x 512", ((512, 512),) * 20 + ((512,),) * 100),
    Workload("1,000 x 256", ((256,),) * 1000),
)
KINDS = ("step", "full", "average")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure AdamW, torch's three ways and ours, step by step in turn, and print a table.

    Args:
        arguments: the command line after ``bench``; None for this process's.

    Returns:
        The exit status: 1 where a contestant is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m pyupdate bench",
        description="AdamW's update by torch and by pyupdate, step by step in turn.",
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="about so long (default 60)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    chosen = parser.parse_args(arguments)
    if chosen.threads < 1 or not chosen.seconds > 0.0:
        parser.error("--threads must be at least 1 and --seconds more than 0")
    cells = []
    # Of the time a third goes to making the contestants and proving them right.
    each = chosen.seconds / 1.5 / (len(WORKLOADS) * len(KINDS))
    with timing.settled(chosen.threads):
        before = timing.calibrate()
        with _bar(len(WORKLOADS) * len(KINDS), quiet=chosen.json) as advance:
            for workload in WORKLOADS:
                for kind in KINDS:
                    cells.append(measure(workload, kind, seconds=each, threads=chosen.threads))
                    advance()
        moved = timing.moved(before, timing.calibrate())
    result = {"machine": timing.machine(chosen.threads), "moved": moved, "cells": cells}
    sys.stdout.write((json.dumps(result, indent=2) if chosen.json else as_text(result)) + "\n")
    return 0


def measure(workload: Workload, kind: str, *, seconds: float, threads: int) -> dict[str, Any]:
    """One workload and kind.

    Returns:
        Of every contestant the median and quartiles in ms, how far it is off the truth, and torch's
        times over ours; of ours the GB/s, and what part of the bare stream's that is.
    """
    pair = contestants(workload, kind, of_torch(kind))
    ours = pair[-1]
    off = {one.name: check(one, ours.optimizer) for one in pair}
    runs: dict[str, Any] = {one.name: (one.prepare, one.run) for one in pair}
    bare = timing.stream(workload.elements, threads)
    if bare is not None:
        runs["stream"] = (lambda: None, bare[0])
    times = timing.interleave(runs, seconds=seconds, rounds=8)
    speed = ours.bytes * workload.elements / times[OURS].median / 1e9
    found: dict[str, Any] = {
        "workload": workload.name,
        "kind": kind,
        "ms": {one.name: 1e3 * times[one.name].median for one in pair},
        "quartiles_ms": {one.name: [1e3 * q for q in times[one.name].quartiles] for one in pair},
        "off_eps": off,
        "ratio": {one.name: timing.ratio(times[one.name], times[OURS]) for one in pair[:-1]},
        "rounds": len(times[OURS].seconds),
        "bytes": ours.bytes,
        "GBps": speed,
        "of_stream": None,
    }
    if bare is not None:
        streamed = bare[1] * workload.elements / times["stream"].median / 1e9
        found["of_stream"] = speed / streamed
    return found


def as_text(result: dict[str, Any]) -> str:
    """The table."""
    machine, cells = result["machine"], result["cells"]
    names = list(cells[0]["ms"])
    lines = [
        f"AdamW, fp32, {machine['threads']} threads; {machine['machine']}; "
        f"torch {machine['torch']}; back end {machine['backend']}",
        "",
        f"{'workload':26}{'':8}{''.join(f'{name:>15}' for name in names)}"
        f"{f'{BASELINE}/ours':>18}{'GB/s':>7}{'of stream':>11}",
    ]
    for cell in cells:
        of = "" if cell["of_stream"] is None else f"{100 * cell['of_stream']:.0f} %"
        times = "".join(f"{cell['ms'][name]:12.3f} ms" for name in names)
        lines.append(
            f"{cell['workload']:26}{cell['kind']:8}{times}{cell['ratio'][BASELINE]:17.2f}x"
            f"{cell['GBps']:7.1f}{of:>11}"
        )
    lines += [
        "",
        "step: the optimizer's alone. full: unscale, finite check, clip by the global norm, step.",
        "average: that and a moving average. Medians of steps taken in turn; each contestant was",
        "checked against the rule in fp64 first. of stream: the bandwidth of ours over that of a",
        "bare loop over AdamW's seven streams; above 100 % a cache helps.",
    ]
    if result["moved"] > timing.MOVED:
        lines.append(
            f"DISTURBED: a fixed loop over memory took {100 * result['moved']:.0f} % longer at one "
            "end of the run than at the other; run it again on a quieter machine."
        )
    return "\n".join(lines)


@contextmanager
def _bar(total: int, *, quiet: bool) -> Iterator[Callable[[], object]]:
    """A progress bar on a terminal that has tqdm, nothing elsewhere."""
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        yield lambda: None
        return
    with tqdm(
        total=total, unit="cell", leave=False, disable=quiet or not sys.stderr.isatty()
    ) as bar:
        yield bar.update
