# SPDX-License-Identifier: Apache-2.0
"""The memory of compiled tables on a CUDA device, and how they come there."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

import torch

if TYPE_CHECKING:
    from .cuda import Part


class Memory:
    """Two pieces of memory on a device, for the tables of one part or of several at once.

    Attributes:
        parts: held weakly; the records of the tables are theirs, one behind the other.
        tables: bytes that are sent.
        scratch: bytes of the device's own, zero where they are made.
    """

    def __init__(
        self, device: torch.device, parts: Sequence[Part], copy: Callable[[int, int, int], None]
    ) -> None:
        """`copy`: writes the tables' bytes, from its second to its third argument, to its first."""
        self._device = device
        self._copy = copy
        self.parts = [weakref.ref(part) for part in parts]
        self.tables = torch.empty(0, dtype=torch.uint8, device=device)
        self.scratch = torch.empty(0, dtype=torch.uint8, device=device)

    def send(
        self,
        table_bytes: int,
        scratch_bytes: int,
        begin: int,
        end: int,
        capturing: bool,
        moved: str,
        record: int,
        counts: Sequence[tuple[int, float]],
    ) -> tuple[int, int]:
        """Bring the bytes from `begin` to `end` of the tables to the device, in its order.

        What csrc/cuda/sent.h's `Sent::ready` asks for; nobody waits.

        Returns:
            The addresses of the tables and of the device's own memory.
        """
        first = 0
        for ref in self.parts:
            part = ref()
            assert part is not None  # who steps it has it
            behind = first + len(part.rows)
            if not capturing:
                part.set_counts([(r - first, count) for r, count in counts if first <= r < behind])
            elif record < behind:
                whose = f" of '{part.rows[record - first].name}'" if record >= 0 else ""
                refuse_capture(f"{moved or 'a step count'}{whose} is another one")
            first = behind
        if table_bytes > self.tables.numel():
            self.tables = torch.empty(table_bytes, dtype=torch.uint8, device=self._device)
            begin, end = 0, table_bytes
        if scratch_bytes > self.scratch.numel():
            self.scratch = torch.zeros(scratch_bytes, dtype=torch.uint8, device=self._device)
        if end > begin:
            # Torch keeps pinned memory until the copy is made.
            pinned = self._device.type == "cuda"
            staging = torch.empty(end - begin, dtype=torch.uint8, device="cpu", pin_memory=pinned)
            self._copy(staging.data_ptr(), begin, end)
            self.tables[begin:end].copy_(staging, non_blocking=True)
        return self.tables.data_ptr(), self.scratch.data_ptr()


def refuse_capture(what: str) -> NoReturn:
    """Refuse what must be sent while a CUDA graph is captured."""
    message = (
        f"while a CUDA graph is captured nothing can be sent to the device, but {what}: step "
        "before the capture with everything in place (zero_grad(set_to_none=False) keeps the "
        "gradients where they are; an lr that changes must be a tensor on the device)"
    )
    raise RuntimeError(message)
