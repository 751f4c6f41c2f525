# SPDX-License-Identifier: Apache-2.0
"""The rows of a plan: which parameters an optimizer steps by which rule, on which back end."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..kernels.language import Rule
from ..options import LastUpdate
from . import checks
from . import state as states

Group = dict[str, Any]
State = Mapping[torch.Tensor, dict[str, Any]]


AVERAGE = "ema"
"""The state key of a parameter's average."""


class Stale(Exception):
    """What a plan was made of has changed: make a new one."""


@dataclass(frozen=True)
class OptimizerRow:
    """How one torch optimizer class maps to rules.

    Attributes:
        rule: picks the rule of a group by its flags.
        counts_steps: whether torch keeps ``state[p]["step"]`` for it.
        finish: of an optimizer that no rule can say whole, what follows the rule's passes where
            they were not skipped: it gets the optimizer, the plan's rows and what the step did.
        check: what it refuses of the optimizer and the plan's rows before anything is done, beside
            what every step refuses.
        lacks: the options that it cannot be had with.
    """

    rule: Callable[[Group], Rule]
    counts_steps: bool
    finish: Callable[[Any, Sequence[Row], LastUpdate], None] | None = None
    check: Callable[[Any, Sequence[Row]], None] | None = None
    lacks: tuple[str, ...] = ()


@dataclass(frozen=True)
class GroupRule:
    """What a plan has of one optimizer group."""

    rule: Rule
    counts_steps: bool

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The state keys in torch's order of making them."""
        return (*(("step",) if self.counts_steps else ()), *self.rule.scalars, *self.rule.state)


@dataclass(frozen=True, slots=True)
class Row:
    """One parameter of a plan."""

    param: torch.Tensor
    group: int
    position: int
    name: str


@dataclass
class Inputs:
    """What a step reads of the optimizer, anew every time."""

    groups: list[Group]
    state: State
    given: Sequence[Sequence[float | torch.Tensor]]
    """A group each: the sign of the gradient, then what the rule's prepare takes."""
    state_dtype: torch.dtype | None = None
    """The option of that name."""
    averages: bool = False
    """Whether each parameter has an average of itself beside its state: the option `ema_decay`."""

    @cached_property
    def numbers(self) -> list[list[float]]:
        """What is given, as numbers; waits for a device that holds one of them."""
        return [list(map(float, group)) for group in self.given]


def rule_of(row: OptimizerRow, group: Group, index: int, optimizer: str) -> Rule:
    """The rule of the group of this index; `optimizer` is the name of its class.

    Raises:
        ValueError: what decides it is missing, or no number; or the class's own reason.
        RuntimeError: the class's own.
    """
    try:
        return row.rule(group)
    except KeyError as error:
        what = f"{error} of parameter group {index} is missing"
        cause: Exception = error
    except TypeError as error:
        what = f"parameter group {index} holds what is no number ({error})"
        cause = error
    message = (
        f"{what}, so {optimizer} knows no rule for it: set it to what the optimizer's constructor "
        "takes"
    )
    raise ValueError(message) from cause


def numbers_of(rule: Rule, group: Group, index: int = 0) -> list[float]:
    """The sign of the gradient and the rule's numbers, read from the group of this index.

    Raises:
        ValueError: one is not there, or no number.
    """
    return list(map(float, given_by(rule, group, index)))


NO_NUMBER = (TypeError, ValueError, RuntimeError, OverflowError)
"""What `number_of` raises, and Python and torch where a number is asked for."""


def number_of(value: Any) -> float:
    """A number as Python's. Text is none, whatever it says: no optimizer of torch's takes it.

    Raises:
        One of `NO_NUMBER`.
    """
    if isinstance(value, str | bytes | bytearray):
        message = f"{value!r} is text"
        raise TypeError(message)
    return float(value)


