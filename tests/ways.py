# SPDX-License-Identifier: Apache-2.0
"""The two ways to a planned optimizer, tensors in guarded memory, and snapshots of all bytes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from cases import Case

import pyupdate
from pyupdate.options import PARAMETERS

WAYS = ("ours", "accelerated")
ways = pytest.mark.parametrize("way", WAYS)


def optimizer_of(way: str, case: Case, params: Any, **more: Any) -> torch.optim.Optimizer:
    """An optimizer of `pyupdate.optim`, or torch's own, accelerated; `more` holds options too."""
    name = case.torch_class.__name__
    if way == "ours":
        ours: Any = getattr(pyupdate.optim, name)
        return ours(params, **{**case.options, **more})
    names = [parameter.name for parameter in PARAMETERS]
    options = {key: more.pop(key) for key in names if key in more}
    theirs: Any = case.torch_class
    return pyupdate.accelerate(theirs(params, **{**case.options, **more}), **options)


def plan_of(optimizer: torch.optim.Optimizer) -> Any:
    """The only plan of an optimizer that has made a step."""
    from pyupdate.pytorch.engines import engine_of

    (plan,) = engine_of(optimizer).plans.values()
    return plan


# ----- memory with guards -------------------------------------------------------------------------

GUARD = 64
_PATTERN = 0xA5


@dataclass(frozen=True)
class Held:
    """A tensor in a buffer of its own, whose other bytes are a pattern."""

    tensor: torch.Tensor
    buffer: np.ndarray[Any, Any]
    covered: np.ndarray[Any, Any]
    """Whether a byte of the buffer belongs to the tensor."""

    def assert_neighbours_untouched(self, what: str) -> None:
        wrong = np.flatnonzero(~self.covered & (self.buffer != _PATTERN))
        assert not wrong.size, f"{what}: {wrong.size} bytes beside it changed, first {wrong[0]}"


def held(values: torch.Tensor, strides: Sequence[int] | None = None, *, offset: int = 0) -> Held:
    """A copy of the values in guarded memory, with given strides and a misalignment in bytes."""
    strides = values.contiguous().stride() if strides is None else tuple(strides)
    size = values.element_size()
    reach = 1 + sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True))
    reach = 0 if values.numel() == 0 else reach
    buffer = np.full(2 * GUARD + 64 + offset + (reach + 1) * size, _PATTERN, np.uint8)
    address = buffer.ctypes.data
    start = GUARD + (-(address + GUARD) % 64) + offset
    # frombuffer is the one public way to a tensor whose address is no multiple of its item size.
    window = (ctypes.c_char * (buffer.size - start)).from_buffer(buffer, start)
    base = torch.frombuffer(window, dtype=values.dtype, count=reach + 1)
    view = base.as_strided(values.shape, strides)
    view.copy_(values)
    covered = np.zeros(buffer.size, bool)
    index = np.zeros(values.shape, np.int64)
    for axis, stride in enumerate(strides):
        shape = [1] * values.dim()
        shape[axis] = -1
        index = index + np.arange(values.shape[axis]).reshape(shape) * stride
    for byte in range(size):
        covered[start + index.reshape(-1) * size + byte] = True
    return Held(view, buffer, covered)


# ----- snapshots ----------------------------------------------------------------------------------


def bits(tensor: torch.Tensor) -> bytes:
    """The values' bytes in index order."""
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def _seen(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    try:
        values: Any = tuple(value.shape), bits(value.detach().resolve_neg().reshape(-1))
    except (RuntimeError, NotImplementedError, TypeError):  # meta, sparse, nested, wrappers
        values = None
    return id(value), str(value.dtype), value._version, values


def snapshot(optimizer: torch.optim.Optimizer) -> Any:
    """Everything that a refused step must leave: compare two with ``==``.

    Which tensors there are, their bytes and version counters: parameters, gradients, state.
    """
    return [
        (
            _seen(param),
            _seen(param.grad),
            {key: _seen(value) for key, value in optimizer.state.get(param, {}).items()},
            param in optimizer.state,
        )
        for group in optimizer.param_groups
        for param in group["params"]
    ]
