# SPDX-License-Identifier: Apache-2.0
"""Adafactor: a second moment kept as the means of its rows and of its columns.

Shazeer and Stern 2018, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost",
arXiv:1804.04235, in the variant that torch has.

A composite. A planned pass unscales, checks, clips, skips and counts as everywhere; the sweeps of
`adafactor_passes.py` follow, pack by pack of small parameters and stack by stack of others of one
shape. Here stands what is refused, and what is known from step to step.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels import rules
from ..kernels.language import Rule
from ..options import LastUpdate
from ..pytorch import checks, engines, sharded
from ..pytorch import state as states
from ..pytorch.rows import NO_NUMBER, Group, Row, has_state, mend_gradient, number_of, require
from . import adafactor_packs, adafactor_passes, adafactor_stacks
from .adafactor_packs import Pack
from .adafactor_passes import Numbers
from .adafactor_stacks import Scratch, Stack
from .planned import Planned, planned


def _adafactor(_: Group) -> Rule:
    return rules.adafactor


def _state_shapes(param: Tensor) -> dict[str, tuple[int, ...]]:
    """The keys of a parameter's state in torch's order, with their shapes."""
    shape = tuple(param.shape)
    if len(shape) < 2:
        return {"variance": shape}
    return {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}


class _Found:
    """Which tensors a step touches, and how and where they lie.

    A list a property, of what Python need not collect: a tuple a tensor would take it 30 ms of
    garbage collection a step of 1,000 vectors, all of this takes 2.
    """

    def __init__(self, state: Any, rows: Sequence[Row]) -> None:
        with_grads = [row for row in rows if row.param.grad is not None]
        params = [row.param for row in with_grads]
        inner = [state.get(param) for param in params]
        self.is_complete = all(inner)
        states: list[Any] = [value for one in inner if one for value in one.values()]
        grads: list[Any] = [param.grad for param in params]
        self.touched: list[Any] = [*grads, *params, *states]
        kinds = {*map(type, self.touched)}
        self.is_plain = self.is_complete and kinds <= {Tensor, torch.nn.Parameter}
        if not self.is_plain or {*map(_LAYOUT, self.touched)} != {torch.strided}:
            self.is_plain = False
            return
        self.facts: list[Any] = [
            torch.is_inference_mode_enabled(),
            *[row.group for row in with_grads],
            *[key for one in inner for key in one],
            *map(id, params),
            *map(id, inner),
            *map(id, states),
            *map(_DTYPE, self.touched),
            *map(Tensor.data_ptr, params),
            *map(Tensor.data_ptr, states),
        ]
        self.grads = [*map(Tensor.data_ptr, grads)]


class _Known:
    """What a step found good, what it is swept as, and memory that the sweeps share."""

    def __init__(self, scratches: dict[Any, Scratch]) -> None:
        self.found: _Found | None = None
        self.swept: list[Stack | Pack] = []
        self.scratches = scratches

    def remember(self, found: _Found, state: Any, rows: Sequence[Row]) -> None:
        """Keep what was checked."""
        self.found = found
        self._sizes = [*map(Tensor.size, found.touched)]
        self._strides = [*map(Tensor.stride, found.touched)]
        extents = np.array([_extent(one) for one in found.touched], dtype=np.int64)
        extents = extents.reshape(-1, 2)  # of none
        count = len(found.grads)
        self._grads, states = extents[:count], extents[2 * count :]
        self._states = states[states[:, 0].argsort()]
        self.swept = _swept(state, rows, self.scratches)
        found.touched = []

    def holds_for(self, found: _Found) -> bool:
        """Whether nothing has to be looked at again: at most gradients lie elsewhere, apart."""
        return (
            self.found is not None
            and found.is_plain
            and found.facts == self.found.facts
            and all(map(operator.eq, map(Tensor.size, found.touched), self._sizes))
            and all(map(operator.eq, map(Tensor.stride, found.touched), self._strides))
            and (found.grads == self.found.grads or self._are_apart(found.grads))
        )

    def _are_apart(self, grads: Sequence[int]) -> bool:
        """Whether gradients that begin here meet no state; the plan looks at the rest."""
        starts = np.array(grads, dtype=np.int64)
        ends = starts + (self._grads[:, 1] - self._grads[:, 0])
        ends_of_states = np.maximum.accumulate(self._states[:, 1])
        before = np.searchsorted(self._states[:, 0], ends)  # states that begin before each end
        last_end = np.where(before > 0, ends_of_states[before - 1], 0)
        return bool((last_end <= starts).all())


_LAYOUT = operator.attrgetter("layout")
_DTYPE = operator.attrgetter("dtype")


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses that a tensor's elements lie between."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size() if tensor.numel() else start


def _check(optimizer: Any, rows: Sequence[Row]) -> None:
    """Refuse groups and state that do not fit, before anything is done."""
    for index, group in enumerate(optimizer.param_groups):
        _check_numbers(group, index)
    for row in rows:
        if row.param in optimizer.state:
            checks.check_entry(optimizer.state[row.param], row.name)
    kept = engines.engine_of(optimizer)
    known = kept.known
    found = _Found(optimizer.state, rows)
    if known is not None and known.holds_for(found):
        return
    kept.known = _Known({} if known is None else known.scratches)
    _check_anew(optimizer, rows)
    if found.is_plain:
        kept.known.remember(found, optimizer.state, rows)


def _check_numbers(group: Group, index: int) -> None:
    """Refuse what the sweeps cannot read of a group; the rule's own numbers are read before."""
    require(group, index, ("eps", "d"))
    try:
        eps1, eps2 = group["eps"]
        for number in (0.0 if eps1 is None else eps1, eps2, group["d"]):
            number_of(number)
    except NO_NUMBER as error:
        message = (
            f"'eps' and 'd' of parameter group {index} are {group['eps']!r} and {group['d']!r}, "
            "but must be two numbers, of which the first may be None, and one: set them to what "
            "the optimizer's constructor takes"
        )
        raise ValueError(message) from error


