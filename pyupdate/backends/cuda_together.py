# SPDX-License-Identifier: Apache-2.0
"""Steps of several plans on one CUDA device, as the launches of one.

The compiled side (csrc/cuda/sent.h's Joint) puts their tables behind each other; a row says whose
it is, and each member has its own request, norm, multiplier and skip. What is sent stays on the
device: with the same members and nothing moved, a joint step is launches alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..options import LastUpdate
from ..pytorch.uninterrupted import append_result
from .cuda_memory import Memory
from .cuda_step import DOUBLES, Asked, new_outcomes

if TYPE_CHECKING:
    from ..pytorch.joining import Joining
    from .cuda import Part


class Together:
    """The joint tables of some parts, none of which it keeps alive."""

    def __init__(self, parts: Sequence[Part], device: torch.device, module: Any) -> None:
        self._joint = module.Joint(device.index or 0)
        self._memory = Memory(device, parts, self._joint.copy)

    def is_of(self, parts: Sequence[Part]) -> bool:
        """Whether it was made for these, in this order."""
        return [ref() for ref in self._memory.parts] == list(parts)

    @property
    def nbytes(self) -> int:
        """Memory of its tables, on the host and on the device."""
        own = self._memory
        return int(self._joint.nbytes()) + own.tables.numel() + own.scratch.numel()

    def step(self, joinings: Sequence[Joining]) -> list[LastUpdate] | None:
        """Whole steps of its parts; None, and nothing done, where they must be made one by one."""
        outcomes = new_outcomes(self._memory.tables.device, len(joinings))
        asked = [one.part.asked(one.inputs, one.request, one.scaling) for one in joinings]
        joined = [
            (one.part.plan, one.inputs.groups, one.inputs.state, *ask.of_plan)
            for one, ask in zip(joinings, asked, strict=True)
        ]
        places = outcomes.view(-1, DOUBLES)
        asked = [ask._replace(outcome=at) for ask, at in zip(asked, places, strict=True)]
        answers: list[bool] = []
        try:
            append_result(answers, self._joint.step, joined, outcomes.data_ptr(), self._memory.send)
            return _noted(joinings, asked) if answers[0] else None
        except BaseException:
            if answers and answers[0]:  # an interrupt behind the step
                _noted(joinings, asked)
            raise


def _noted(joinings: Sequence[Joining], asked: Sequence[Asked]) -> list[LastUpdate]:
    """What a joint step did, noted in each part."""
    return [one.part.note(ask, one.scaling) for one, ask in zip(joinings, asked, strict=True)]
