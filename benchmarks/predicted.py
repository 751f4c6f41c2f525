# SPDX-License-Identifier: Apache-2.0
"""What a step would take on GPUs, *predicted* from what it moves and launches. Nothing is timed.

    make predicted

The bytes and launches of pyupdate are what a plan of the back end `cuda` says: it goes through the
buckets and stages that a step goes through (csrc/cuda/image.h), and each stage moves what its
kernel was compiled to read and write. The module is that of the tests whose launches do nothing,
the parameters have no memory. Those of the peers are counted from what their sources do, for fp32
with `zero_grad(set_to_none=True)`. A time is bytes over the card's peak bandwidth: below it is no
step, above it are launches, host time and everything that is not perfect.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from shapes import MODELS, Shape, elements, tiny
from torch import nn

import pyupdate
from pyupdate.backends import compiled
from pyupdate.pytorch import engines
from pyupdate.pytorch.request import Scaling, request_of
from pyupdate.pytorch.rows import GroupRule, Row

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from compiling import device_module

CARDS = {"A100": 2039e9, "H100": 3352e9, "B200": 8000e9}
"""Peak bytes a second of the SXM cards with 80, 80 and 180 GB, as NVIDIA states them."""

KINDS = ("step", "clip", "scaler", "scaler + clip", "scaler + clip + average")

WORKLOADS = ("ResNet-50", "GPT-2 124M", "Llama 1B")


@dataclass(frozen=True)
class Count:
    """Of one step."""

    bytes: float
    launches: int


# ----- torch and apex -----------------------------------------------------------------------------

CHUNK = 65_536
"""Elements of a tensor that one block of theirs takes."""


@dataclass(frozen=True)
class MultiTensor:
    """How their multi-tensor launches are cut: tensors and blocks of one launch.

    Attributes:
        tensors: at most so many, by how many lists of tensors the kernel takes (1 to 5).
        blocks: at most so many.
    """

    tensors: tuple[int, int, int, int, int]
    blocks: int

    def launches(self, shapes: Sequence[Shape], lists: int) -> int:
        """A launch goes off when it is full of tensors, or of blocks in the midst of one."""
        most = self.tensors[lists - 1]
        launched = tensors = blocks = 0
        for shape in shapes:
            left = ceil(elements([shape]) / CHUNK)
            tensors += 1
            while left > 0:
                taken = min(left, self.blocks - blocks)
                left -= taken
                blocks += taken
                if blocks == self.blocks or (left == 0 and tensors == most):
                    launched += 1
                    blocks, tensors = 0, int(left > 0)
        return launched + (blocks > 0)


TORCH = MultiTensor((770, 448, 336, 252, 210), 2240)  # built with CUDA 13, 32 KB of arguments
APEX = MultiTensor((110, 64, 48, 36, 30), 320)  # 4 KB of arguments

Pass = tuple[int, int]
"""Bytes an element, and how many lists of tensors it takes: one launch of theirs."""

UNSCALE: tuple[Pass, ...] = ((8, 1),)
NORM: tuple[Pass, ...] = ((4, 1),)
CLIP: tuple[Pass, ...] = ((8, 1),)
AVERAGE: tuple[Pass, ...] = ((12, 2),)
FOREACH: tuple[Pass, ...] = (
    (8, 1),  # decay: param *= 1 - lr * weight_decay
    (12, 2),  # exp_avg lerp
    (8, 1),  # exp_avg_sq *= beta2
    (12, 2),  # exp_avg_sq addcmul
    (8, 2),  # sqrt, into new memory
    (8, 1),  # / sqrt(bias)
    (8, 1),  # + eps
    (16, 3),  # param addcdiv
)
FUSED: tuple[Pass, ...] = ((28, 4),)


@dataclass(frozen=True)
class Peer:
    """What a peer's AdamW step consists of.

    Attributes:
        cut: how its launches are cut.
        moved: its passes without anything around them.
        counters: whether the step counts of the tensors take launches of their own.
    """

    cut: MultiTensor
    moved: tuple[Pass, ...]
    counters: bool = True

    def count(self, shapes: Sequence[Shape], kind: str) -> Count:
        passes = [*self.moved]
        if "scaler" in kind:
            passes += UNSCALE
        if "clip" in kind:
            passes += (*NORM, *CLIP)
        if "average" in kind:
            passes += AVERAGE
        launches = sum(self.cut.launches(shapes, lists) for _, lists in passes)
        if self.counters:
            launches += ceil(len(shapes) / self.cut.tensors[0])
        if "clip" in kind:
            launches += 2  # the norm of the norms, and its coefficient
        return Count(sum(moved for moved, _ in passes) * elements(list(shapes)), launches)


# ----- ours ---------------------------------------------------------------------------------------


DEVICE = (2, 0)
"""As DLPack names a CUDA device."""


def ours(shapes: Sequence[Shape], kind: str) -> Count:
    """Counted from an optimizer over tensors without memory."""
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    options: dict[str, Any] = {}
    if "clip" in kind:
        options["max_norm"] = 1.0
    if "average" in kind:
        options["ema_decay"] = 0.999
    return planned(pyupdate.optim.AdamW(params, **options), scaled="scaler" in kind)


def planned(optimizer: torch.optim.Optimizer, *, scaled: bool = False) -> Count:
    """What the plan of an optimizer says of a step on one GPU.

    Args:
        optimizer: one whose rules say all that it does; its parameters need no memory.
        scaled: whether the step is made with an enabled scaler.
    """
    kind = engines.row_of(optimizer)
    assert kind is not None
    options = engines.options_of(optimizer)
    rules = [GroupRule(kind.rule(group), kind.counts_steps) for group in optimizer.param_groups]
    rows = [
        Row(param, g, position, f"group {g}, parameter {position}")
        for g, group in enumerate(optimizer.param_groups)
        for position, param in enumerate(group["params"])
    ]
    module = device_module("_cuda_recorded")
    averages = options.ema_decay is not None
    plan = compiled.plan_of(module.Plan, rows, rules, averages, device=DEVICE)
    launches = plan.launches(reduce=request_of(options, Scaling(check=scaled)).reduce)
    moved = sum(n * rows[r].param.numel() for _, _, moves in launches for r, n in moves)
    return Count(moved, len(launches))


CONTESTANTS: dict[str, Callable[[Sequence[Shape], str], Count]] = {
    "torch foreach": Peer(TORCH, FOREACH).count,
    "torch fused": Peer(TORCH, FUSED).count,
    "apex": Peer(APEX, FUSED, counters=False).count,
    "pyupdate": ours,
}


def table() -> str:
    """Every workload, kind and contestant, in Markdown."""
    workloads = {name: MODELS[name].make(1.0) for name in WORKLOADS} | {"2,000 tiny": tiny(2000)}
    times = " | ".join(f"{card}, ms" for card in CARDS)
    lines = [
        f"| workload | step | | bytes a parameter | launches | {times} |",
        "|---|---|---|---:|---:|" + "---:|" * len(CARDS),
    ]
    for workload, shapes in workloads.items():
        of = elements(shapes)
        for kind in KINDS:
            for name, contestant in CONTESTANTS.items():
                count = contestant(shapes, kind)
                times = " | ".join(f"{1e3 * count.bytes / speed:.3f}" for speed in CARDS.values())
                lines.append(
                    f"| {workload}, {of:,} | {kind} | {name} | {count.bytes / of:g} "
                    f"| {count.launches} | {times} |"
                )
    return "\n".join(lines)


if __name__ == "__main__":
    print("*Predicted*: bytes over peak bandwidth; nothing was timed.\n")
    print(table())
