# SPDX-License-Identifier: Apache-2.0
"""Adafactor's sweeps over memory: operations in place, over memory that is kept.

For gradient g and parameter p, with the texts of `kernels/composite.py` for the averages, the roots
of rows and columns and the size:

    1. R, C: averages of the means of g^2 over rows and over columns; V: of g^2; norm of p
    2. s = max(root of row x root of column, eps1), or max(sqrt(V), eps1)    u = g / s; norm of u
    3. p <- p decay - u size

So a step takes each gradient and parameter once and stores the parameter once, however many there
are. Where a parameter is more than one block, u is made twice: the gradient is taken three times,
the parameter twice. Every elementwise operation is rounded once; sums are outside of the numeric
contract: torch and numpy add up in their own order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import cpu as cpu_backend
from ..kernels import composite, rules
from ..kernels.bind import bind
from ..pytorch import state as states
from ..pytorch.rows import Group, numbers_of
from .adafactor_packs import Pack
from .adafactor_stacks import Stack, calls_on


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
        self.eps1 = self._small([self.least], self.dtype)
        self._eps2 = self._small([float(eps2)], torch.float64)
        self._threshold = self._small([float(group["d"])], torch.float64)
        self.multiplier: float | None = None
        if multiplier * sign != 1.0:  # rounded here, or a product would be of two precisions
            self.multiplier = float(torch.tensor(multiplier * sign, dtype=self.dtype, device="cpu"))
        self.clip_value = clip_value
        self._prepared: dict[tuple[float, ...], tuple[Any, Any, Any]] = {}

    def _small(self, values: Sequence[float], dtype: torch.dtype) -> Any:
        return self._calls.of_numbers(values, dtype, self._device)

    def schedules(self, steps: Sequence[Tensor]) -> tuple[Any, Any, Any]:
        """Decay (None: 1), rho and 1 - b2 of each parameter, or one of all with equal steps."""
        counts = tuple(torch.stack(list(steps)).flatten().tolist())
        if len(set(counts)) == 1:
            counts = counts[:1]
        if counts not in self._prepared:
            of = {n: cpu_backend.prepared(rules.adafactor, int(n), self._given) for n in {*counts}}
            decay, rho, one_minus_beta2 = (
                [of[count][name] for count in counts]
                for name in ("decay", "rho", "one_minus_beta2")
            )
            self._prepared[counts] = (
                None if all(one == 1.0 for one in decay) else self._small(decay, self.dtype),
                self._small(rho, torch.float64),
                self._small(one_minus_beta2, self.dtype),
            )
        return self._prepared[counts]

    def size(self, param_rms: Any, direction_rms: Any, rho: Any) -> Any:
        """What each direction is multiplied by, in fp64."""
        return self._size(param_rms, direction_rms, rho, self._eps2, self._threshold)


def step(swept: Stack | Pack, numbers: Numbers) -> None:
    """One step of a stack or a pack, in operations whose number is not that of its parameters."""
    calls = swept.calls
    decay, rho, one_minus_beta2 = numbers.schedules(swept.steps)
    blocks = range(len(swept.roots))
    again = len(blocks) > 1  # one block still stands in the scratch
    factors = numbers.multiplier, numbers.clip_value
    norms: list[Any] = []
    for at in blocks:
        param = swept.param(at)
        norms.append(swept.norm_of_param(at))
        grad = swept.grad(at, *factors)
        squares = calls.multiply(grad, grad, out=swept.roots[at])
        swept.add_up(at, squares)
    roots = _roots(swept, numbers, one_minus_beta2)

    direction_norms: list[Any] = []
    for at in blocks:
        _direct(swept, at, roots, swept.grad(at, *factors) if again else grad, numbers)
        direction_norms.append(swept.norm_of_root(at))
    param_rms, direction_rms = (_rms(swept, of) for of in (norms, direction_norms))
    size = calls.operand(numbers.size(param_rms, direction_rms, rho))
    size = swept.of_elements(calls.rounded(size, numbers.dtype))

    for at in blocks:
        direction = swept.roots[at]
        if again:
            _direct(swept, at, roots, swept.grad(at, *factors), numbers)
            param = swept.param(at)
        if decay is not None:
            calls.multiply(param, swept.of_elements(calls.operand(decay)), out=param)
        calls.multiply(direction, size, out=direction)
        calls.subtract(param, direction, out=param)
        swept.store(at)


def _roots(swept: Stack | Pack, numbers: Numbers, one_minus_beta2: Any) -> tuple[Any, Any]:
    """Move the averages; the roots of rows (None without), and of all else."""
    calls = swept.calls
    new = swept.of_averages(one_minus_beta2)
    before_and_means = swept.averages()
    after = [numbers.average(before, means, new) for before, means in before_and_means]
    swept.keep_averages(after)
    rows, others = swept.rows_and_others(after)
    root = calls.operand(numbers.root(others))
    if rows is None:
        return None, root
    return calls.operand(numbers.row_root(rows, swept.mean_of_rows(rows), numbers.eps1)), root


def _direct(
    swept: Stack | Pack, at: int, roots: tuple[Any, Any], grad: Any, numbers: Numbers
) -> None:
    """Put the direction of block `at` in its place among the roots."""
    root = swept.roots[at]
    swept.calls.clip(swept.spread(at, *roots), numbers.least, None, out=root)
    swept.calls.divide(grad, root, out=root)


def _rms(swept: Stack | Pack, norms: Sequence[Any]) -> Any:
    """The root of the mean square of each parameter, from the norms of its blocks, in fp64."""
    norm = norms[0]
    if len(norms) > 1:
        norm = torch.linalg.vector_norm(torch.stack(list(norms)), dim=0)
    return swept.calls.small(norm) / swept.root_of_count
