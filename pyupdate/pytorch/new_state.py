# SPDX-License-Identifier: Apache-2.0
"""The state that a first step makes, and the averages: torch's keys and values, in our memory.

Small tensors of one kind are cut from common memory, one behind the other in the order in which a
step goes through them. Each for itself they lie scattered between a thousand other objects, and a
step of a thousand parameters of 256 elements, behind a forward and backward pass, waits for memory
half of its time: so cut it took 1.27 ms instead of 1.48 (EPYC, AdamW, torch 2.13).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..kernels.language import Initial
from . import state as states
from .rows import AVERAGE, GroupRule, Inputs, Row, has_state, lacks_average

SMALL = 1 << 14
"""Bytes up to which a tensor is cut from common memory."""

COMMON = 1 << 20
"""Bytes of common memory at most: what stays as long as one tensor in it is alive."""

ALIGNED = 64
"""Bytes: where each tensor of state begins, so that no two share a cache line."""


@dataclass(frozen=True)
class _New:
    """A tensor that is to be made."""

    param: torch.Tensor
    key: str
    dtype: torch.dtype
    initial: float | None
    """What it is filled with; None for the parameter's values."""
    is_scalar: bool
    """Whether it is one number, where others have the parameter's shape."""

    @property
    def shape(self) -> torch.Size:
        return torch.Size() if self.is_scalar else self.param.shape

    @property
    def room(self) -> int:
        """Elements that it takes of common memory; 0 where it has memory of its own."""
        if self.is_scalar:
            return 1
        size = self.param.numel()
        if not self.param.is_contiguous() or not 0 < size * self.dtype.itemsize <= SMALL:
            return 0
        line = ALIGNED // self.dtype.itemsize
        return -(-size // line) * line

    @property
    def kind(self) -> tuple[str, torch.dtype, torch.device]:
        """What tensors of one common memory are alike in."""
        return self.key, self.dtype, self.param.device


class _CommonMemory:
    """Memory of the tensors of one kind, which are cut from it in turn."""

    def __init__(self, elements: int) -> None:
        self._left = elements
        self._block: torch.Tensor | None = None
        self._used = 0

    def cut(self, new: _New) -> torch.Tensor:
        """Zeros of its shape."""
        if self._block is None or self._used + new.room > self._block.numel():
            size = min(self._left, COMMON // new.dtype.itemsize)
            self._block = torch.zeros(size, dtype=new.dtype, device=new.param.device)
            self._used = 0
        found = _with_a_storage(self._block[self._used : self._used + new.shape.numel()])
        self._used += new.room
        self._left -= new.room
        return found.view(new.shape)


def make_state(
    rows: Sequence[Row],
    rules: Sequence[GroupRule],
    inputs: Inputs,
    made: list[tuple[torch.Tensor, str]],
) -> None:
    """Give parameters the state that torch's optimizer would, under torch's keys, and averages.

    What is there already stays; what is made is listed in `made`, to be taken back after a failure.

    What is made in one go shares one autograd version counter, so that a step bumps it once
    instead of once a tensor (20 to 40 ns each), step counts and scalars another one. A counter that
    moves too often is harmless: autograd refuses a graph that saved one of these tensors if any of
    them was written since.
    """
    every = [new for row in rows for new in _lacking(row, rules[row.group], inputs)]
    rooms: Counter[tuple[str, torch.dtype, torch.device]] = Counter()
    for new in every:
        rooms[new.kind] += new.room
    memory = {kind: _CommonMemory(elements) for kind, elements in rooms.items()}
    counters: dict[tuple[torch.device, bool], torch.Tensor] = {}
    for new in every:
        values = memory[new.kind].cut(new) if new.room else _zeros(new)
        if new.initial is None:
            values.copy_(new.param.detach())
        elif new.initial != 0.0:
            values.fill_(new.initial)
        made.append((new.param, new.key))
        counter = new.param.device, new.is_scalar
        if counter not in counters:
            counters[counter] = torch.zeros((), device=new.param.device)
        inputs.state[new.param][new.key] = _count_with(counters[counter], values.detach())


def _with_a_storage(part: torch.Tensor) -> torch.Tensor:
    """The same flat memory under a storage of its own and of its size: a pickle of it is no larger.

    pickle writes the storage of each tensor: of 1,000 of 256 elements it made 2 GB, each with all.
    """
    if part.device.type not in ("cpu", "cuda"):
        return part
    return torch.utils.dlpack.from_dlpack(torch._C._to_dlpack(part))


def _zeros(new: _New) -> torch.Tensor:
    return torch.zeros_like(new.param, dtype=new.dtype, memory_format=torch.preserve_format)


def _lacking(row: Row, rule: GroupRule, inputs: Inputs) -> Iterator[_New]:
    """What a parameter has not, in torch's order of making it."""
    inner = inputs.state[row.param]
    if rule.keys and not has_state(inner, rule.keys, row.name):
        numbers = dict(zip(rule.rule.numbers, inputs.numbers[row.group][1:], strict=True))

        def initial(of: Initial) -> float | None:
            return (None if of == "param" else numbers[of]) if isinstance(of, str) else of

        if rule.counts_steps:
            yield _New(row.param, "step", states.scalar_type(), 0.0, True)
        for key, value in rule.rule.scalars.items():
            yield _New(row.param, key, states.scalar_type(), initial(value), True)
        dtype = states.dtype_for(row.param, inputs.state_dtype)
        for key, value in rule.rule.state.items():
            yield _New(row.param, key, dtype, initial(value), False)
    if lacks_average(inner, inputs):
        yield _New(row.param, AVERAGE, states.compute_type(row.param), None, False)


def _count_with(counted: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A tensor of these values whose version counter is that of `counted`."""
    if values.device != counted.device or torch.is_inference_mode_enabled():
        return values
    alias = counted.detach()
    alias.data = values
    return alias
