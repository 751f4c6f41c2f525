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
from .contestants import BASELINE, OURS, Workload, of_torch
from .measure import measure

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
                    found = measure(
                        workload, kind, of_torch(kind), seconds=each, threads=chosen.threads
                    )
                    cells.append(found)
                    advance()
        moved = timing.moved(before, timing.calibrate())
    result = {"machine": timing.machine(chosen.threads), "moved": moved, "cells": cells}
    sys.stdout.write((json.dumps(result, indent=2) if chosen.json else as_text(result)) + "\n")
    return 1 if any(cell["failed"] for cell in cells) else 0


def as_text(result: dict[str, Any]) -> str:
    """The table."""
    machine, cells = result["machine"], result["cells"]
    names = list(dict.fromkeys(name for cell in cells for name in (*cell["ms"], *cell["failed"])))
    lines = [
        f"AdamW, fp32, {machine['threads']} threads; {machine['machine']}; "
        f"torch {machine['torch']}; back end {machine['backend']}",
        "",
        f"{'workload':26}{'':8}{''.join(f'{name:>15}' for name in names)}"
        f"{f'{BASELINE}/ours':>18}{'GB/s':>7}{'of stream':>11}",
    ]
    for cell in cells:
        of = "" if cell["of_stream"] is None else f"{100 * cell['of_stream']:.0f} %"
        times = "".join(
            f"{cell['ms'][name]:12.3f} ms" if name in cell["ms"] else f"{'wrong':>15}"
            for name in names
        )
        ratio = f"{cell['ratio'][BASELINE]:.2f}x" if BASELINE in cell["ratio"] else ""
        lines.append(
            f"{cell['workload']:26}{cell['kind']:8}{times}{ratio:>18}"
            f"{cell['GBps'][OURS]:7.1f}{of:>11}"
        )
        lines += [f"  NOT TIMED: {name}: {why}" for name, why in cell["failed"].items()]
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
