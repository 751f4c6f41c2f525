# SPDX-License-Identifier: Apache-2.0
"""What a sweep of Adafactor goes over: parameters of one shape, where they lie, and by whose calls.

Small parameters are copied together, a large one is taken where it lies, in blocks of its first
dimension. The memory for it is kept between steps: three blocks at most, whatever the model.
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

_SMALL = 2**14
"""Up to so many elements are swept by numpy on a CPU, in one thread: a call of it takes half a
microsecond and one of torch's two, by which a few small matrices took twice the time of torch's."""

_RUN = 1024
"""So many squares are added up in the compute type, and the runs in fp64. For 1024 x 1024 it takes
84 us, a norm of the whole 128, which of 2 million elements was off by 340 roundings."""


class Torch:
    """The calls of a sweep over tensors."""

    library = "torch"  # that the texts for what is small are bound to
    multiply, subtract, divide = torch.mul, torch.sub, torch.div

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


class Numpy:
    """The calls of a sweep over arrays."""

    multiply, subtract, divide = np.multiply, np.subtract, np.divide
    of_tensor = staticmethod(Tensor.numpy)
    to_tensor = staticmethod(torch.from_numpy)

    @staticmethod
    def small(values: Any) -> Any:
        """As it is."""
        return values

    operand = small

    @staticmethod
    def rounded(values: Any, dtype: torch.dtype) -> Any:
        """An operand in the compute type."""
        return values if dtype is torch.float64 else values.astype(np.float32)

    @staticmethod
    def sum(values: Any, dim: int) -> Any:
        """Of a dimension, which stays."""
        return np.add.reduce(values, dim, keepdims=True)

    @staticmethod
    def clip(values: Any, least: float | None, most: float | None, out: Any) -> Any:
        """A nan stays one."""
        if least is not None:
            values = np.maximum(values, values.dtype.type(least), out=out)
        return values if most is None else np.minimum(values, values.dtype.type(most), out=out)

    @staticmethod
    def norm(runs: Sequence[Any]) -> Any:
        """That of each parameter, in fp64; of `_runs`."""
        squares = sum(np.add.reduce(run * run, -1).sum(-1, dtype=np.float64) for run in runs)
        return np.sqrt(squares)


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

    def take(self, purpose: str, like: Tensor) -> Tensor:
        """Memory for as many elements, in the same order if those fill theirs, to compute in."""
        flat = self._kept.get(purpose)
        if flat is None:
            flat = torch.empty(self.count, dtype=self._dtype, device=self._device)
            self._kept[purpose] = flat
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
        self.is_vector = len(self.shape) == 1
        self.blocks = _blocks(params)
        self.steps = [one["step"] for one in inner]
        keys = ("variance",) if self.is_vector else ("row_var", "col_var")
        self.stored = {key: [one[key] for one in inner] for key in keys}
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
        self._params_at: list[Any] = taken
        self.calls = calls_on(params[0].device)
        if self.calls.library == "numpy" and elements(params) <= _SMALL:
            self.calls = Numpy
            self.roots = _as_arrays(self.roots)
            self._params_at = _as_arrays(taken)
            self._runs_of_roots = [*map(_as_arrays, self._runs_of_roots)]
            self._runs_of_params = [*map(_as_arrays, self._runs_of_params)]

    def _parted(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Block by block what is there of the one tensor; of several, what is alike to all."""
        first = tensors[0].view(1, *self.shape)
        if len(tensors) > 1:
            return [first.expand(len(tensors), *self.shape)]
        return [first] if len(self.blocks) == 1 else [first[:, block] for block in self.blocks]

    def param(self, at: int) -> Any:
        """Block `at` of the parameters, to be written: themselves where they can be, or a copy."""
        if self._is_copied:
            _load(self._copies[at], self._params, self._places[at])
        return self._params_at[at]

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
        if self.calls is Numpy:
            given, grad = place.numpy(), grad.numpy()
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


def _as_arrays(tensors: Sequence[Tensor]) -> list[Any]:
    return [tensor.numpy() for tensor in tensors]


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