def given_by(rule: Rule, group: Group, index: int = 0) -> list[float | torch.Tensor]:
    """What `numbers_of` reads, with a tensor of one float32 or float64 left as it is.

    A number that the group lacks is an element of a tuple: ``beta1`` is ``betas[0]``.

    Raises:
        ValueError: it is not there, or no number.
    """
    sign = -1.0 if group.get("maximize", False) else 1.0
    numbers: list[float | torch.Tensor] = [sign]
    for name in rule.numbers:
        try:
            found = group[name] if name in group else group[f"{name[:-1]}s"][int(name[-1]) - 1]
            is_ready = type(found) is float or _is_number_of_a_tensor(found)
            numbers.append(found if is_ready else number_of(found))
        except (LookupError, *NO_NUMBER) as error:
            key = name if name in group else f"{name[:-1]}s" if name[-1:].isdigit() else name
            found = repr(group[key]) if key in group else "missing"
            message = (
                f"{key!r} of parameter group {index} is {found}, so rule '{rule.name}' has no "
                f"number {name!r}: set it to what the optimizer's constructor takes"
            )
            raise ValueError(message) from error
    return numbers


def require(group: Group, index: int, keys: Sequence[str]) -> None:
    """Refuse a group that lacks what a step reads of it beside a rule's numbers.

    Raises:
        ValueError: names the group and the key.
    """
    for key in keys:
        if key not in group:
            message = (
                f"{key!r} of parameter group {index} is missing: set it to what the optimizer's "
                "constructor takes"
            )
            raise ValueError(message)


def require_read(
    group: Group, index: int, wanted: Mapping[str, tuple[Callable[[Any], object], str]]
) -> None:
    """Refuse a group in which one of these is not there, or is not what is wanted.

    Args:
        group: of the optimizer.
        index: the group's.
        wanted: by its key, what raises one of `NO_NUMBER` for the wrong thing, and the right thing
            in words.

    Raises:
        ValueError: names the group and the key.
    """
    require(group, index, [*wanted])
    for key, (read, what) in wanted.items():
        try:
            read(group[key])
        except NO_NUMBER as error:
            message = (
                f"{key!r} of parameter group {index} is {group[key]!r}, but must be {what}: set "
                "it to what the optimizer's constructor takes"
            )
            raise ValueError(message) from error


def require_numbers(group: Group, index: int, keys: Sequence[str]) -> None:
    """Refuse a group in which one of these is not there or no number; no device is waited for.

    Raises:
        ValueError: names the group and the key.
    """
    require_read(group, index, dict.fromkeys(keys, (_check_number, "a number")))


def _check_number(value: object) -> None:
    if not _is_number_of_a_tensor(value):
        number_of(value)


def _is_number_of_a_tensor(value: object) -> bool:
    if not isinstance(value, torch.Tensor):
        return False
    return value.numel() == 1 and value.dtype in (torch.float32, torch.float64)


def name_of(group: Group, index: int, position: int, names: Mapping[int, str]) -> str:
    """What errors call a parameter: as its model does, as torch was told, or by its place.

    Args:
        group: of the optimizer, which has ``param_names`` if it was given named parameters.
        index: the group's.
        position: of the parameter in it.
        names: the model's, by the parameters' ids.
    """
    known = names.get(id(group["params"][position]))
    if known is not None:
        return known
    told = group.get("param_names")
    if isinstance(told, Sequence) and len(told) == len(group["params"]):
        return str(told[position])
    return f"group {index}, parameter {position}"


def rows_of(
    groups: Sequence[Group], only: Collection[int] | None, names: Mapping[int, str]
) -> tuple[list[Row], list[torch.Tensor]]:
    """Every parameter of the groups, or those whose id is in `only`, checked.

    Returns:
        Their rows, and what no back end can step and has no gradient: torch leaves that alone, and
        it must be looked at again when it has one.

    Raises:
        TypeError, ValueError: a parameter that has a gradient and that no back end can step.
    """
    rows = []
    left_out = []
    seen: set[int] = set()
    for g, group in enumerate(groups):
        for position, param in enumerate(group["params"]):
            if only is not None and id(param) not in only:
                continue
            name = name_of(group, g, position, names)
            if id(param) in seen:
                message = f"parameter '{name}' stands in the optimizer twice: leave one out"
                raise ValueError(message)
            seen.add(id(param))
            try:
                checks.check_parameter(param, name)
            except TypeError:
                if not isinstance(param, torch.Tensor) or param.grad is not None:
                    raise
                left_out.append(param)  # frozen int8, or a lazy module's before its first forward
            else:
                rows.append(Row(param, g, position, name))
    return rows, left_out


