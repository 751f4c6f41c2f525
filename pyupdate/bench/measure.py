# SPDX-License-Identifier: Apache-2.0
"""One workload and kind of step: who takes part is proven right, then timed in turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import timing, watch
from .contestants import OURS, Contestant, Optimizer, Workload
from .truth import WrongError, check

Proof = Callable[[Contestant, Any], float]


def measure(
    workload: Workload,
    kind: str,
    makers: dict[str, Optimizer],
    *,
    seconds: float,
    threads: int,
    rounds: int = 8,
    patience: float = 1.0,
    proof: Proof = check,
) -> dict[str, Any]:
    """Time the contestants that are right.

    Args:
        workload: what is stepped.
        kind: one of `contestants.KINDS`.
        makers: by name; `OURS` among them.
        seconds: of timing, at least; warm-up takes at most as long again, or two windows.
        threads: what `timing.settled` was given.
        rounds: of timing, at least.
        patience: for a machine that does not hold still, as `watch.interleave` takes it.
        proof: raises where a contestant is wrong; given it, and an optimizer of ours.

    Returns:
        Of every contestant the median and quartiles in ms, how far it is off the truth, and the
        GB/s of the least bytes that such a step of ours moves; its times over ours; what was wrong
        with those that were not timed; what part of the bare stream's GB/s ours are; and how the
        machine was meanwhile (`watch.Watched.facts`).

    Raises:
        WrongError: ours is wrong.
    """
    found, failed = _made(workload, kind, makers)
    ours = found[OURS]
    off: dict[str, float] = {}
    for name, one in list(found.items()):
        try:
            off[name] = proof(one, ours.optimizer)
        except Exception as error:  # whatever a peer raises: the others are still compared
            if one is ours:
                raise
            failed[name] = _said(error)
            del found[name]
    moved = _bytes(ours)
    runs: timing.Runs = {name: (one.prepare, one.run) for name, one in found.items()}
    bare = timing.stream(workload.elements, threads)
    if bare is not None:
        runs["stream"] = (lambda: None, bare[0])
    warm, steady = timing.warm_up(runs, seconds=seconds)
    watched = watch.interleave(runs, seconds=seconds, rounds=rounds, patience=patience)
    times = watched.times
    speeds = {
        name: moved * workload.elements / times[name].median / 1e9 if moved else None
        for name in found
    }
    streamed = bare[1] * workload.elements / times["stream"].median / 1e9 if bare else None
    return {
        "workload": workload.name,
        "tensors": len(workload.shapes),
        "elements": workload.elements,
        "kind": kind,
        "ms": {name: 1e3 * times[name].median for name in found},
        "quartiles_ms": {name: [1e3 * q for q in times[name].quartiles] for name in found},
        "off_eps": off,
        "ratio": {name: timing.ratio(times[name], times[OURS]) for name in found if name != OURS},
        "failed": failed,
        "warm_rounds": warm,
        "steady": steady,
        **watched.facts(),
        "bytes": moved,
        "GBps": speeds,
        "stream_GBps": streamed,
        "of_stream": _of_stream(times, moved, bare[1]) if bare and moved else None,
    }


def _made(
    workload: Workload, kind: str, makers: dict[str, Optimizer]
) -> tuple[dict[str, Contestant], dict[str, str]]:
    """The contestants, and why some could not be made."""
    found: dict[str, Contestant] = {}
    failed: dict[str, str] = {}
    for name, make in makers.items():
        try:
            like = next(iter(found.values()), None)
            found[name] = Contestant(name, workload, kind, make, like)
        except Exception as error:
            if name == OURS:
                raise
            failed[name] = _said(error)
    return found, failed


def _said(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return text if isinstance(error, WrongError) else f"{type(error).__name__}: {text}"


def _of_stream(times: dict[str, timing.Times], moved: float, bare: int) -> float:
    """By the rounds' ratios, for the speed of a shared machine's memory drifts."""
    return timing.ratio(times["stream"], times[OURS]) * moved / bare


def _bytes(ours: Contestant) -> float | None:
    """None for what no rule says whole (Muon, Adafactor)."""
    try:
        return ours.bytes
    except ValueError:
        return None
