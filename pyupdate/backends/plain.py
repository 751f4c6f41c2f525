# SPDX-License-Identifier: Apache-2.0
"""What the back ends of devices do with tensors that do not lie as their kernels take them."""

from __future__ import annotations

import torch

from ..pytorch.checks import is_dense
from ..pytorch.rows import AVERAGE, GroupRule, Inputs, Row, mend_row


def is_plain(param: torch.Tensor) -> bool:
    """Whether kernels that know no strides can take its memory as it lies."""
    return is_dense(param) and param.data_ptr() % param.element_size() == 0


def mend(row: Row, rule: GroupRule, inputs: Inputs) -> bool:
    """Put into plain memory of the device what is not; whether anything changed; no value does.

    A gradient or state of another layout is copied into the parameter's, as a new tensor in its
    place; step counts and scalars are brought to the device.
    """
    mended = mend_row(row, rule, inputs)
    param, grad = row.param, row.param.grad
    if grad is None:
        return mended
    if _can_lie_like(grad, param) and not _lies_like(grad, param):
        param.grad = _copied_like(param, grad.detach())
        mended = True
    inner = inputs.state.get(param) or {}
    for key in (*(("step",) if rule.counts_steps else ()), *rule.rule.scalars):
        value = inner.get(key)
        if isinstance(value, torch.Tensor) and value.device != param.device:
            inner[key] = value.to(param.device)
            mended = True
    for key in (*rule.rule.state, AVERAGE):
        value = inner.get(key)
        if not isinstance(value, torch.Tensor) or not _can_lie_like(value, param):
            continue
        if not _lies_like(value, param):
            inner[key] = _copied_like(param, value)
            mended = True
    return mended


def _can_lie_like(tensor: torch.Tensor, param: torch.Tensor) -> bool:
    return (
        tensor.layout is torch.strided
        and tensor.shape == param.shape
        and tensor.device == param.device
    )


def _lies_like(tensor: torch.Tensor, param: torch.Tensor) -> bool:
    """Whether an element stands in the same place, at an address that its type may have."""
    strides = zip(tensor.shape, tensor.stride(), param.stride(), strict=True)
    same = all(a == b for n, a, b in strides if n > 1) or tensor.numel() == 0
    return same and tensor.data_ptr() % tensor.element_size() == 0


def _copied_like(param: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    made = torch.empty_strided(param.shape, param.stride(), dtype=tensor.dtype, device=param.device)
    return made.copy_(tensor)
