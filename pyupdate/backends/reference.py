# SPDX-License-Identifier: Apache-2.0
"""The pure-Python back end: the same rules on torch tensors, on any device, without a compiler.

Slow, and right to the same bits as the compiled ones: it runs the very rule text, with hypers as
0-dim tensors of the compute type, and adds up in the one reduction order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from operator import call
from typing import Any, NamedTuple

import torch

from ..kernels import rounding
from ..kernels.bind import bind
from ..kernels.language import Rule, named_results
from ..kernels.reduction import largest_of_row, sum_of_row
from ..kernels.rules import averaged, clipped, magnitude, nonfinite, squared
from ..options import LastUpdate
from ..pytorch.request import Request, Scaling
from ..pytorch.rows import (
    AVERAGE,
    GroupRule,
    Inputs,
    Row,
    Stale,
    check_all_memory,
    check_row,
    entry_of,
    has_state,
    lacks_average,
    mend_row,
)
from ..pytorch.state import HALVES


def why_not() -> str | None:
    """The reason why this back end cannot run: none, ever."""
    return None


def home(row: Row, rule: Rule, chosen: str) -> tuple[()]:
    """What rows have in common here: it takes all."""
    del row, rule, chosen
    return ()


def part(rows: Sequence[Row], rules: Sequence[GroupRule], home: Any, averages: bool) -> Part:
    """The part of all rows that nobody else steps."""
    del home, averages
    return Part(rows, rules)


def average_moved(average: torch.Tensor, param: torch.Tensor, weight: float) -> torch.Tensor:
    """An average a step on, of a parameter that has moved, as a new tensor.

    Args:
        average: in the compute type.
        param: as it is stored, or that in the compute type.
        weight: of the parameter.
    """
    like = _load(param)
    moved: torch.Tensor = bind(averaged, "torch")(average.detach(), like, _compute(weight, like))
    return moved


class Part:
    """The rows of a plan that are stepped one tensor at a time."""

    nbytes = 0
    reads_scaling = False
    made = None

    def __init__(self, rows: Sequence[Row], rules: Sequence[GroupRule]) -> None:
        self.rows = rows
        self._rules = rules
        # Steps made, for rules whose steps torch does not count: from "the buffer is absent".
        self._counters: dict[int, tuple[object, int]] = {}
        self._lacking: frozenset[int] = frozenset()
        self._made: frozenset[int] = frozenset()
        self._listed: list[list[int]] | None = None
        self._waiting: list[tuple[int, Row]] = []  # rows that this step has not written yet

    def step(self, inputs: Inputs, request: Request, scaling: Scaling) -> LastUpdate | None:
        """Nothing: its steps are made in parts."""
        del inputs, request, scaling
        return None

    def begin(self) -> None:
        """Forget what the last step has done."""
        self._waiting = self._active()

    def check(self, inputs: Inputs) -> list[int]:
        """Refuse what is not right; the rows that have a gradient and no state yet."""
        # Also what is moved from the end of a group to the beginning of the next.
        listed = [list(map(id, group["params"])) for group in inputs.groups]
        if self._listed is None:
            self._listed = listed
        if self._listed != listed:
            message = "the optimizer's parameters"
            raise Stale(message)
        fresh = []
        lacking = []
        for r, row in self._active():
            mend_row(row, self._rules[row.group], inputs)
            check_row(row, self._rules[row.group], inputs)
            keys = self._rules[row.group].keys
            inner = entry_of(row, inputs)
            if keys and not has_state(inner, keys, row.name):
                lacking.append(r)
            if lacking[-1:] == [r] or lacks_average(inner, inputs):
                fresh.append(r)
        self._lacking = frozenset(lacking)
        self._waiting = self._active()
        check_all_memory(self.rows, self._rules, inputs)
        return fresh

    def reduce(self, inputs: Inputs, request: Request) -> tuple[bool, dict[int, float]]:
        """After a `check`: whether an inf or nan was found, and what each row adds to the norm."""
        del inputs
        found = False
        sums = {}
        with torch.no_grad():
            for r, row in self._active():
                grad = _flat(_gradient(row), row.param)
                scaled = _load(grad) * _compute(request.unscale, grad)
                if request.inf_norm:
                    sums[r] = largest_of_row(bind(magnitude, "torch")(scaled))
                else:
                    sums[r] = _sum(bind(squared, "torch")(scaled))
                found = found or bool(bind(nonfinite, "torch")(scaled).any())
        return found, sums

    def apply(self, inputs: Inputs, request: Request, multiplier: float) -> None:
        """After a `check` that found all state: write.

        What takes most memory goes first, and of each row every new value is there before the first
        is written: without enough memory for a step, nothing is written.
        """
        self._waiting.sort(key=lambda one: self._memory(one[1], inputs, request))
        with torch.no_grad():
            while self._waiting:
                new = self._new_values(*self._waiting[-1], inputs, request, multiplier)
                self._write(*self._waiting[-1], inputs, new)
        self._made = frozenset()

    @property
    def wrote(self) -> bool:
        """Whether this step's `apply` has written all of its rows."""
        return not self._waiting

    @property
    def unwritten(self) -> Sequence[Row]:
        """Where a step raised: the rows that are as they were."""
        return [row for _, row in self._waiting]

    def _active(self) -> list[tuple[int, Row]]:
        return [(r, row) for r, row in enumerate(self.rows) if row.param.grad is not None]

    def _memory(self, row: Row, inputs: Inputs, request: Request) -> int:
        """What a row's new values take, about, in bytes."""
        values = 2 + len(self._rules[row.group].rule.state) + inputs.averages
        if request.stochastic and row.param.dtype in HALVES:
            values += 8  # bits and draws are int64
        return row.param.numel() * values * (8 if row.param.dtype is torch.float64 else 4)

    def _new_values(
        self, r: int, row: Row, inputs: Inputs, request: Request, multiplier: float
    ) -> _New:
        """All that a row's step writes; writes nothing."""
        group = self._rules[row.group]
        rule = group.rule
        sign, *numbers = inputs.numbers[row.group]
        state = inputs.state[row.param] if group.keys else {}
        count = self._count(r, group, state)
        like = _load(row.param)
        scalars = {name: float(state[name]) for name in rule.scalars}
        hypers, counted = rule.prepared(count, numbers, scalars)
        scalars |= counted
        known = {name: _compute(hyper, like) for name, hyper in hypers.items()}
        places = {"param": row.param, **{name: state[name] for name in rule.state}}
        known |= {name: _load(place) for name, place in places.items()}
        scaled = _load(_gradient(row)) * _compute(multiplier * sign, like)
        known["grad"] = bind(clipped, "torch")(scaled, _compute(request.clip_value, like))
        per_tensor = {"numel": float(row.param.numel())}
        for turn, stage in enumerate(rule.stages):
            function = bind(stage.function.text, "torch")
            out = function(*(known[name] for name in stage.function.arguments))
            before = dict(known)
            for name, value in named_results(stage.function, out).items():
                if name in stage.sums:
                    per_tensor[name] = _sum(_flat(value.expand(row.param.shape), row.param))
                else:  # a later stage reads what was stored
                    if any(value is before[other] for other in places if other != name):
                        value = value.clone()  # what stands there, before it is written over
                    key = None
                    if request.stochastic and places[name].dtype in HALVES:
                        parameter, role = row.group << 32 | row.position, rule.elements.index(name)
                        key = rounding.key_of(request.seed, count, parameter, turn, role)
                    known[name] = _load(stored_as(value, places[name].dtype, row.param, key))
            if stage.turn is not None:
                given = hypers | scalars | per_tensor
                turned = stage.turn.text(*(given[name] for name in stage.turn.arguments))
                for name, number in named_results(stage.turn, turned).items():
                    (scalars if name in scalars else per_tensor)[name] = number
            known |= {name: _compute(per_tensor[name], like) for name in stage.leaves}
        tensors = [(place, known[name]) for name, place in places.items()]
        if inputs.averages:
            average = inputs.state[row.param][AVERAGE]
            tensors.append((average, average_moved(average, known["param"], request.ema_weight)))
        return _New(tensors, [(state[name], number) for name, number in scalars.items()], count)

    def _write(self, r: int, row: Row, inputs: Inputs, new: _New) -> None:
        """Write the last of the rows that wait."""
        group = self._rules[row.group]
        state = inputs.state[row.param] if group.keys else {}
        tensors = [*new.tensors, *((place, _wide(number)) for place, number in new.scalars)]
        if group.counts_steps:
            tensors.append((state["step"], _wide(new.made)))
        places, values = map(list, zip(*tensors, strict=True))
        written: list[Callable[[], object]] = [
            partial(torch._foreach_copy_, places, values),
            self._waiting.pop,
        ]
        if not group.counts_steps:
            buffer = state.get(next(iter(group.rule.state), ""), row.param)
            written.append(partial(self._counters.__setitem__, r, (buffer, new.made)))
        # Python looks for an interrupt between calls that it makes itself, which these are not: it
        # comes before all of them or behind.
        deque(map(call, written), maxlen=0)

    def _count(self, r: int, group: GroupRule, state: dict[str, torch.Tensor]) -> int:
        """The step that is being made."""
        if group.counts_steps:
            return int(state["step"]) + 1
        buffer = state.get(next(iter(group.rule.state), ""))
        known, count = self._counters.get(r, (None, 0))
        if buffer is not None and known is not buffer:
            return 1 if r in self._made else 2
        return count + 1

    def state_was_made(self) -> None:
        """Tell it that what the last check found absent was made: a first step is known as such."""
        self._made = self._lacking


