# SPDX-License-Identifier: Apache-2.0
"""Where tensors lie, as the Triton back end asks it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch


class Extents:
    """Pieces of memory, from their first bytes to behind their last ones (int64, on the host)."""

    def __init__(self, begins: torch.Tensor, ends: torch.Tensor) -> None:
        order = begins.argsort()
        self.begins, self.ends = begins[order], ends[order]

    @classmethod
    def of(cls, pieces: Sequence[tuple[int, int]]) -> Extents:
        """Of addresses and sizes in bytes; what has no bytes is left out."""
        full = torch.tensor([p for p in pieces if p[1]], dtype=torch.int64, device="cpu")
        begins, sizes = full.reshape(-1, 2).unbind(1)
        return cls(begins, begins + sizes)

    @classmethod
    def all_of(cls, extents: Sequence[Extents]) -> Extents:
        """Several, as one."""
        return cls(
            torch.cat([each.begins for each in extents]), torch.cat([each.ends for each in extents])
        )

    def are_apart(self) -> bool:
        """Whether no two of them share a byte."""
        return not bool((self.ends[:-1] > self.begins[1:]).any())

    def meet(self, begins: torch.Tensor, sizes: torch.Tensor) -> bool:
        """Whether one of some others has a byte of these, of which no two share one."""
        begins, ends = begins[sizes > 0], (begins + sizes)[sizes > 0]
        if not len(begins) or not len(self.begins):
            return False
        first = torch.searchsorted(self.ends, begins, right=True)  # the first that ends behind it
        there = first < len(self.ends)
        met = self.begins[first.clamp(max=len(self.ends) - 1)] < ends
        return bool((there & met).any())


def versions(tensors: Sequence[torch.Tensor]) -> list[int]:
    """The version counters that autograd looks at."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def address(tensor: torch.Tensor | None) -> int:
    """Where it begins, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def tagged(number: torch.Tensor | None) -> int:
    """The address of a tensor of one number, with 1 added where it is fp64 and not fp32."""
    return address(number) + (number is not None and number.dtype is torch.float64)


def refuse_capture(why: str) -> NoReturn:
    """Refuse what must be sent while a CUDA graph is captured."""
    message = (
        f"while a CUDA graph is captured, nothing can be sent to the device, but {why}: "
        "make three steps before the capture, with the same gradients in place"
    )
    raise RuntimeError(message)