def has_state(inner: Mapping[str, Any] | None, keys: Sequence[str], name: str) -> bool:
    """Whether a parameter has its state.

    Raises:
        ValueError: it has some of it.
    """
    missing = [key for key in keys if inner is None or inner.get(key) is None]
    if missing and len(missing) != len(keys):
        message = (
            f"state of '{name}' lacks {missing}: it was made by an optimizer with other options "
            "(amsgrad, momentum); load a state dict that fits, or delete the parameter's state"
        )
        raise ValueError(message)
    return not missing


def lacks_average(inner: Mapping[str, Any] | None, inputs: Inputs) -> bool:
    """Whether a parameter's average must be made."""
    return inputs.averages and (inner is None or inner.get(AVERAGE) is None)


def entry_of(row: Row, inputs: Inputs) -> dict[str, Any] | None:
    """The state of a parameter, None where it has none.

    Raises:
        TypeError: it is no dict.
    """
    inner = inputs.state.get(row.param)
    if inner is not None:
        checks.check_entry(inner, row.name)
    return inner


def check_row(row: Row, rule: GroupRule, inputs: Inputs) -> None:
    """Refuse a row whose parameter, gradient or state is not right, with the reason."""
    checks.check_parameter(row.param, row.name)
    if row.param.grad is not None:
        checks.check_gradient(row.param, row.param.grad, row.name)
    inner = entry_of(row, inputs)
    if inner is not None and inputs.averages and not lacks_average(inner, inputs):
        checks.check_average(row.param, inner[AVERAGE], AVERAGE, row.name)
    if not rule.keys or not has_state(inner, rule.keys, row.name):
        return
    assert inner is not None
    for key in rule.rule.state:
        checks.check_state(row.param, inner[key], key, row.name)
    checks.check_one_dtype({key: inner[key] for key in rule.rule.state}, row.name)
    for key in rule.rule.scalars:
        checks.check_scalar(inner[key], key, row.name)
    if rule.counts_steps:
        checks.check_step(inner["step"], row.name)


def mend_row(row: Row, rule: GroupRule, inputs: Inputs) -> bool:
    """Put into plain memory what only looks unusual; whether anything changed.

    Beside the gradient: a step count that is a Python number (old checkpoints) becomes torch's
    tensor, and a scalar that torch's ``load_state_dict`` has cast to a half parameter's type
    becomes wide again. No value changes.
    """
    mended = mend_gradient(row)
    inner = entry_of(row, inputs)
    if inner and isinstance(inner.get("step"), int | float):
        dtype = states.scalar_type()
        inner["step"] = torch.full((), inner["step"], dtype=dtype, device=row.param.device)
        mended = True
    for key in rule.rule.scalars:
        value = inner.get(key) if inner else None
        if isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16):
            assert inner is not None
            inner[key] = value.float()
            mended = True
    return mended


def mend_gradient(row: Row) -> bool:
    """Make its values of a lazily negated or lazily zero gradient; whether it was one."""
    grad = row.param.grad
    if grad is None or grad.layout is not torch.strided:
        return False
    if grad.is_neg():
        row.param.grad = grad.resolve_neg()
    elif grad._is_zerotensor():
        row.param.grad = torch.zeros(grad.shape, dtype=grad.dtype, device=grad.device)
    else:
        return False
    return True


def check_all_memory(rows: Sequence[Row], rules: Sequence[GroupRule], inputs: Inputs) -> None:
    """Refuse a step of these rows that would write one place twice; exact, so slow."""
    memories = []
    for row in rows:
        if row.param.grad is None:
            continue
        memories.append(checks.Memory(f"parameter '{row.name}'", row.param, written=True))
        memories.append(
            checks.Memory(f"the gradient of '{row.name}'", row.param.grad, written=False)
        )
        inner = entry_of(row, inputs) or {}
        for key in (*rules[row.group].keys, *((AVERAGE,) if inputs.averages else ())):
            value = inner.get(key)
            if isinstance(value, torch.Tensor):
                what = f"state '{key}' of '{row.name}'"
                memories.append(checks.Memory(what, value, written=True))
    checks.check_memory(memories)
