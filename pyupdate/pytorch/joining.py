# SPDX-License-Identifier: Apache-2.0
"""What several plans are stepped together by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..options import LastUpdate
from .request import Request, Scaling
from .rows import Inputs

JOINABLE = frozenset(
    {"max_norm", "norm_type", "clip_value", "ema_decay", "skip_nonfinite", "state_dtype"}
)
"""The options that a step of several plans knows for each."""


class Joining(NamedTuple):
    """One of several plans that are stepped together.

    Its part has ``step_together(joinings)``: whole steps of several parts of its class, with the
    bits of one by one; None, and nothing done, unless every one could be made right away and none
    writes what another one reads or writes.
    """

    part: Any
    inputs: Inputs
    request: Request
    scaling: Scaling


def step_all(joinings: Sequence[Joining]) -> list[LastUpdate] | None:
    """Whole steps of several plans; None, and nothing done, where one back end cannot make all."""
    parts = [joining.part for joining in joinings]
    if any(type(part) is not type(parts[0]) for part in parts):
        return None
    done: list[LastUpdate] | None = parts[0].step_together(joinings)
    return done
