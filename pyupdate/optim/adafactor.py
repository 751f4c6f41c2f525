# SPDX-License-Identifier: Apache-2.0
"""Adafactor: a second moment kept as the means of its rows and of its columns.

Shazeer and Stern 2018, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost",
arXiv:1804.04235, in the variant that torch has.

A composite. A planned pass unscales, checks, clips, skips and counts as everywhere; then parameters
of one shape are stacked, and torch's batched means go between the elementwise texts of
`kernels/composite.py`. Means are outside of the numeric contract: torch adds up in its own order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import composite, rules
from ..kernels.bind import bind
from ..kernels.language import Rule
from ..options import LastUpdate
from ..pytorch import checks
from ..pytorch import state as states
from ..pytorch import step as engine
from ..pytorch.rows import Group, Row, has_state, numbers_of, require
from .planned import Planned, planned

# Elements of a stack: 4 MiB of float32, and some five times that for what is made of it.
_STACK = 2**20


def _adafactor(_: Group) -> Rule:
    return rules.adafactor


def _state_shapes(param: Tensor) -> dict[str, tuple[int, ...]]:
    """The keys of a parameter's state in torch's order, with their shapes."""
    shape = tuple(param.shape)
    if len(shape) < 2:
        return {"variance": shape}
    return {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}


def _check(optimizer: Any, rows: Sequence[Row]) -> None:
    """Refuse groups and state that do not fit, before anything is done."""
    for index, group in enumerate(optimizer.param_groups):
        require(group, index, ("eps", "d"))
    touched: list[checks.Memory] = []
    for row in rows:
        inner = optimizer.state.get(row.param)
        shapes = _state_shapes(row.param)
        if row.param.grad is None:
            continue
        checks.check_gradient(row.param, row.param.grad, row.name)
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
    _check_memory(engine.engine_of(optimizer), touched)


def _check_memory(kept: engine.Engine, touched: Sequence[checks.Memory]) -> None:
    """Refuse memory that is shared; asked again only where a tensor lies elsewhere than before."""
    places = [(t.data_ptr(), t.shape, t.stride(), t.dtype) for _, t, _ in touched]
    if kept.vouched != places:
        kept.vouched = None
        checks.check_memory(touched)
        kept.vouched = places


@torch.no_grad()
def _finish(optimizer: Any, rows: Sequence[Row], last: LastUpdate) -> None:
    """Move what has a gradient, stack by stack."""
    options = engine.options_of(optimizer)
    stacks: dict[Any, list[Tensor]] = {}
    for row in rows:
        param = row.param
        if param.grad is None:
            continue
        inner = optimizer.state[param]
        dtype = states.dtype_for(param, options.state_dtype)
        for key, shape in _state_shapes(param).items():
            if inner.get(key) is None:
                inner[key] = param.detach().new_zeros(shape, dtype=dtype)
        if param.numel() != 0:
            alike = (row.group, param.shape, param.dtype, param.device, inner["step"].shape)
            stacks.setdefault(alike, []).append(param)
    for (index, shape, *_), params in stacks.items():
        group = optimizer.param_groups[index]
        most = max(1, _STACK // math.prod(shape))
        for start in range(0, len(params), most):
            some = params[start : start + most]
            _step(some, optimizer.state, group, last.multiplier, options.clip_value)


def _step(
    params: Sequence[Tensor],
    state: Any,
    group: Group,
    multiplier: float,
    clip_value: float | None,
) -> None:
    """One step of parameters of one shape, in operations whose number is not theirs."""
    inner = [state[param] for param in params]
    param = _stacked(params)
    sign, *numbers = numbers_of(rules.adafactor, group)
    decay, rho, one_minus_beta2 = _schedules([one["step"] for one in inner], numbers, param)
    eps1, eps2 = group["eps"]
    eps1 = _number(torch.finfo(params[0].dtype).eps if eps1 is None else eps1, param)
    grad = _stacked([one.grad for one in params if one.grad is not None])
    if multiplier * sign != 1.0:
        grad = grad * _number(multiplier * sign, param)
    if clip_value is not None:
        grad = bind(rules.clipped, "torch")(grad, _number(clip_value, param))

    average = bind(composite.adafactor_average, "torch")
    of_second = bind(composite.adafactor_root, "torch")

    def averaged(key: str, squares: Tensor) -> Tensor:
        stored = [one[key] for one in inner]
        new: Tensor = average(_stacked(stored), squares, one_minus_beta2)
        torch._foreach_copy_(stored, new.unbind())
        return new

    if params[0].dim() < 2:
        root = of_second(averaged("variance", grad * grad))
    else:
        row_var = averaged("row_var", _mean_square(grad, -1))
        col_var = averaged("col_var", _mean_square(grad, -2))
        mean = row_var.mean(dim=-2, keepdim=True)
        root = bind(composite.adafactor_row_root, "torch")(row_var, mean, eps1) * of_second(col_var)
    direction = bind(composite.adafactor_direction, "torch")(grad, root, eps1)
    size = bind(composite.adafactor_size, "torch")(
        _rms(param), _rms(direction), rho, _wide(eps2, param), _wide(group["d"], param)
    )
    moved = bind(composite.adafactor_move, "torch")(
        param, direction, decay, size.to(param.dtype).reshape(decay.shape)
    )
    torch._foreach_copy_([one.detach() for one in params], moved.unbind())


def _schedules(
    steps: Sequence[Tensor], numbers: Sequence[float], like: Tensor
) -> tuple[Tensor, ...]:
    """Decay, rho and 1 - b2 of every parameter of a stack; equal steps are prepared once."""
    counts = torch.stack(list(steps)).flatten().tolist()
    known = {count: rules.adafactor.prepared(int(count), numbers, {})[0] for count in set(counts)}
    of = {
        name: torch.tensor([known[count][name] for count in counts], dtype=torch.float64)
        for name in rules.adafactor.hypers
    }
    each = (-1, *[1] * (like.dim() - 1))
    decay, one_minus_beta2 = (
        of[name].to(like).reshape(each) for name in ("decay", "one_minus_beta2")
    )
    return decay, of["rho"].to(like.device), one_minus_beta2


def _mean_square(grad: Tensor, dim: int) -> Tensor:
    """The mean of the squares along a dimension, without all squares in memory at once."""
    squares = torch.linalg.vector_norm(grad, dim=dim, keepdim=True).square()
    mean: Tensor = squares / _number(grad.shape[dim], grad)
    return mean


def _rms(values: Tensor) -> Tensor:
    """The root of the mean square of each tensor of a stack, in fp64."""
    norm = torch.linalg.vector_norm(values.flatten(1), dim=1) if values.dim() > 1 else values.abs()
    return norm.double() / math.sqrt(values[0].numel())


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape, stacked in the compute type."""
    one = len(tensors) == 1
    stacked = tensors[0].detach()[None] if one else torch.stack([t.detach() for t in tensors])
    return stacked.to(torch.float64 if stacked.dtype is torch.float64 else torch.float32)


def _number(value: float, like: Tensor) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float64).to(like)


def _wide(value: float, like: Tensor) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float64, device=like.device)


# Torch's loop takes a third of the time on large matrices (12 of 1024 x 1024: 50 ms and 150).
@planned(
    _adafactor,
    counts_steps=True,
    check=_check,
    finish=_finish,
    lacks=("ema_decay", "stochastic_rounding"),
    unasked=False,
)
class Adafactor(Planned, torch.optim.Adafactor):
    """``torch.optim.Adafactor`` (Shazeer and Stern 2018, arXiv:1804.04235).

    Of a parameter of two and more dimensions the state is a number a row and one a column, so it
    takes next to no memory. Parameters of one shape are stepped together, in stacks of up to 2^20
    elements; a step reads and writes each parameter a constant number of times, and takes the sums
    of its rows and columns.

    ``ema_decay`` and ``stochastic_rounding`` cannot be had. A failure for want of memory may leave
    a step counted, or an average moved, whose move was not made. ``eps=(None, ...)`` means the
    precision of each parameter's own dtype; torch takes that of the first in a group. A parameter
    without elements, over which torch divides by zero, is left alone.

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
