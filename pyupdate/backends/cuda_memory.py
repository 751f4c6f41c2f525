# SPDX-License-Identifier: Apache-2.0
"""The memory of compiled tables on a CUDA device, and how they come there."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch


class Memory:
    """Two pieces of memory on a device: the tables that are sent, and the device's own.

    Attributes:
        tables, scratch: bytes; the second is zero where it is made.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.tables = torch.empty(0, dtype=torch.uint8, device=device)
        self.scratch = torch.empty(0, dtype=torch.uint8, device=device)

    def bring(
        self,
        copy: Callable[[int, int, int], None],
        table_bytes: int,
        scratch_bytes: int,
        begin: int,
        end: int,
    ) -> tuple[int, int]:
        """Have so much memory, and bring the tables' bytes from `begin` to `end` there.

        In the order of the device's stream; nobody waits.

        Args:
            copy: writes the bytes from its second to its third argument to the address given first.
            table_bytes: what the tables take.
            scratch_bytes: what the device's own memory takes.
            begin: of what is not as it was sent.
            end: of that.

        Returns:
            The addresses of both.
        """
        if table_bytes > self.tables.numel():
            self.tables = torch.empty(table_bytes, dtype=torch.uint8, device=self._device)
            begin, end = 0, table_bytes
        if scratch_bytes > self.scratch.numel():
            self.scratch = torch.zeros(scratch_bytes, dtype=torch.uint8, device=self._device)
        if end > begin:
            # Torch keeps pinned memory until the copy is made.
            pinned = self._device.type == "cuda"
            staging = torch.empty(end - begin, dtype=torch.uint8, device="cpu", pin_memory=pinned)
            copy(staging.data_ptr(), begin, end)
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
