# SPDX-License-Identifier: Apache-2.0
"""What is measured: the workloads, the contestants, and the proof that they do the same.

A contestant owns a set of parameters with gradients and an optimizer. The kinds: `step` is AdamW's
step alone; `full` is what loss scaling and clipping ask for: unscale, finite check, clip by the
global norm, step, update of the scaler; `average` is that and a moving average of the parameters.
The name of an optimizer is its step alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import pyupdate

THREADS = 2
SCALE = 2.0**16  # where torch's GradScaler starts
MAX_NORM = 1.0
EPS = torch.finfo(torch.float32).eps
DECAY = 0.999
KINDS = ("step", "full", "average")
DEFAULTS = ("NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta")
"""Against torch's own, as torch steps it where nobody asks for anything."""
LAYERWISE = ("LAMB", "LARS")
"""Against our own AdamW, whose bytes they move but for the norms."""


@dataclass(frozen=True)
class Workload:
    """Shapes of parameters, and the ratios that are to be reached against torch's fused AdamW."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    targets: dict[str, float]

    @property
    def elements(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes)


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

Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OURS = "pyupdate"
BASELINE = "torch fused"
_ADDED: dict[str, dict[str, Any]] = {
    "step": {},
    "full": {"max_norm": MAX_NORM},
    "average": {"max_norm": MAX_NORM, "ema_decay": DECAY},
}


def optimizers(kind: str) -> dict[str, Optimizer]:
    """The contestants of a kind by name: what is compared with first, ours last."""
    if kind in DEFAULTS:
        return {"torch": getattr(torch.optim, kind), OURS: getattr(pyupdate.optim, kind)}
    if kind in LAYERWISE:
        return {"our AdamW": pyupdate.optim.AdamW, OURS: getattr(pyupdate.optim, kind)}
    return {
        BASELINE: lambda params: torch.optim.AdamW(params, fused=True),
        "torch foreach": lambda params: torch.optim.AdamW(params, foreach=True),
        OURS: lambda params: pyupdate.optim.AdamW(params, **_ADDED[kind]),
    }


class Contestant:
    """Parameters, gradients and an optimizer, the same numbers for every contestant."""

    def __init__(self, name: str, workload: Workload, kind: str) -> None:
        self.name = name
        self.kind = kind
        self.scaled = kind in ("full", "average")
        random = torch.Generator().manual_seed(1)
        self.params = [
            nn.Parameter(torch.randn(shape, generator=random)) for shape in workload.shapes
        ]
        # A backward pass leaves gradients that carry the scale; torch unscales and clips them where
        # they are, so each full step starts from a fresh copy, which is made off the clock.
        self.fresh = [
            torch.randn(shape, generator=random) * 0.01 * (SCALE if self.scaled else 1.0)
            for shape in workload.shapes
        ]
        for param, grad in zip(self.params, self.fresh, strict=True):
            param.grad = grad.clone() if self.scaled else grad
        self.optimizer = optimizers(kind)[name](self.params)
        self.averages = [param.detach().clone() for param in self.params if kind == "average"]
        self.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=1_000_000)
        self.scaler.scale(torch.ones(()))  # makes the scale's tensor, as the first loss does
        self.run = self._full if self.scaled else self._step

    @torch.no_grad()
    def prepare(self) -> None:
        """Put the gradients back, as a backward pass would."""
        if self.scaled:
            torch._foreach_copy_([param.grad for param in self.params], self.fresh)

    def _step(self) -> None:
        self.optimizer.step()

    def _full(self) -> None:
        optimizer: Any = self.optimizer
        if self.name == OURS:
            optimizer.step(grad_scaler=self.scaler)
        else:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self.params, MAX_NORM)
            self.scaler.step(optimizer)
            if self.averages:
                with torch.no_grad():
                    torch._foreach_lerp_(self.averages, self.params, 1.0 - DECAY)
        self.scaler.update()

    @property
    def bytes(self) -> int:
        """The least that a step moves an element, by the read and write sets of the rule."""
        return round(pyupdate.bytes_per_parameter(self.optimizer, scaled=self.scaled))


@torch.no_grad()
def apart(one: Contestant, other: Contestant, moved: float) -> float:
    """The largest difference of a parameter, in fp32 eps x max(|parameter|, largest move)."""

    def of(a: Tensor, b: Tensor) -> float:
        return float(((a - b).abs_().div_(b.abs().clamp_(min=moved)).max()) / EPS)

    return max(of(a, b) for a, b in zip(one.params, other.params, strict=True))


@torch.no_grad()
def error_of_torchs_norm(grads: list[Tensor]) -> float:
    """How far torch's norm of fp32 gradients is from that of fp64, relative to it.

    It grows with the size: 1.2e-5 for 48 tensors of 1024 x 1024 (torch 2.13), where that of
    pyupdate, which adds up in fp64, is off by 2e-12.
    """
    exact = sum(float(grad.double().square().sum()) for grad in grads) ** 0.5
    return abs(float(nn.utils.get_total_norm(grads)) / exact - 1.0)


def check_alike(one: Contestant, other: Contestant, steps: int = 3) -> float:
    """Step both, which also makes their state; refuse to time contestants that disagree.

    Each step may be 8 eps from the exact one (the bound that the tests hold against fp64), so two
    contestants may be 16 apart, a step. Where they clip, an error d of torch's norm scales its
    gradients by 1 + d; Adam's move lr g / (|g| + eps) then changes by up to lr d / 4.

    Returns:
        How far apart they are.

    Raises:
        RuntimeError: further than that.
    """
    moved = one.optimizer.param_groups[0]["lr"]
    for _ in range(steps):
        before = [param.detach().clone() for param in other.params]
        for contestant in (one, other):
            contestant.prepare()
            contestant.run()
        pairs = zip(other.params, before, strict=True)
        moved = max(moved, *(float((a.detach() - b).abs().max()) for a, b in pairs))
    found = apart(one, other, moved)
    norm = error_of_torchs_norm(one.fresh) if one.scaled else 0.0
    if not found <= steps * (16.0 + norm / 4.0 / EPS):
        message = f"{one.name} and {other.name} differ by {found:.1f} eps after {steps} steps"
        raise RuntimeError(message)
    return found
