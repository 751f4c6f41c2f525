# SPDX-License-Identifier: Apache-2.0
"""Adafactor's sweeps over memory: operations in place, over memory that is kept.

For gradient g and parameter p, with the texts of `kernels/composite.py` for the averages, the roots
of rows and columns and the size:

    1. R, C: averages of the means of g^2 over rows and over columns; V: of g^2; norm of p
    2. s = max(root of row x root of column, eps1), or max(sqrt(V), eps1)    u = g / s; norm of u
    3. p <- p decay - u size

Where a parameter is more than one block, u is made twice. Every elementwise operation is rounded
once; sums are outside of the numeric contract: torch and numpy add up in their own order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import composite, rules
from ..kernels.bind import bind
from ..pytorch import state as states
from ..pytorch.rows import Group, numbers_of
from .adafactor_stacks import Stack, calls_on, joined, store


class Numbers:
    """What a step reads of a group, for parameters of one dtype and device.

    Args:
        group: of the optimizer.
        like: one of its parameters.
        multiplier: of the gradients, without the sign of ``maximize``.
        clip_value: the option, None without.
    """

    def __init__(
        self, group: Group, like: Tensor, multiplier: float, clip_value: float | None
    ) -> None:
        sign, *self._given = numbers_of(rules.adafactor, group)
        self._device = like.device
        self.dtype = states.compute_type(like)
        self._calls = calls_on(like.device)
        library = self._calls.library
        self.average = bind(composite.adafactor_average, library)
        self.row_root = bind(composite.adafactor_row_root, library)
        self.root = bind(composite.adafactor_root, library)
        self._size = bind(composite.adafactor_size, library)
        eps1, eps2 = group["eps"]
        self.least = float(torch.finfo(like.dtype).eps if eps1 is None else eps1)
        self.eps1 = self._number(self.least, self.dtype)
        self._eps2 = self._number(float(eps2), torch.float64)
        self._threshold = self._number(float(group["d"]), torch.float64)
        self.multiplier: float | None = None
        if multiplier * sign != 1.0:  # rounded here, or a product would be of two precisions
            self.multiplier = float(torch.tensor(multiplier * sign, dtype=self.dtype))
        self.clip_value = clip_value
        self._prepared: dict[tuple[float, ...], tuple[Any, Any, Any]] = {}

    def _number(self, value: float, dtype: torch.dtype) -> Any:
        return self._calls.small(torch.full((1,), value, dtype=dtype, device=self._device))

    def schedules(self, steps: Sequence[Tensor]) -> tuple[Any, Any, Any]:
        """Decay (None: 1), rho and 1 - b2 of each parameter, or one of all with equal steps."""
        counts = tuple(torch.stack(list(steps)).flatten().tolist())
        if len(set(counts)) == 1:
            counts = counts[:1]
        if counts not in self._prepared:
            prepare = rules.adafactor.prepared
            known = {count: prepare(int(count), self._given, {})[0] for count in set(counts)}
            decay, rho, one_minus_beta2 = (
                torch.tensor([known[count][name] for count in counts], dtype=torch.float64)
                for name in ("decay", "rho", "one_minus_beta2")
            )
            small = self._calls.small
            is_one = all(one["decay"] == 1.0 for one in known.values())
            self._prepared[counts] = (
                None if is_one else small(decay.to(self._device, self.dtype)),
                small(rho.to(self._device)),
                small(one_minus_beta2.to(self._device, self.dtype)),
            )
        return self._prepared[counts]

    def size(self, param_rms: Any, direction_rms: Any, rho: Any) -> Any:
        """What each direction is multiplied by, in fp64."""
        return self._size(param_rms, direction_rms, rho, self._eps2, self._threshold)


def step(stack: Stack, numbers: Numbers) -> None:
    """One step of a stack, in operations whose number is not that of its parameters."""
    calls = stack.calls
    decay, rho, one_minus_beta2 = numbers.schedules(stack.steps)
    each = (-1, *(1 for _ in stack.shape))
    blocks = range(len(stack.blocks))
    again = len(blocks) > 1  # one block still stands in the scratch
    factors = numbers.multiplier, numbers.clip_value
    norms: list[Any] = []
    row_sums: list[Any] = []
    col_sums: list[Any] = []
    for at in blocks:
        param = stack.param(at)
        norms.append(stack.norm_of_param(at))
        grad = stack.grad(at, *factors)
        squares = calls.multiply(grad, grad, out=stack.roots[at])
        if not stack.is_vector:
            row_sums.append(calls.sum(squares, -1))
            col_sums.append(calls.sum(squares, -2))
    new = one_minus_beta2.reshape(each)
    roots = _roots(stack, numbers, new, squares, row_sums, col_sums)

    direction_norms: list[Any] = []
    for at in blocks:
        _direct(stack, at, roots, stack.grad(at, *factors) if again else grad, numbers)
        direction_norms.append(stack.norm_of_root(at))
    count = math.sqrt(math.prod(stack.shape))
    param_rms, direction_rms = (_rms(stack, of, count) for of in (norms, direction_norms))
    size = calls.operand(numbers.size(param_rms, direction_rms, rho))
    size = calls.rounded(size, numbers.dtype).reshape(each)

    for at in blocks:
        direction = stack.roots[at]
        if again:
            _direct(stack, at, roots, stack.grad(at, *factors), numbers)
            param = stack.param(at)
        if decay is not None:
            calls.multiply(param, calls.operand(decay).reshape(each), out=param)
        calls.multiply(direction, size, out=direction)
        calls.subtract(param, direction, out=param)
        stack.store(at)


def _roots(
    stack: Stack,
    numbers: Numbers,
    new: Any,
    squares: Any,
    row_sums: Sequence[Any],
    col_sums: Sequence[Any],
) -> tuple[Any, Any]:
    """Move the averages; the roots of rows and columns, or those of a vector and None."""
    calls = stack.calls
    if stack.is_vector:
        variance = _averaged(stack, "variance", squares, new, numbers)
        return calls.operand(numbers.root(variance)), None
    height, width = stack.shape[-2:]
    row_var = _averaged(stack, "row_var", joined(row_sums, 1) / width, new, numbers)
    # Blocks of a matrix have parts of every column, those of more dimensions columns of their own.
    sums = joined(col_sums, 1)
    if len(col_sums) > 1 and len(stack.shape) == 2:
        sums = calls.sum(sums, 1)
    col_var = _averaged(stack, "col_var", sums / height, new, numbers)
    mean = (row_var[..., 0].sum(-1) / height)[..., None, None]
    row_root = numbers.row_root(row_var, mean, numbers.eps1)
    return calls.operand(row_root), calls.operand(numbers.root(col_var))


def _direct(stack: Stack, at: int, roots: tuple[Any, Any], grad: Any, numbers: Numbers) -> None:
    """Put the direction of block `at` in its place among the stack's roots."""
    calls, root, block = stack.calls, stack.roots[at], stack.blocks[at]
    of_rows, of_cols = roots
    if of_cols is None:
        calls.clip(of_rows, numbers.least, None, out=root)
    else:
        of_cols = of_cols if len(stack.shape) == 2 else of_cols[:, block]
        calls.multiply(of_rows[:, block], of_cols, out=root)
        calls.clip(root, numbers.least, None, out=root)
    calls.divide(grad, root, out=root)


def _averaged(stack: Stack, key: str, means: Any, new: Any, numbers: Numbers) -> Any:
    """R, C or V after this step, unrounded; in the states rounded to their dtype."""
    calls, stored = stack.calls, stack.stored[key]
    before = stored[0] if len(stored) == 1 else torch.stack(stored)
    before = before.view(means.shape).to(numbers.dtype)
    after = numbers.average(calls.of_tensor(before), calls.small(means), new)
    store(stored, calls.to_tensor(after))
    return after


def _rms(stack: Stack, norms: Sequence[Any], count: float) -> Any:
    """The root of the mean square of each parameter, from the norms of its blocks, in fp64."""
    norm = norms[0]
    if len(norms) > 1:
        norm = torch.linalg.vector_norm(torch.stack(list(norms)), dim=0)
    return stack.calls.small(norm) / count
