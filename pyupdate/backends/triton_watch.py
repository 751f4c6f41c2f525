# SPDX-License-Identifier: Apache-2.0
"""The Triton back end where the CPU's compiled module is: C++ reads the tensors (csrc/watch.cpp).

Launches and tables are the same. What is different: a step in which nothing moved runs no Python
code a parameter, and the rows that were stepped alike are known by what was done with them, so
their counts are never read (csrc/remote.cpp).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from ..pytorch.rows import GroupRule, Inputs, Row
from .compiled import plan_of, runs_of, settle
from .triton import Part

_NOTHING, _GRADIENTS = 0, 1
"""csrc/watch.cpp's Moved."""


@cache
def _module() -> Any | None:
    try:
        from .. import _C
    except ImportError:
        return None
    return _C if hasattr(torch.Tensor, "__dlpack_c_exchange_api__") else None


def can_watch() -> bool:
    """Whether the compiled module is there, and torch lets it read tensors."""
    return _module() is not None


class WatchedPart(Part):
    """The rows of a plan on one device, read by compiled code."""

    def __init__(self, rows: Sequence[Row], rules: Sequence[GroupRule], averages: bool) -> None:
        super().__init__(rows, rules, averages)
        module = _module()
        assert module is not None
        self._found = module.Found
        self._watch = plan_of(
            module.Watch, rows, rules, averages, shapes=[_shape_of(rule) for rule in rules]
        )

    @property
    def nbytes(self) -> int:
        """Memory of its tables, on the host and on the device."""
        return super().nbytes + int(self._watch.nbytes())

    def check(self, inputs: Inputs) -> list[int]:
        """Refuse what is not right; the rows that have a gradient and no state yet."""
        while True:
            found, noticed, moved = self._watch.look(inputs.groups, inputs.state, inputs.numbers)
            if found in (self._found.READY, self._found.FRESH):
                break
            settle(self._watch, self._found, found, noticed, self.rows, self._rules, inputs)
        if moved == _NOTHING and self._drawn is not None:
            return []
        self._refuse_while_capturing("an address or the set of gradients has changed")
        if moved == _GRADIENTS and self._drawn is not None:
            addresses = torch.empty(len(self._active), dtype=torch.int64, device="cpu")
            self._watch.gradients(addresses.data_ptr())
            self._drawn = self._drawn._replace(gradients=addresses)
            self._watch.was_drawn()
            return []
        self._drawn = None
        self._active = self._watch.active()
        if found == self._found.FRESH:
            return list(noticed)
        if self._active:
            self._draw(inputs)
            self._watch.was_drawn()
        return []

    def state_was_made(self) -> None:
        """Tell it that what the last check found absent is made now, in its first step."""
        self._watch.state_was_made(True)

    def _note_counts(self, inputs: Inputs) -> None:
        del inputs
        for first, last, count in runs_of(self._watch.recounts()):
            self._counters[first:last].fill_(count)
        classes = self._watch.classes()
        self._counts = {r: (c,) for r, c in zip(self._active, classes, strict=True)}

    def _hold(self, inputs: Inputs) -> None:
        """Nothing: the compiled plan holds it."""

    def bump(self) -> None:
        """Let autograd know what was written, and note that it was stepped."""
        self._watch.stepped()


def _shape_of(rule: GroupRule) -> tuple[int, int, int, int, int]:
    """States, scalars, numbers with the step, counted scalars and hypers of a rule."""
    of = rule.rule
    return len(of.state), len(of.scalars), 1 + len(of.numbers), len(of.counted), len(of.hypers)