def _check_anew(optimizer: Any, rows: Sequence[Row]) -> None:
    touched: list[checks.Memory] = []
    for row in rows:
        inner = optimizer.state.get(row.param)
        shapes = _state_shapes(row.param)
        if row.param.grad is None:
            continue
        mend_gradient(row)
        checks.check_gradient(row.param, row.param.grad, row.name)
        if sharded.is_shard(row.param):
            sharded.refuse_rule(row.name, "Adafactor")
        grad = f"the gradient of '{row.name}'"
        touched.append(checks.Memory(f"parameter '{row.name}'", row.param, written=True))
        touched.append(checks.Memory(grad, row.param.grad, written=False))
        if not has_state(inner, ("step", *shapes), row.name):
            continue
        for key, shape in shapes.items():
            checks.check_state(row.param.detach().new_empty(shape), inner[key], key, row.name)
        checks.check_one_dtype({key: inner[key] for key in shapes}, row.name)
        touched += [
            checks.Memory(f"state '{key}' of '{row.name}'", inner[key], written=True)
            for key in ("step", *shapes)
        ]
    checks.check_memory(touched)


@torch.no_grad()
def _finish(optimizer: Any, rows: Sequence[Row], last: LastUpdate) -> None:
    """Move what has a gradient, pack by pack and stack by stack."""
    options = engines.options_of(optimizer)
    known: _Known = engines.engine_of(optimizer).known
    every = known.swept
    if known.found is None:
        for row in rows:
            if row.param.grad is not None:
                _make_state(row.param, optimizer.state[row.param], options.state_dtype)
        every = _swept(optimizer.state, rows, known.scratches)
    read: dict[Any, Numbers] = {}
    with np.errstate(all="ignore"):  # as torch, and inf and nan are no news here
        for swept in every:
            like = swept.like
            numbers = read.get((swept.group, like.dtype, like.device))
            if numbers is None:
                group = optimizer.param_groups[swept.group]
                numbers = Numbers(group, like, last.multiplier, options.clip_value)
                read[swept.group, like.dtype, like.device] = numbers
            adafactor_passes.step(swept, numbers)


