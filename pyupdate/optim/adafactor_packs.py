# SPDX-License-Identifier: Apache-2.0
"""Small parameters of whatever shapes, one behind the other in one memory, for a sweep on a CPU.

A few small matrices of different shapes take a step as long as its calls do, some fifty a shape.
In a pack nearly all of them are made once: over the elements of all parameters, over the averages
(R of all rows, C of all columns, V of all vectors, in this order), or, where sums are taken, from
place to place. Only a product of rows and columns, and a sum of columns, are a call a shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .adafactor_stacks import Scratch

SMALL = 2**16
"""Elements up to which parameters of one shape, together, are packed. By numpy, in one thread: a
call of it takes half a microsecond and one of torch's two. One of 256 x 256 takes 1.0 ms so and 1.5
as a stack; for much more than that torch's calls are faster, which are those of several threads."""

PACK = 2**17
"""Elements of a pack at most: three times half a MiB of float32, which stay in a core's cache."""

_PART = 256
"""Rows that are added one by one: of 60,000 so added a sum was off by 56 roundings, now by 2."""


class Numpy:
    """The calls of a sweep over arrays."""

    multiply, subtract, divide = np.multiply, np.subtract, np.divide

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
    def clip(values: Any, least: float | None, most: float | None, out: Any) -> Any:
        """A nan stays one."""
        if least is not None:
            values = np.maximum(values, values.dtype.type(least), out=out)
        return values if most is None else np.minimum(values, values.dtype.type(most), out=out)


class Pack:
    """Parameters of one dtype and group that are stepped together.

    Args:
        group: its index.
        params: with gradients and elements, on a CPU, in the order that `parted` gives them.
        inner: their states.
        scratch: for parameters of this dtype, of `elements(params)` or more.
    """

    calls = Numpy

    def __init__(
        self, group: int, params: list[Tensor], inner: list[dict[str, Any]], scratch: Scratch
    ) -> None:
        self.group = group
        self.like = params[0]
        self.steps = [one["step"] for one in inner]
        self._owners = params
        self._params = [param.detach() for param in params]
        lengths = [param.numel() for param in params]
        self._lengths = np.array(lengths)
        self.root_of_count = np.sqrt(self._lengths.astype(np.float64))

        param, grad, of_root = (
            scratch.flat(of, scratch.count)[: sum(lengths)] for of in ("param", "grad", "root")
        )
        self._param_places, self._grad_places = _cut(param, params), _cut(grad, params)
        self._param, self._grad, self._root = param.numpy(), grad.numpy(), of_root.numpy()
        self.roots = [self._root]
        self._first = _starts(lengths)

        shapes = [_matrices(param) for param in params if param.dim() > 1]
        self._matrices = len(shapes)
        self._widths = np.repeat([w for _, _, w in shapes], [n * h for n, h, _ in shapes])
        self._heights = np.repeat([h for _, h, _ in shapes], [n for n, _, _ in shapes])
        self._first_elements, self._first_rows = _starts(self._widths), _starts(self._heights)
        self._row_count = len(self._widths)
        heights_of_cols = np.repeat([h for _, h, _ in shapes], [n * w for n, _, w in shapes])
        self._divisors = np.concatenate([self._widths, heights_of_cols]).astype(self._root.dtype)
        self._heights_as_numbers = self._heights.astype(self._root.dtype)
        self._sums = np.empty_like(self._divisors)
        self._vectors = int(self._widths.sum())  # where their elements begin
        self._alike = [*self._by_shape(shapes)]

        stored = [one["row_var"] for one in inner[: len(shapes)]]
        stored += [one["col_var"] for one in inner[: len(shapes)]]
        stored += [one["variance"] for one in inner[len(shapes) :]]
        self._stored = stored
        self._stored_lengths = [one.numel() for one in stored]
        averages = scratch.flat("averages", sum(self._stored_lengths))
        self._average_places = _cut(averages, stored)
        self._averages = averages.numpy()

    def _by_shape(
        self, shapes: Sequence[tuple[int, int, int]]
    ) -> Iterator[tuple[Any, Any, slice, slice]]:
        """Of the matrices of each shape: their roots, sums of columns, their rows and columns."""
        at = row = col = 0
        of_cols = self._sums[self._row_count :]
        for (height, width), alike in groupby(shapes, lambda shape: shape[1:]):
            n = sum(count for count, _, _ in alike)
            rows, cols = slice(row, row + n * height), slice(col, col + n * width)
            root = self._root[at : at + n * height * width].reshape(n, height, width)
            yield root, of_cols[cols].reshape(n, width), rows, cols
            at, row, col = at + root.size, rows.stop, cols.stop

    def param(self, at: int) -> Any:
        """The parameters, to be written."""
        del at  # there is one block
        torch._foreach_copy_(self._param_places, self._params)
        return self._param

    def store(self, at: int) -> None:
        """Round what `param` gave to where the parameters lie."""
        del at
        torch._foreach_copy_(self._params, self._param_places)

    def grad(self, at: int, multiplier: float | None, clip_value: float | None) -> Any:
        """The gradients, unscaled and clipped."""
        del at
        grads = [param.grad for param in self._owners if param.grad is not None]
        torch._foreach_copy_(self._grad_places, grads)
        grad = self._grad
        if multiplier is not None:
            np.multiply(grad, multiplier, out=grad)
        if clip_value is not None:
            self.calls.clip(grad, -clip_value, clip_value, out=grad)
        return grad

    def norm_of_param(self, at: int) -> Any:
        """That of each parameter, in fp64; before there is anything in `roots`."""
        del at
        return self._norm(np.multiply(self._param, self._param, out=self._root))

    def norm_of_root(self, at: int) -> Any:
        """That of what stands in `roots`; behind it the gradients are gone."""
        del at
        return self._norm(np.multiply(self._root, self._root, out=self._grad))

    def _norm(self, squares: Any) -> Any:
        return np.sqrt(np.add.reduceat(squares, self._first).astype(np.float64))

    def add_up(self, at: int, squares: Any) -> None:
        """Take the sums of squares over rows and over columns."""
        del at
        if self._row_count:
            of_rows = self._sums[: self._row_count]
            np.add.reduceat(squares[: self._vectors], self._first_elements, out=of_rows)
        for alike, of_cols, _, _ in self._alike:  # squares, as long as they stand in `roots`
            _add_rows(alike, of_cols)

    def averages(self) -> list[tuple[Any, Any]]:
        """R, C and V as they were, with what enters them."""
        means = np.divide(self._sums, self._divisors, out=self._sums)
        torch._foreach_copy_(self._average_places, self._stored)
        return [(self._averages, np.concatenate([means, self._root[self._vectors :]]))]

    def keep_averages(self, after: Sequence[Any]) -> None:
        """Round R, C and V to the states."""
        self._averages[:] = after[0]
        torch._foreach_copy_(self._stored, self._average_places)

    def rows_and_others(self, after: Sequence[Any]) -> tuple[Any, Any]:
        """R (None without matrices), and C with V."""
        count = self._row_count
        return (after[0][:count] if count else None), after[0][count:]

    def mean_of_rows(self, row_var: Any) -> Any:
        """The mean of R of each matrix, beside its rows."""
        means = np.add.reduceat(row_var, self._first_rows) / self._heights_as_numbers
        return np.repeat(means, self._heights)

    def spread(self, at: int, of_rows: Any, others: Any) -> Any:
        """The roots of all elements."""
        del at
        for alike, _, rows, cols in self._alike:
            n, height, width = alike.shape
            these = of_rows[rows].reshape(n, height, 1), others[cols].reshape(n, 1, width)
            np.multiply(*these, out=alike)
        count = len(self._sums) - self._row_count
        self._root[self._vectors :] = others[count:]
        return self._root

    def of_elements(self, values: Any) -> Any:
        """Numbers of each parameter beside their elements; one of all as it is."""
        return values if len(values) == 1 else np.repeat(values, self._lengths)

    def of_averages(self, values: Any) -> Any:
        """Numbers of each parameter beside their averages; one of all as it is."""
        if len(values) == 1:
            return values
        return np.repeat(np.concatenate([values[: self._matrices], values]), self._stored_lengths)


