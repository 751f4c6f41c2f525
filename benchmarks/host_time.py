# SPDX-License-Identifier: Apache-2.0
"""The host's time of a step on a GPU: 1,000 tensors, launches left out, beside torch's fused AdamW.

A stand-in for a machine with a GPU, and labelled so: ours is the whole path of ``pyupdate._cuda``
to the launches, which are only recorded (tests/device/launches_recorded.cpp), and that of the back
end ``triton`` to the end of Triton's own launching, with CPU memory in the place of the GPU's.
Torch's is ``torch.optim.AdamW(fused=True).step()`` on 1,000 CPU tensors of one element with one
thread, whose time is nearly all its host's. Of all parameters the loss that gave the gradients is
held meanwhile, as the caller of ``update_model`` holds it. Beside them the floor: reading each
tensor once, as a step must that trusts no pointer of the one before (``_C.Reader``).

Measured twice in the same run: by steps in turn, before each of which the others have filled the
cache, and by turns of many steps each, of which the median counts: each then has the cache to
itself, and what the processor's clock does meets both. Ratios are medians of the rounds'. Prints
one JSON.

    python benchmarks/host_time.py [--seconds 20]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pyupdate
from pyupdate import _C
from pyupdate.bench import timing

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from compiling import device_module
from device.triton_backend import triton_backend
from device_on_cpu import cuda_on_cpu

TENSORS = 1000
ELEMENTS = 256
"""Of ours. Nothing goes through them; a tensor of one is asked at every step if it is negated."""
TARGET = 10.0
"""Torch's time must be so many times ours."""


BLOCK = 0.05
"""Seconds of one turn of many steps."""


class Trained:
    """Parameters with the gradients of a backward pass, and the loss whose graph still has them."""

    def __init__(self, elements: int) -> None:
        self.params = [torch.nn.Parameter(torch.randn(elements)) for _ in range(TENSORS)]
        self.loss = torch.stack([(param * param).sum() for param in self.params]).sum()
        self.loss.backward()


def in_another_place(listed: list[torch.nn.Parameter]) -> Callable[[], None]:
    """Gives every parameter a new gradient, as a backward pass does."""

    def move() -> None:
        for param in listed:
            param.grad = torch.randn_like(param)

    return move


def alone(runs: dict[str, Callable[[], object]], seconds: float) -> dict[str, timing.Times]:
    """Each one's median of a turn of many steps, turn by turn."""

    def median(run: Callable[[], object]) -> float:
        times = []
        run()  # brings what it needs into the cache
        end = time.perf_counter() + BLOCK
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    rounds = max(2, round(seconds / BLOCK / len(runs)))
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(median(run))
    return {name: timing.Times(times) for name, times in found.items()}


def compared(seconds: float, **options: Any) -> dict[str, Any]:
    """Torch and the back end in force: the medians in milliseconds, and torch's over each."""
    still, moving, tiny = Trained(ELEMENTS), Trained(ELEMENTS), Trained(1)
    ours, ours_moving = (
        pyupdate.optim.AdamW(of.params, lr=1e-3, **options) for of in (still, moving)
    )
    theirs = torch.optim.AdamW(tiny.params, lr=1e-3, fused=True)
    runs: timing.Runs = {
        "nothing moved": (lambda: None, ours.step),
        "every gradient moved": (in_another_place(moving.params), ours_moving.step),
        "torch fused": (lambda: None, theirs.step),
    }
    if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        floor = Trained(ELEMENTS)
        of_floor = pyupdate.optim.AdamW(floor.params, lr=1e-3, **options)
        of_floor.step()
        rows = [[param, *of_floor.state[param].values()] for param in floor.params]
        runs["tensors read"] = (lambda: None, _C.Reader(torch.Tensor, rows).read)
    timing.warm_up(runs)
    still_ones = {name: run for name, (_, run) in runs.items() if name != "every gradient moved"}
    found = {
        "in turns": timing.interleave(runs, seconds=seconds / 2),
        "each alone": alone(still_ones, seconds / 2),
    }
    return {
        how: {
            "milliseconds": {name: round(1e3 * of.median, 4) for name, of in times.items()},
            "torch / ours": {
                name: round(timing.ratio(times["torch fused"], of), 2)
                for name, of in times.items()
                if name != "torch fused"
            },
        }
        for how, times in found.items()
    }


def measured(seconds: float) -> dict[str, Any]:
    """Both back ends that launch, and where it was measured."""
    with timing.settled(1):
        with cuda_on_cpu(device_module("_cuda_recorded")):
            cuda = compared(seconds / 2)
        with triton_backend() as machine:
            machine.runs = False
            triton = compared(seconds / 2)
        return {
            "what": f"host time of a step of {TENSORS} tensors, launches left out: a stand-in",
            "target": TARGET,
            "cuda": cuda,
            "triton": triton,
            **timing.machine(1),
        }


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--seconds", type=float, default=20.0)
    print(json.dumps(measured(arguments.parse_args().seconds), indent=2))


if __name__ == "__main__":
    main()
