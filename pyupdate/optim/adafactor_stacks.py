# SPDX-License-Identifier: Apache-2.0
"""What a sweep of Adafactor goes over: parameters of one shape, where they lie, and by whose calls.

Parameters of one shape are copied together, a large one is taken where it lies, in blocks of its
first dimension. The memory for it is kept between steps: three blocks at most, whatever the model.
What is small, of whatever shape, goes into a pack instead (`adafactor_packs.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..pytorch import checks

BLOCK = 2**20
"""Elements of a block: 4 MiB of float32, which stay in a CPU's last cache from sweep to sweep."""

_RUN = 1024
"""So many squares are added up in the compute type, and the runs in fp64. For 1024 x 1024 it takes
84 us, a norm of the whole 128, which of 2 million elements was off by 340 roundings."""


class Torch:
    """The calls of a sweep over tensors."""

    library = "torch"  # that the texts for what is small are bound to
    multiply, subtract, divide = torch.mul, torch.sub, torch.div

    @staticmethod
    def of_numbers(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Any:
        """Some numbers as they take them."""
        return torch.tensor(values, dtype=torch.float64, device="cpu").to(device, dtype)

    @staticmethod
    def of_tensor(values: Tensor) -> Any:
        """A tensor as the texts for what is small take it."""
        return values

    small = of_tensor  # and what a sweep has made

    @staticmethod
    def to_tensor(values: Any) -> Tensor:
        """What a text has made, as a tensor."""
        made: Tensor = values
        return made

    operand = to_tensor  # and as a sweep takes it

    @staticmethod
    def rounded(values: Any, dtype: torch.dtype) -> Any:
        """An operand in the compute type."""
        return values.to(dtype)

    @staticmethod
    def sum(values: Any, dim: int) -> Any:
        """Of a dimension, which stays."""
        return values.sum(dim, keepdim=True)

    @staticmethod
    def clip(values: Any, least: float | None, most: float | None, out: Any) -> Any:
        """A nan stays one."""
        return torch.clamp(values, min=least, max=most, out=out)

    @staticmethod
    def norm(runs: Sequence[Any]) -> Any:
        """That of each parameter, in fp64; of `_runs`."""
        norm = torch.linalg.vector_norm
        parts = joined([norm(run, dim=-1) for run in runs], 1)
        return norm(parts, dim=-1, dtype=torch.float64)


class TorchOnCpu(Torch):
    """There numpy computes what is small, to the same bits."""

    library = "numpy"
    of_tensor = small = staticmethod(Tensor.numpy)  # type: ignore[assignment]
    to_tensor = operand = staticmethod(torch.from_numpy)  # type: ignore[assignment]

    @staticmethod
    def of_numbers(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Any:
        """Some numbers as an array."""
        del device
        return np.array(values, dtype=np.float64 if dtype is torch.float64 else np.float32)


def calls_on(device: torch.device) -> Any:
    """How tensors are swept there."""
    return TorchOnCpu if device.type == "cpu" else Torch


class Scratch:
    """Memory that is kept between steps, a block a purpose; no part of the optimizer's state."""

    def __init__(self, dtype: torch.dtype, device: torch.device, count: int) -> None:
        self.count = count
        self._dtype = dtype
        self._device = device
        self._kept: dict[str, Tensor] = {}

    def flat(self, purpose: str, count: int) -> Tensor:
        """Memory for so many elements."""
        flat = self._kept.get(purpose)
        if flat is None or flat.numel() < count:
            flat = torch.empty(count, dtype=self._dtype, device=self._device)
            self._kept[purpose] = flat
        return flat[:count]

    def take(self, purpose: str, like: Tensor) -> Tensor:
        """Memory for as many elements, in the same order if those fill theirs, to compute in."""
        flat = self.flat(purpose, self.count)
        if like.is_contiguous() or not checks.is_dense(like):
            return flat[: like.numel()].view(like.shape)
        return flat.as_strided(like.shape, like.stride())


class Stack:
    """Parameters of one shape, dtype and group that are stepped together, and where they lie.

    Args:
        group: its index.
        params: with gradients and elements; one, or several that are one block together.
        inner: their states.
        scratch: for parameters of this dtype on this device, of `elements(params)` or more.
    """

    def __init__(
        self, group: int, params: list[Tensor], inner: list[dict[str, Any]], scratch: Scratch
    ) -> None:
        self.group = group
        self.like = params[0]
        self.shape = tuple(params[0].shape) or (1,)
        self._is_vector = len(self.shape) == 1
        self._blocks = _blocks(params)
        self.steps = [one["step"] for one in inner]
        keys = ("variance",) if self._is_vector else ("row_var", "col_var")
        self._stored = [[one[key] for one in inner] for key in keys]
        self._owners = params
        self._params = [param.detach() for param in params]
        self._scratch = scratch
        self._places = self._parted(self._params)
        self.roots: list[Any] = [scratch.take("root", place) for place in self._places]
        self._is_copied = (
            len(params) > 1
            or params[0].dtype is not self.roots[0].dtype
            or not all(map(checks.is_dense, self._places))
        )
        taken = self._places
        if self._is_copied:
            taken = [scratch.take("param", place) for place in self._places]
        self._copies = taken
        self._runs_of_roots = [_runs(root) for root in self.roots]
        self._runs_of_params = [_runs(one) for one in taken]
        self.calls = calls_on(params[0].device)
        self.root_of_count = math.sqrt(math.prod(self.shape))
        self._row_sums: list[Any] = []
        self._col_sums: list[Any] = []

    def _parted(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Block by block what is there of the one tensor; of several, what is alike to all."""
        first = tensors[0].view(1, *self.shape)
        if len(tensors) > 1:
            return [first.expand(len(tensors), *self.shape)]
        return [first] if len(self._blocks) == 1 else [first[:, block] for block in self._blocks]

    def param(self, at: int) -> Any:
        """Block `at` of the parameters, to be written: themselves where they can be, or a copy."""
        if self._is_copied:
            _load(self._copies[at], self._params, self._places[at])
        return self._copies[at]

    def store(self, at: int) -> None:
        """Round what `param` gave to where the parameters lie, where it was a copy."""
        if len(self._params) > 1:
            store(self._params, self._copies[at])
        elif self._is_copied:
            self._places[at].copy_(self._copies[at])

    def grad(self, at: int, multiplier: float | None, clip_value: float | None) -> Any:
        """Block `at` of the gradients, unscaled and clipped, to be read only."""
        grads = [param.grad for param in self._owners if param.grad is not None]
        place = self._parted(grads)[at]
        is_changed = multiplier is not None or clip_value is not None
        grad: Any = place
        if self._is_copied or is_changed:
            grad = copy = self._scratch.take("grad", place)
            if self._is_copied:
                _load(copy, grads, place)
                place = copy
        given: Any = place
        if multiplier is not None:
            given = self.calls.multiply(given, multiplier, out=grad)
        if clip_value is not None:
            self.calls.clip(given, -clip_value, clip_value, out=grad)
        return grad

    def norm_of_param(self, at: int) -> Any:
        """That of what `param` gave, of each parameter, in fp64."""
        return self.calls.norm(self._runs_of_params[at])

    def norm_of_root(self, at: int) -> Any:
        """That of what stands in `roots`."""
        return self.calls.norm(self._runs_of_roots[at])

    def add_up(self, at: int, squares: Any) -> None:
        """Take the sums of squares over rows and over columns of block `at`, of each in turn."""
        if at == 0:
            self._row_sums, self._col_sums = [], []
        if self._is_vector:
            self._col_sums.append(squares)
        else:
            self._row_sums.append(self.calls.sum(squares, -1))
            self._col_sums.append(self.calls.sum(squares, -2))

    def averages(self) -> list[tuple[Any, Any]]:
        """R and C, or V, as they were, each with what enters it."""
        means = self._col_sums
        if not self._is_vector:
            height, width = self.shape[-2:]
            # Blocks of a matrix have parts of all columns, those of more dimensions some columns.
            of_cols = joined(self._col_sums, 1)
            if len(self._col_sums) > 1 and len(self.shape) == 2:
                of_cols = self.calls.sum(of_cols, 1)
            means = [joined(self._row_sums, 1) / width, of_cols / height]
        self._row_sums, self._col_sums = [], []
        before = [one[0] if len(one) == 1 else torch.stack(one) for one in self._stored]
        return [
            (self.calls.of_tensor(old.view(new.shape).to(new.dtype)), self.calls.small(new))
            for old, new in zip(before, means, strict=True)
        ]

    def keep_averages(self, after: Sequence[Any]) -> None:
        """Round R and C, or V, to the states."""
        for stored, values in zip(self._stored, after, strict=True):
            store(stored, self.calls.to_tensor(values))

    def rows_and_others(self, after: Sequence[Any]) -> tuple[Any, Any]:
        """R and C, or None and V."""
        return (None, after[0]) if self._is_vector else (after[0], after[1])

    def mean_of_rows(self, row_var: Any) -> Any:
        """The mean of R of each matrix, beside its rows."""
        return (row_var[..., 0].sum(-1) / self.shape[-2])[..., None, None]

    def spread(self, at: int, of_rows: Any, others: Any) -> Any:
        """The roots of the elements of block `at`, in their place or where V's stand."""
        if of_rows is None:
            return others
        block = self._blocks[at]
        of_cols = others if len(self.shape) == 2 else others[:, block]
        return self.calls.multiply(of_rows[:, block], of_cols, out=self.roots[at])

    def of_elements(self, values: Any) -> Any:
        """Numbers of each parameter, or one of all, beside their elements."""
        return values.reshape(-1, *(1 for _ in self.shape))

    of_averages = of_elements  # and beside their averages


def _load(copy: Tensor, tensors: Sequence[Tensor], place: Tensor) -> None:
    if len(tensors) == 1:
        copy.copy_(place)
    else:
        torch.stack(list(tensors), out=copy.view(len(tensors), *tensors[0].shape))


def store(tensors: Sequence[Tensor], values: Tensor) -> None:
    """Round a stack to its tensors."""
    if len(tensors) == 1:
        tensors[0].copy_(values.view(tensors[0].shape))
    else:
        torch._foreach_copy_(list(tensors), values.view(-1, *tensors[0].shape).unbind())


def joined(parts: Sequence[Any], dim: int) -> Any:
    """The results of blocks, one behind the other."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _runs(values: Tensor) -> list[Any]:
    """The elements of a stack of dense tensors, in an order in which they are added up fast."""
    count = values[0].numel()
    flat = values.as_strided((len(values), count), (count, 1))  # in the order of memory
    whole = count - count % _RUN
    runs = [flat[:, :whole].view(len(values), -1, _RUN)] if whole else []
    return runs if whole == count else [*runs, flat[:, None, whole:]]


def _blocks(params: Sequence[Tensor]) -> list[slice]:
    """The parts of the first dimension that a sweep takes in turn."""
    shape = params[0].shape
    if len(params) > 1 or len(shape) < 2:
        return [slice(None)]
    most = max(1, BLOCK * shape[0] // shape.numel())
    return [slice(at, at + most) for at in range(0, shape[0], most)]


def elements(params: Sequence[Tensor]) -> int:
    """Those of the largest block of a stack."""
    shape, first = params[0].shape, _blocks(params)[0]
    parts = 1 if first.stop is None else shape[0] / min(first.stop, shape[0])
    return len(params) * math.ceil(shape.numel() / parts)
