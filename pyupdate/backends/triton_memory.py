# SPDX-License-Identifier: Apache-2.0
"""Where tensors lie, as the Triton back end asks it."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Extents:
    """The memory of tensors that do not overlap and have no gaps."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._begins, self._ends = _extents(tensors)
        order = self._begins.argsort()
        self._begins, self._ends = self._begins[order], self._ends[order]

    def meet(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether one of some others, without gaps too, has a byte of them."""
        begins, ends = _extents(tensors)
        if not len(begins) or not len(self._begins):
            return False
        first = torch.searchsorted(self._ends, begins, right=True)  # the first that ends behind it
        there = first < len(self._ends)
        met = self._begins[first.clamp(max=len(self._ends) - 1)] < ends
        return bool((there & met).any())


def _extents(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    full = [tensor for tensor in tensors if tensor.numel()]
    begins = torch.tensor([tensor.data_ptr() for tensor in full], dtype=torch.int64, device="cpu")
    sizes = torch.tensor(
        [t.numel() * t.element_size() for t in full], dtype=torch.int64, device="cpu"
    )
    return begins, begins + sizes


def versions(tensors: Sequence[torch.Tensor]) -> list[int]:
    """The version counters that autograd looks at."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def address(tensor: torch.Tensor | None) -> int:
    """Where it begins, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def tagged(number: torch.Tensor | None) -> int:
    """The address of a tensor of one number, with 1 added where it is fp64 and not fp32."""
    return address(number) + (number is not None and number.dtype is torch.float64)
