# SPDX-License-Identifier: Apache-2.0
"""A cell of the matrix, measured in this process: who takes part, who is proven how, and the times.

`run.py` starts a process for each; nothing else is alive in it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import costs
import torch
import training
from matrix import COMPILED, WITH_PEERS, Cell
from proofs import COMPOSITE, check_composite

import pyupdate
from pyupdate import optim
from pyupdate.bench import timing
from pyupdate.bench.contestants import BASELINE, OURS, Optimizer, of_torch
from pyupdate.bench.measure import measure
from pyupdate.bench.truth import check

try:
    import peers
except ImportError:  # they come with requirements of their own
    peers = None

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 10
TORCHS = (BASELINE, "torch foreach", "torch loop", "torch")
"""What a ratio is to: the first of these that can make the step."""

Record = dict[str, Any]


def measured(cell: Cell, *, seconds: float, scale: float = 1.0, with_peers: bool = True) -> Record:
    """Measure one cell, with the machine's calibration before and after.

    Args:
        cell: what.
        seconds: of timing, at least.
        scale: of the models, as `shapes.Model.shapes` takes it.
        with_peers: whether other libraries than torch take part.
    """
    with timing.settled(cell.threads):
        before = timing.calibrate()
        if cell.section == "training":
            found = training.measured(cell.of, seconds=seconds)
        elif cell.section == "costs":
            found = costs.measured(cell)
        else:
            found = measure(
                cell.workload(scale),
                cell.kind,
                makers(cell, with_peers=with_peers),
                seconds=seconds,
                threads=cell.threads,
                rounds=ROUNDS,
                proof=proof(cell),
            )
        after = timing.calibrate()
    return {
        "key": cell.key,
        **cell.facts(),
        **found,
        "scale": scale,
        "calibration_ms": [1e3 * before, 1e3 * after],
        "moved": timing.moved(before, after),
        "commit": commit(),
        "machine": timing.machine(cell.threads),
    }


def makers(cell: Cell, *, with_peers: bool = True) -> dict[str, Optimizer]:
    """The contestants of a cell, ours last."""
    if cell.rule in COMPOSITE:
        return {"torch": getattr(torch.optim, cell.rule), OURS: getattr(optim, cell.rule)}
    found = of_torch(cell.kind, cell.rule)
    ours = found.pop(OURS)
    if cell.section == "elements" and int(cell.of) > 10**8:
        found = {BASELINE: found[BASELINE]}  # the others' temporaries do not fit 24 GiB beside it
    if cell.section == "backends":
        found = {BASELINE: found[BASELINE]}
        found[f"{OURS} in Python"] = on("reference", ours)
    joined = cell.section in ("kinds", "rules") and cell.of in WITH_PEERS
    if peers is not None and with_peers and joined:
        found |= peers.makers(cell.kind, cell.rule)
        if (cell.section, cell.of, cell.kind) not in COMPILED:
            for name in (peers.COMPILED, "heavyball"):
                found.pop(name, None)
    return found | {OURS: ours}


def on(backend: str, make: Optimizer) -> Optimizer:
    """The same optimizer, stepped by a back end."""

    def made(params: list[torch.nn.Parameter]) -> Any:
        optimizer = make(params)
        step = optimizer.step

        def stepped(**given: Any) -> None:
            with pyupdate.use_backend(backend):
                step(**given)

        optimizer.step = stepped
        return optimizer

    return made


def proof(cell: Cell) -> Callable[[Any, Any], float]:
    """What proves the contestants of a cell right."""
    if cell.rule in COMPOSITE:
        return check_composite
    return getattr(peers, "check", check)


def absent() -> dict[str, str]:
    """Who is not compared, and why: peers, and back ends that cannot run here."""
    from pyupdate.backends import available

    found = {f"back end {name}": why for name, why in available() if why is not None}
    return found | (peers.absent() if peers is not None else {})


def against(record: Record) -> str | None:
    """Torch's best way to make the step of a record, None where torch has none."""
    return next((name for name in TORCHS if name in record.get("ratio", {})), None)


def commit() -> str | None:
    """Which sources; None outside a checkout of git."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
