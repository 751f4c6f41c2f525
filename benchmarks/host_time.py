# SPDX-License-Identifier: Apache-2.0
"""The host's time of a step on a GPU: 1,000 tensors, launches left out, beside torch's fused AdamW.

A stand-in for a machine with a GPU, and labelled so: ours is the whole path of ``pyupdate._cuda``
to the launches, which are only recorded (tests/device/launches_recorded.cpp), and that of the back
end ``triton`` to the end of Triton's own launching, with CPU memory in the place of the GPU's.
Torch's is ``torch.optim.AdamW(fused=True).step()`` on 1,000 CPU tensors of one element with one
thread, whose time is nearly all its host's. Beside them the floor: reading each tensor once, as a
step must that trusts no pointer of the one before (``_C.Reader``). They step in turn, the medians
are of the same run. Prints one JSON.

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


def params(elements: int) -> list[torch.nn.Parameter]:
    """Tensors with their gradients."""
    made = [torch.nn.Parameter(torch.randn(elements)) for _ in range(TENSORS)]
    for param in made:
        param.grad = torch.randn(elements)
    return made


def in_another_place(listed: list[torch.nn.Parameter]) -> Callable[[], None]:
    """Gives every parameter a new gradient, as a backward pass does."""

    def move() -> None:
        for param in listed:
            param.grad = torch.randn_like(param)

    return move


def in_turns(seconds: float, **options: Any) -> dict[str, float]:
    """The medians of torch and of the back end in force, in milliseconds."""
    still, moving = params(ELEMENTS), params(ELEMENTS)
    ours, ours_moving = (
        pyupdate.optim.AdamW(listed, lr=1e-3, **options) for listed in (still, moving)
    )
    ours.step()
    theirs = torch.optim.AdamW(params(1), lr=1e-3, fused=True)
    contestants = {
        "nothing moved": (lambda: None, ours.step),
        "every gradient moved": (in_another_place(moving), ours_moving.step),
        "torch fused": (lambda: None, theirs.step),
    }
    if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        floor = params(ELEMENTS)
        of_floor = pyupdate.optim.AdamW(floor, lr=1e-3, **options)
        of_floor.step()
        rows = [[param, *of_floor.state[param].values()] for param in floor]
        contestants["tensors read alone"] = (lambda: None, _C.Reader(torch.Tensor, rows).read)
    times = timing.interleave(contestants, seconds=seconds)
    for name in ("nothing moved", "torch fused"):
        times |= timing.interleave({f"{name}, alone": contestants[name]}, seconds=1.0)
    return {name: 1e3 * found.median for name, found in times.items()}


def ratios(of: dict[str, float]) -> dict[str, float]:
    """Torch's time over each other one's, both in turns or both alone."""
    return {
        name: round(of["torch fused" + ", alone" * name.endswith("alone")] / milliseconds, 2)
        for name, milliseconds in of.items()
        if not name.startswith("torch fused")
    }


def measured(seconds: float) -> dict[str, Any]:
    """The medians, and torch's as a multiple of ours."""
    found = {}
    with timing.settled(1):
        with cuda_on_cpu(device_module("_cuda_recorded")):
            found["cuda"] = in_turns(seconds / 2)
        with triton_backend() as machine:
            machine.runs = False
            found["triton"] = in_turns(seconds / 2)
        place = timing.machine(1)
    return {
        "what": f"host time of a step of {TENSORS} tensors, launches left out: a stand-in",
        "milliseconds": {b: {n: round(m, 4) for n, m in of.items()} for b, of in found.items()},
        "torch / ours": {back_end: ratios(of) for back_end, of in found.items()},
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
