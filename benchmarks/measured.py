# SPDX-License-Identifier: Apache-2.0
"""A cell of the matrix, measured in this process: who takes part, who is proven how, and the times.

    python benchmarks/measured.py rules/ResNet-50/step/Lion/float32/2 record.json

`run.py` starts a process for each; nothing else is alive in it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apart
import costs
import torch
import training
from matrix import SIDE_BY_SIDE, WITH_PEERS, Cell, cells
from proofs import COMPOSITE, check_composite
from stamp import digest, stamp

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

ROUNDS = 8
PATIENCE = 2.0
TORCHS = (BASELINE, "torch foreach", "torch loop", "torch")
"""What a ratio is to: the first of these that can make the step."""

LOADED = digest()
"""Of the bytes that this process runs: those on the disk may be others when a cell begins."""

Record = dict[str, Any]


def measured(cell: Cell, *, seconds: float, scale: float = 1.0, with_peers: bool = True) -> Record:
    """Measure one cell; the record says of which sources, and how the machine was meanwhile.

    Args:
        cell: what.
        seconds: of timing, at least.
        scale: of the models, as `shapes.Model.shapes` takes it.
        with_peers: whether other libraries than torch take part.
    """
    made = stamp() | {"sources": LOADED}
    with timing.settled(cell.threads):
        if cell.section == "training":
            found = training.measured(cell.of, seconds=seconds)
        elif cell.section == "costs":
            found = costs.measured(cell)
        elif cell.section == "apart":
            found = apart.measure(*cell.of.split(", "), cell.kind, seconds=seconds)
        else:
            found = measure(
                cell.workload(scale),
                cell.kind,
                makers(cell, with_peers=with_peers),
                seconds=seconds,
                threads=cell.threads,
                rounds=ROUNDS,
                patience=PATIENCE,
                proof=proof(cell),
            )
    return {
        "key": cell.key,
        **cell.facts(),
        **found,
        "scale": scale,
        **made,
        "changed_meanwhile": stamp() != made,
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
    if cell.section in ("tensors", "elements") and cell.threads == 1:
        found = {BASELINE: found[BASELINE]}  # the others' lines lie beneath one another
    if cell.section == "backends":
        found = {BASELINE: found[BASELINE]}
        found[f"{OURS} in Python"] = on("reference", ours)
    compiled = cell.section == "compiled"
    if compiled:
        found = {BASELINE: found[BASELINE]}
    joined = cell.section in SIDE_BY_SIDE and cell.of in WITH_PEERS
    if peers is not None and with_peers and (joined or compiled):
        others = peers.makers(cell.kind, cell.rule)
        found |= {name: make for name, make in others.items() if peers.compiles(name) == compiled}
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


def main() -> int:
    """Measure one cell and write its record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("key", help="of a cell: benchmarks/run.py --list")
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--no-peers", action="store_true")
    chosen = parser.parse_args()
    cell = next((cell for cell in cells() if cell.key == chosen.key), None)
    if cell is None:
        parser.error(f"there is no cell {chosen.key!r}")
    found = measured(
        cell, seconds=chosen.seconds, scale=chosen.scale, with_peers=not chosen.no_peers
    )
    chosen.output.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
