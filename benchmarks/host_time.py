# SPDX-License-Identifier: Apache-2.0
"""The host's time of a CUDA step: 1,000 tensors, the launches left out, beside torch's fused AdamW.

A stand-in for a machine with a GPU, and labelled so: ours is the whole path of ``pyupdate._cuda``
to the launches, which are only recorded (tests/device/launches_recorded.cpp), with CPU memory in
the place of the GPU's. Torch's is ``torch.optim.AdamW(fused=True).step()`` on 1,000 CPU tensors of
one element with one thread, whose time is nearly all its host's. Both step in turn, the medians are
of the same run. Prints one JSON.

    python benchmarks/host_time.py [--seconds 10]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pyupdate
from pyupdate.bench import timing

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from compiling import device_module
from device_on_cpu import cuda_on_cpu

TENSORS = 1000
TARGET = 10.0
"""Torch's time must be so many times ours."""


def params() -> list[torch.nn.Parameter]:
    """Tensors of one element with their gradients."""
    made = [torch.nn.Parameter(torch.randn(1)) for _ in range(TENSORS)]
    for param in made:
        param.grad = torch.randn(1)
    return made


def in_another_place(listed: list[torch.nn.Parameter]) -> Callable[[], None]:
    """Gives every parameter a new gradient, as a backward pass does."""

    def move() -> None:
        for param in listed:
            param.grad = torch.randn(1)

    return move


def measured(seconds: float) -> dict[str, Any]:
    """The medians, and torch's as a multiple of ours."""
    still, moving = params(), params()
    ours, ours_moving = (pyupdate.optim.AdamW(listed, lr=1e-3) for listed in (still, moving))
    theirs = torch.optim.AdamW(params(), lr=1e-3, fused=True)
    with cuda_on_cpu(device_module("_cuda_recorded")), timing.settled(1):
        runs: timing.Runs = {
            "nothing moved": (lambda: None, ours.step),
            "every gradient moved": (in_another_place(moving), ours_moving.step),
            "torch fused": (lambda: None, theirs.step),
        }
        timing.warm_up(runs)
        times = timing.interleave(runs, seconds=seconds)
        place = timing.machine(1)
    return {
        "what": f"host time of a step of {TENSORS} tensors, launches left out: a stand-in",
        "milliseconds": {name: round(1e3 * found.median, 4) for name, found in times.items()},
        "torch / ours": {
            name: round(timing.ratio(times["torch fused"], times[name]), 2)
            for name in ("nothing moved", "every gradient moved")
        },
        "target": TARGET,
        **place,
    }


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--seconds", type=float, default=10.0)
    print(json.dumps(measured(arguments.parse_args().seconds), indent=2))


if __name__ == "__main__":
    main()
