# SPDX-License-Identifier: Apache-2.0
"""Steps of several plans on one device by Triton kernels, as the launches of one.

Their rows stand in one set of tables, each with its member's number: the launches and the tables
are those of one plan (triton_tables.py), which is the case of one member. The first member's plan
keeps the tables; of the others these hold addresses alone, so no model keeps another one alive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from ..options import LastUpdate
from ..pytorch.joining import Joining
from ..pytorch.rows import Stale
from .triton_memory import Extents
from .triton_rows import Drawn
from .triton_step import what_was_done

if TYPE_CHECKING:
    from .triton import Part
    from .triton_tables import Tables

KEPT = 4
"""Sets of members whose tables are kept: of 1,000 rows they take 15 ms to make."""


class Together:
    """The joint tables of a part and of others that were stepped behind it."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tables, Extents]] = []  # the last one was used last

    @property
    def nbytes(self) -> int:
        """Memory of its tables on the device."""
        return sum(tables.nbytes for tables, _ in self._kept)

    def ready(
        self,
        drawn: Sequence[Drawn],
        device: torch.device,
        send: Callable[[torch.Tensor], torch.Tensor],
    ) -> Tables | None:
        """The tables of these members as they are now.

        None where one writes what another one writes or reads; each of them is right by itself.
        """
        from .triton_tables import Tables

        known = next((one for one in self._kept if one[0].are_of(drawn)), None)
        if known is None:
            written = Extents.all_of([own.rows.written for own in drawn])
            if not written.are_apart() or _meet(written, drawn):
                return None
            known = (Tables(drawn, device, send), written)
        elif not known[0].have_seen(drawn):
            if _meet(known[1], drawn):
                return None
            known[0].follow(drawn, send)
        self._kept = [*(one for one in self._kept if one is not known)][1 - KEPT :] + [known]
        return known[0]


def _meet(written: Extents, drawn: Sequence[Drawn]) -> bool:
    """Whether a gradient lies in what is written."""
    gradients = torch.cat([own.gradients for own in drawn])
    return written.meet(gradients, torch.cat([own.rows.gradient_bytes for own in drawn]))


def step_together(joinings: Sequence[Joining]) -> list[LastUpdate] | None:
    """Whole steps of several parts in the launches of one; see `Joining`."""
    parts: list[Part] = [one.part for one in joinings]
    first = parts[0]
    if any(part.device != first.device for part in parts):
        return None
    if any(one.request.stochastic != joinings[0].request.stochastic for one in joinings):
        return None
    drawn = []
    for part, one in zip(parts, joinings, strict=True):
        try:
            found = part.drawn(one.inputs)
        except (Stale, TypeError, ValueError):
            return None  # whoever is refused is told so in turn
        if found is None:
            return None
        drawn.append(found)
    tables = first.together.ready(drawn, first.device, first.send)
    if tables is None:
        return None
    asked = [one.part.asked(one.inputs, one.request, one.scaling) for one in joinings]
    tables.ask(asked, first.send)
    results = tables.step(asked)
    for part in parts:
        part.bump()
    return [what_was_done(result, one) for result, one in zip(results, asked, strict=True)]
