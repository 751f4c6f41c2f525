# SPDX-License-Identifier: Apache-2.0
"""A rule as the Triton kernels take it: bound texts, and numbers that say what goes in and out.

A number below 100 is a role (0 the parameter, 1 its gradient, 2 the first state); HYPER, PER_TENSOR
and SCALAR add to them the index of a hyper, of a per-tensor number, of a scalar.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .bind import bind
from .language import Rule, Stage

HYPER, PER_TENSOR, SCALAR, NUMEL = 100, 200, 300, 400
CLASS_HYPERS = 2


@dataclass(frozen=True)
class StageForm:
    """One stage, and its turn if it has one."""

    text: Callable[..., Any]
    wide_text: Callable[..., Any]
    """For fp64 parameters."""
    takes: tuple[int, ...]
    gives: tuple[int, ...]
    roles: tuple[int, ...]
    """What is read or written per element."""
    sums: tuple[int, ...]
    """The places of its sums among the rule's per-tensor numbers."""
    turn: Callable[..., Any] | None
    turn_takes: tuple[int, ...]
    turn_gives: tuple[int, ...]


@dataclass(frozen=True)
class RuleForm:
    """One rule.

    Attributes:
        prepare: its bound text.
        numbers: how many it takes of the group, behind the step.
        counted: how many scalars it takes and returns.
        results: where each of what it returns stands in a class of rows: step, sign, hypers in the
            rule's order, new values of the counted scalars.
        class_width: how many numbers a class has.
        per_tensor: how many numbers a row has.
        stages: in order.
    """

    prepare: Callable[..., Any]
    numbers: int
    counted: int
    results: tuple[int, ...]
    class_width: int
    per_tensor: int
    stages: tuple[StageForm, ...]


def form_of(rule: Rule) -> RuleForm:
    """How the kernels take a rule."""
    hypers, counted = rule.hypers, rule.counted
    place = {name: CLASS_HYPERS + k for k, name in enumerate((*hypers, *counted))}
    return RuleForm(
        prepare=bind(rule.prepare.text, "triton scalar"),
        numbers=len(rule.numbers),
        counted=len(counted),
        results=tuple(place[name] for name in rule.prepare.results),
        class_width=CLASS_HYPERS + len(hypers) + len(counted),
        per_tensor=len(rule.per_tensor),
        stages=tuple(_stage(rule, stage) for stage in rule.stages),
    )


def _stage(rule: Rule, stage: Stage) -> StageForm:
    known = {name: k for k, name in enumerate(rule.elements)}
    known |= {name: HYPER + k for k, name in enumerate(rule.hypers)}
    known |= {name: PER_TENSOR + k for k, name in enumerate(rule.per_tensor)}
    takes, gives = (
        _numbers(stage.function.arguments, known),
        _numbers(stage.function.results, known),
    )
    roles = sorted({number for number in (*takes, *gives) if number < HYPER})
    turn = stage.turn
    in_turn = known | {name: SCALAR + k for k, name in enumerate(rule.scalars)} | {"numel": NUMEL}
    return StageForm(
        text=bind(stage.function.text, "triton"),
        wide_text=bind(stage.function.text, "triton fp64"),
        takes=takes,
        gives=gives,
        roles=tuple(roles),
        sums=tuple(known[name] - PER_TENSOR for name in stage.sums),
        turn=None if turn is None else bind(turn.text, "triton scalar"),
        turn_takes=() if turn is None else _numbers(turn.arguments, in_turn),
        turn_gives=() if turn is None else _numbers(turn.results, in_turn),
    )


def _numbers(names: tuple[str, ...], known: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(known[name] for name in names)
