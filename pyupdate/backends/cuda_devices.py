# SPDX-License-Identifier: Apache-2.0
"""A step of parameters on several CUDA devices that nobody waits for.

Each device reduces its own gradients. What its rows add to the norm, and whether it met an inf or
nan, goes to every other device, where the rows are put in the order of the plan: so each makes the
same norm, multiplier and skip by itself, in the one order of sums. Torch's copies between devices
have each one's current stream wait for the other's, and the host for none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from ..options import LastUpdate
from ..pytorch.request import Request, Scaling
from ..pytorch.rows import Inputs
from .cuda import Part
from .cuda_step import can_be_read_there


class Devices:
    """The parts of one plan, each on a device of its own."""

    def __init__(self, parts: Sequence[Part], order: Mapping[int, int]) -> None:
        """`order`: the place in the plan of each parameter, by its id."""
        self._parts = parts
        self._order = order
        self._active: list[list[int]] = []
        self._places: list[torch.Tensor] = []
        """On each device, where in the sums of all parts the plan's next row is."""

    def step(self, inputs: Inputs, request: Request, scaling: Scaling) -> LastUpdate | None:
        """The whole step; None, and nothing done, where it must be made in parts."""
        if not can_be_read_there(scaling):
            return None
        made: list[tuple[torch.Tensor, str]] = []
        try:
            for part in self._parts:
                part.make_ready(inputs, made)
            if request.reduce:
                sums = [part.reduce_there(inputs, request, scaling) for part in self._parts]
        except BaseException:
            for part in self._parts:
                part.forget_reduce()
            for param, key in made:
                inputs.state[param].pop(key, None)
            raise
        if not request.reduce:
            return _first(part.step(inputs, request, scaling) for part in self._parts)
        self._note_places()
        flags = [part.flag for part in self._parts]
        gathered = [
            (
                torch.cat([s.to(places.device, non_blocking=True) for s in sums])[places],
                torch.stack([f.to(places.device, non_blocking=True) for f in flags]).amax(0),
            )
            for places in self._places
        ]
        return _first(
            part.finish_there(request, scaling, *there)
            for part, there in zip(self._parts, gathered, strict=True)
        )

    def _note_places(self) -> None:
        active = [part.active() for part in self._parts]
        if active == self._active:
            return
        for part in self._parts:
            part.refuse_while_capturing("the set of parameters that have a gradient")
        rows = [part.rows[r] for part, some in zip(self._parts, active, strict=True) for r in some]
        places = sorted(range(len(rows)), key=lambda i: self._order[id(rows[i].param)])
        self._places = [part.sent(torch.tensor(places, device="cpu")) for part in self._parts]
        self._active = active


def _first(done: Iterable[LastUpdate | None]) -> LastUpdate | None:
    """Each device's answer is the same; all are made."""
    return list(done)[0]  # noqa: RUF015
