# SPDX-License-Identifier: Apache-2.0
"""What a step on a CUDA device is asked for, and what it leaves to be read."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from ..options import LastUpdate
from ..pytorch.request import Request, Scaling

DOUBLES = 3
"""Of one outcome (csrc/cuda/launch.h): norm, multiplier, and two floats that share the last."""
_FOUND_INF, _SKIPPED = 4, 5
"""Their places, counted in floats."""


class Asked(NamedTuple):
    """What a plan is asked for in one step."""

    numbers: list[list[float]]
    number_at: list[list[int]]
    request: Request
    outcome: torch.Tensor | None
    scale: torch.Tensor | None
    flag: torch.Tensor | None

    @property
    def of_plan(self) -> tuple[Any, ...]:
        """What follows groups and state in the compiled plan's calls, up to what sends."""
        places = (address(self.outcome), address(self.scale), address(self.flag))
        return self.numbers, self.number_at, self.request, places


def can_be_read_there(scaling: Scaling) -> bool:
    """Whether the device can do with a scaler's scale and flags as they stand there.

    Not where a scaler's gradients are also divided by a number that is no power of two: then the
    scale is read, because only a division has the right bits.
    """
    return scaling.scale is None or math.frexp(scaling.divisor)[0] == 0.5


def address(tensor: torch.Tensor | None) -> int:
    """Of a tensor on the device, 0 of none."""
    return 0 if tensor is None else tensor.data_ptr()


def new_outcomes(device: torch.device, count: int = 1) -> torch.Tensor:
    """A step's own, so that what was left of the one before can still be read."""
    return torch.empty(count * DOUBLES, dtype=torch.float64, device=device)


def what_was_done(
    outcome: torch.Tensor, request: Request, scaling: Scaling, flag: torch.Tensor | None
) -> LastUpdate:
    """What an outcome says when it is read, for which the device is waited for."""
    can_skip = request.skip or request.finite_norm or flag is not None
    scaled = scaling.check or scaling.scale is not None
    made_there = request.reduce or scaling.scale is not None
    return LastUpdate(
        (lambda: float(outcome[0])) if request.reduce else None,
        (lambda: bool(_floats(outcome)[_SKIPPED] != 0.0)) if can_skip else False,
        (lambda: float(outcome[1])) if made_there else request.unscale,
        flag=_floats(outcome)[_FOUND_INF] if scaled else None,
    )


def _floats(outcome: torch.Tensor) -> torch.Tensor:
    return outcome.view(torch.float32)