class _New(NamedTuple):
    """What the step of a row writes: values beside their places, and the number of the step."""

    tensors: list[tuple[torch.Tensor, torch.Tensor]]
    scalars: list[tuple[torch.Tensor, float]]
    made: int


def _gradient(row: Row) -> torch.Tensor:
    assert row.param.grad is not None
    return row.param.grad.detach()


def _load(stored: torch.Tensor) -> torch.Tensor:
    """The compute-type values of what is stored."""
    stored = stored.detach()
    return stored if stored.dtype is torch.float64 else stored.float()


def _compute(value: float, like: torch.Tensor) -> torch.Tensor:
    """A number as a 0-dim tensor of the compute type, rounded once."""
    dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
    return _wide(value).to(dtype).to(like.device)


def _wide(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def stored_as(
    value: torch.Tensor, dtype: torch.dtype, param: torch.Tensor, key: int | None
) -> torch.Tensor:
    """Rounded to a dtype: to nearest even, or by chance with a key."""
    if key is None:
        return value.to(dtype)
    order = _order(param)
    elements = torch.arange(param.numel(), device=param.device)
    elements = elements.reshape([param.shape[d] for d in order])
    drawn = rounding.draws(key, elements.permute([order.index(d) for d in range(param.dim())]))
    bits = value.expand(param.shape).contiguous().view(torch.int32).long() & 0xFFFF_FFFF
    convert = rounding.to_bf16 if dtype is torch.bfloat16 else rounding.to_fp16
    patterns: torch.Tensor = convert(bits, drawn)
    return ((patterns ^ 0x8000) - 0x8000).to(torch.int16).view(dtype)


def _flat(values: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """The values in the order of the parameter's memory."""
    return values.permute(_order(param)).reshape(-1)


def _order(param: torch.Tensor) -> list[int]:
    """The dimensions of a parameter from the slowest in memory to the fastest."""
    if param.is_contiguous():
        return list(range(param.dim()))
    strides = param.stride()
    return sorted(range(param.dim()), key=lambda d: -strides[d] if param.shape[d] != 1 else 0)


def _sum(values: torch.Tensor) -> float:
    flat = values.reshape(-1)
    zeros: Callable[[int], torch.Tensor] = flat.new_zeros
    return sum_of_row(flat, zeros, torch.Tensor.double)