def _make_state(param: Tensor, inner: dict[str, Any], wanted: torch.dtype | None) -> None:
    dtype = states.dtype_for(param, wanted)
    for key, shape in _state_shapes(param).items():
        if inner.get(key) is None:
            inner[key] = param.detach().new_zeros(shape, dtype=dtype)


def _swept(state: Any, rows: Sequence[Row], scratches: dict[Any, Scratch]) -> list[Stack | Pack]:
    """What has a gradient and elements: the small packed, the rest stacked, the large alone.

    The scratches are made anew where they are not of the size that is needed.
    """
    alike: dict[Any, list[Tensor]] = {}
    together: list[tuple[Any, list[Tensor]]] = []
    for row in rows:
        param = row.param
        if param.grad is None or param.numel() == 0:
            continue
        step = state[param]["step"]
        key = (row.group, param.dtype, param.device, step.shape, step.device, param.shape)
        params = alike.get(key)
        if params is None or (len(params) + 1) * param.numel() > adafactor_stacks.BLOCK:
            params = alike[key] = []
            together.append((key[:-1], params))
        params.append(param)
    packed, stacked = adafactor_packs.parted(together)
    inference = torch.is_inference_mode_enabled()  # what is made in it cannot be written outside
    sizes: dict[Any, int] = {}
    made: list[tuple[Any, Any, int, list[Tensor]]] = []
    for make, count, several in (
        (Pack, adafactor_packs.elements, packed),
        (Stack, adafactor_stacks.elements, stacked),
    ):
        for group, params in several:
            kind = states.compute_type(params[0]), params[0].device, inference
            sizes[kind] = max(sizes.get(kind, 0), count(params))
            made.append((make, kind, group, params))
    fitting = {kind: one for kind, one in scratches.items() if one.count == sizes.get(kind)}
    scratches.clear()
    for kind, size in sizes.items():
        scratches[kind] = fitting.get(kind) or Scratch(kind[0], kind[1], size)
    return [
        make(group, params, [state[param] for param in params], scratches[kind])
        for make, kind, group, params in made
    ]


@planned(
    _adafactor,
    counts_steps=True,
    check=_check,
    finish=_finish,
    lacks=("stochastic_rounding",),
)
class Adafactor(Planned, torch.optim.Adafactor):
    """``torch.optim.Adafactor`` (Shazeer and Stern 2018, arXiv:1804.04235).

    Of a parameter of two and more dimensions the state is a number a row and one a column, so it
    takes next to no memory. Small parameters are stepped together, on a CPU whatever their shapes,
    large ones where they lie, in blocks of 2^20 elements. A step takes each gradient and parameter
    once (of several blocks three times and twice) and stores the parameter once, whatever their
    number, and takes the sums of its rows and columns. Three such blocks are kept between steps,
    and of what is small as much as it has of state.

    An average (``ema_decay``) is moved behind that, a parameter at a time. ``stochastic_rounding``
    cannot be had. A failure for want of memory may leave a step counted, or a second moment moved,
    whose move was not made. ``eps=(None, ...)`` means the precision of each parameter's own dtype;
    torch takes that of the first in a group. A parameter without elements, over which torch divides
    by zero, is left alone.

    Args:
        *args, **kwargs: those of ``torch.optim.Adafactor``, and `Options` by name.

    Example:
        >>> import torch, pyupdate
        >>> p = torch.nn.Parameter(torch.ones(2, 2))
        >>> optimizer = pyupdate.optim.Adafactor([p], lr=0.5)
        >>> p.grad = torch.full((2, 2), 3.0)
        >>> optimizer.step()
        >>> p.tolist()
        [[0.5, 0.5], [0.5, 0.5]]
        >>> [(key, list(value.shape)) for key, value in optimizer.state[p].items()]
        [('step', []), ('row_var', [2, 1]), ('col_var', [1, 2])]
    """
