# SPDX-License-Identifier: Apache-2.0
"""What several plans are stepped together by."""

from __future__ import annotations

from typing import Any, NamedTuple

from .request import Request, Scaling
from .rows import Inputs


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
