# SPDX-License-Identifier: Apache-2.0
"""What a plan on a Triton device is asked for in a step, and what the step leaves to be read."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..options import LastUpdate
from ..pytorch.request import Request

_MULTIPLIER, _SKIP, _NORM = range(3)
"""As kernels/triton_layout.py counts what a step finds."""
_NO_NORM, _TWO_NORM, _INF_NORM = range(3)


class Asked(NamedTuple):
    """What one plan is asked for in a step.

    Attributes:
        request: of which `unscale` is not read, but the next two are.
        unscale: what the gradients are multiplied by, beside the reciprocal of `scale`.
        divisor: of that.
        numbers: of the groups, the sign of the gradient first.
        scale: of a scaler, on the device.
        found: not zero there where somebody has found inf or nan.
    """

    request: Request
    unscale: float
    divisor: float
    numbers: Sequence[Sequence[float]]
    scale: torch.Tensor | None = None
    found: torch.Tensor | None = None

    @property
    def told(self) -> list[float]:
        """What is sent of it, in the order of kernels/triton_layout.py."""
        own = self.request
        norm = _NO_NORM if not own.reduce else _INF_NORM if own.inf_norm else _TWO_NORM
        (seed,) = struct.unpack("d", struct.pack("q", own.seed))
        told = [self.unscale, self.divisor, own.max_norm, own.clip_value, own.ema_weight]
        return [*told, float(own.skip), float(own.finite_norm), seed, float(norm)]


def what_was_done(result: torch.Tensor, asked: Asked) -> LastUpdate:
    """What a step's result says when it is read, for which the device is waited for."""
    request = asked.request
    can_skip = request.skip or request.finite_norm or asked.found is not None
    made_there = request.reduce or asked.scale is not None
    return LastUpdate(
        (lambda: float(result[_NORM])) if request.reduce else None,
        (lambda: bool(result[_SKIP] != 0.0)) if can_skip else False,
        (lambda: float(result[_MULTIPLIER])) if made_there else asked.unscale / asked.divisor,
        flag=result[_SKIP],
    )