def _cut(flat: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """The places of parameters that lie one behind the other."""
    parts = flat.split_with_sizes([param.numel() for param in params])
    return [part.view(param.shape) for part, param in zip(parts, params, strict=True)]


def _add_rows(matrices: Any, sums: Any) -> None:
    """Put the sums of columns there, in the order of the rows; of many rows, of parts of them."""
    count, height, width = matrices.shape
    if height < 8 and count >= 16:
        np.copyto(sums, matrices[:, 0])  # of 64 x 64 kernels of 3 x 3: 53 us, by `reduce` 280
        for at in range(1, height):
            np.add(sums, matrices[:, at], out=sums)
    elif height < 2 * _PART:
        np.add.reduce(matrices, 1, out=sums)
    else:
        whole = height - height % _PART
        parts = matrices[:, :whole].reshape(count, -1, _PART, width)
        np.add.reduce(np.add.reduce(parts, 2), 1, out=sums)
        np.add(sums, np.add.reduce(matrices[:, whole:], 1), out=sums)


def _starts(lengths: Any) -> Any:
    """Where each of them begins."""
    ends = np.cumsum(lengths, dtype=np.int64)
    return ends - np.asarray(lengths, dtype=np.int64)


def _matrices(param: Tensor) -> tuple[int, int, int]:
    """Of more than one dimension: how many matrices it is, their height and width."""
    height, width = param.shape[-2:]
    return param.numel() // (height * width), height, width


def elements(params: Sequence[Tensor]) -> int:
    """Those of all parameters together."""
    return sum(param.numel() for param in params)


def parted(
    together: Sequence[tuple[tuple[Any, ...], list[Tensor]]],
) -> tuple[list[tuple[int, list[Tensor]]], list[tuple[int, list[Tensor]]]]:
    """What is packed, and what is not.

    Args:
        together: parameters of one shape each, with what a pack has to have in common, of which
            the first is the index of the group.

    Returns:
        Twice groups with the parameters that are swept together.
    """
    packs: list[tuple[int, list[Tensor]]] = []
    others: list[tuple[int, list[Tensor]]] = []
    unfilled: dict[tuple[Any, ...], tuple[int, list[Tensor]]] = {}
    for key, params in sorted(together, key=lambda one: _place(one[1][0])):
        size = elements(params)
        if params[0].device.type != "cpu" or size > SMALL:
            others.append((key[0], params))
            continue
        before, pack = unfilled.get(key, (PACK, []))
        if before + size > PACK:
            before, pack = 0, []
            packs.append((key[0], pack))
        pack.extend(params)
        unfilled[key] = before + size, pack
    return packs, others


def _place(param: Tensor) -> tuple[int, ...]:
    """Matrices of one shape side by side, and vectors behind them."""
    return (0, *param.shape[-2:]) if param.dim() > 1 else (1,)
