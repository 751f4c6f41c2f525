# SPDX-License-Identifier: Apache-2.0
"""The workloads with targets, those that `make bench-check` holds, and who is compared in each.

Beside the kinds of `pyupdate.bench.contestants` (AdamW), the name of an optimizer is a kind: its
step alone, against torch's default path, or, where torch has no such optimizer, against our AdamW.
"""

from __future__ import annotations

import torch
from shapes import MODELS

from pyupdate import optim
from pyupdate.bench.contestants import (
    BASELINE,
    KINDS,
    OURS,
    Contestant,
    Optimizer,
    Workload,
    of_torch,
)

THREADS = 2
DEFAULTS = ("NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta")
"""Against torch's own, as torch steps it where nobody asks for anything."""
LAYERWISE = ("LAMB", "LARS")
"""Against our own AdamW, whose bytes they move but for the norms."""

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "48 x 1024x1024",
            ((1024, 1024),) * 48,
            {"step": 0.95, "full": 1.8, "average": 1.7} | dict.fromkeys(LAYERWISE, 1 / 1.6),
        ),
        Workload(
            "60 x 512x512, 200 x 512",
            ((512, 512),) * 60 + ((512,),) * 200,
            {"step": 1.2, "full": 1.9} | dict.fromkeys(DEFAULTS, 4.0),
        ),
        Workload("1,000 x 256", ((256,),) * 1000, {"step": 12.0, "full": 24.0, "average": 30.0}),
    )
}

HELD = (
    ("48 x 1024x1024", "full"),
    ("60 x 512x512, 200 x 512", "step"),
    ("60 x 512x512, 200 x 512", "full"),
    ("60 x 512x512, 200 x 512", "NAdam"),
    ("1,000 x 256", "step"),
    ("1,000 x 256", "full"),
    ("48 x 1024x1024", "LAMB"),
    ("ResNet-50", "average"),
    ("ResNet-50, bfloat16", "full"),
    ("1,000 x 1", "step"),
)
"""What `make bench-check` measures again: bound by memory, by calls, by arithmetic; one for all
that may be in a step, halves, several stages, and the host's time alone."""

EVERY = WORKLOADS | {
    workload.name: workload
    for workload in (
        Workload("ResNet-50", MODELS["ResNet-50"].shapes()),
        Workload("ResNet-50, bfloat16", MODELS["ResNet-50"].shapes(), dtype=torch.bfloat16),
        Workload("1,000 x 1", ((1,),) * 1000),
    )
}
"""Those without a target too."""


def pair(workload: Workload, kind: str) -> list[Contestant]:
    """What is compared with, then ours."""
    makers: dict[str, Optimizer]
    if kind in KINDS:
        every = of_torch(kind)
        makers = {name: every[name] for name in (BASELINE, OURS)}
    elif kind in DEFAULTS:
        makers = {"torch": getattr(torch.optim, kind), OURS: getattr(optim, kind)}
    else:
        makers = {"our AdamW": optim.AdamW, OURS: getattr(optim, kind)}
    of = kind if kind in KINDS else "step"
    return [Contestant(name, workload, of, make) for name, make in makers.items()]
