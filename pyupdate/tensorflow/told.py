# SPDX-License-Identifier: Apache-2.0
"""Why a step runs without XLA: one line in the log for each reason that an optimizer has.

An optimizer has a plan for every value of its attributes and every set of gradients, and each finds
out anew.
"""

from __future__ import annotations

import logging
from typing import Any

from ..remembered import Remembered

_log = logging.getLogger("pyupdate")
_told: Remembered[set[str]] = Remembered()


def without_xla(optimizer: Any, why: str) -> None:
    """Say it, if it was not said of this optimizer before."""
    told = _told.get(optimizer)
    if told is None:
        _told[optimizer] = told = set()
    if why not in told:
        told.add(why)
        _log.warning("%s is stepped without XLA: %s", type(optimizer).__name__, why)
