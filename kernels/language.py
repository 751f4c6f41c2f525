# SPDX-License-Identifier: Apache-2.0
"""The language that update rules are written in: `grammar.py`, a few words more, and `rule`.

A rule is one or more functions of the language, the stages, each an elementwise sweep; what its
numbers are on one step is said by another, `prepare`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .digest import digest_of
from .grammar import (
    PRIMITIVES,
    Function,
    RuleError,
    Text,
    analyse,
    divide,
    error_at,
    sqrt,
    where,
)
from .naming import why_not_a_rule

__all__ = [
    "PRIMITIVES",
    "Function",
    "Initial",
    "Rule",
    "RuleError",
    "Stage",
    "Text",
    "absolute",
    "analyse",
    "divide",
    "maximum",
    "minimum",
    "named_results",
    "rule",
    "sign",
    "sqrt",
    "where",
]

# ----- what can be said with them ----------------------------------------------------------------


def maximum(a: float, b: float) -> float:
    """The larger; nan if either is nan."""
    return where(a > b, a, where(a != a, a, b))


def minimum(a: float, b: float) -> float:
    """The smaller; nan if either is nan."""
    return where(a < b, a, where(a != a, a, b))


def absolute(x: float) -> float:
    """|x|; 0 for either zero, nan for nan."""
    return where(x > 0.0, x, 0.0 - x)


def sign(x: float) -> float:
    """1, -1, a zero for itself, nan for nan (torch's gives 0 there and so hides it)."""
    return where(x > 0.0, 1.0, where(x < 0.0, -1.0, x))


# ----- rules -------------------------------------------------------------------------------------


def named_results(function: Function, returned: Any) -> dict[str, Any]:
    """What a call of a function returned, by the names that it returns."""
    several = len(function.results) > 1
    return dict(zip(function.results, returned if several else (returned,), strict=True))


Initial = float | str
"""Where state begins: a number; "param", the parameter; or the name of a number of the group."""


@dataclass(frozen=True)
class Stage:
    """One elementwise sweep of a rule. Names of `elements` and `sums` are in the order of use."""

    function: Function
    elements: tuple[str, ...]
    """What it reads per element: "param", "grad", names of state."""
    writes: tuple[str, ...]
    sums: tuple[str, ...]
    """Per-tensor sums that it leaves."""
    turn: Function | None
    """What happens once a tensor between this stage and the next, in fp64: it takes sums, values of
    earlier turns, scalar state, hypers and ``numel``, the number of elements."""
    values: tuple[str, ...]
    """Per-tensor values that the turn leaves for later stages."""
    hypers: tuple[str, ...]

    @property
    def leaves(self) -> tuple[str, ...]:
        """The per-tensor numbers that exist after it: its sums, then the values of its turn."""
        return self.sums + self.values


@dataclass(frozen=True)
class Rule:
    """One optimizer's mathematics: what `rule` made of a function.

    Attributes:
        name: the function's name, the rule's key everywhere.
        state: name -> initial value of each per-element state, in torch's own key names.
        scalars: name -> initial value of each scalar that is kept per parameter. It advances only
            when a step is not skipped.
        stages: the sweeps, in order.
        prepare: ``(step, *numbers, *counted) -> hypers and new values of counted``, in fp64, once a
            step.
        numbers: what `prepare` takes after ``step``, by the names that torch's groups use.
        counted: the scalars that `prepare` takes and returns; the others are a turn's.
        hypers: what `prepare` returns beside scalars.
    """

    name: str
    state: Mapping[str, Initial]
    scalars: Mapping[str, Initial]
    stages: tuple[Stage, ...]
    prepare: Function
    numbers: tuple[str, ...]
    counted: tuple[str, ...]
    hypers: tuple[str, ...]

    @property
    def per_tensor(self) -> tuple[str, ...]:
        """Every per-tensor number of the rule, in the order in which the stages leave them."""
        return tuple(name for stage in self.stages for name in stage.leaves)

    def prepared(
        self, step: int, numbers: Sequence[float], scalars: Mapping[str, float]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Run `prepare` on Python floats: the hypers, and the new values of `counted`."""
        made = self.prepare.text(float(step), *numbers, *(scalars[name] for name in self.counted))
        named = named_results(self.prepare, made)
        return (
            {name: named[name] for name in self.hypers},
            {name: named[name] for name in self.counted},
        )

    @cached_property
    def digest(self) -> str:
        """What its text comes to: compiled code of another digest is of another rule."""
        functions = [self.prepare]
        for stage in self.stages:
            functions += [stage.function, *([] if stage.turn is None else [stage.turn])]
        names = (self.elements, self.scalars, self.counted, self.numbers, self.hypers)
        return digest_of(names, functions)

    @property
    def elements(self) -> tuple[str, ...]:
        """Everything that exists per element: the parameter, its gradient, the state."""
        return ("param", "grad", *self.state)


Before = Text | tuple[Text, Text]
"""A stage that comes before the last one, or such a stage and its turn."""


def rule(
    *,
    state: Mapping[str, Initial],
    prepare: Text,
    after: tuple[Before, ...] = (),
    scalars: Mapping[str, Initial] | None = None,
) -> Callable[[Text], Rule]:
    """Make a `Rule` of the decorated function, which is its last (mostly its only) stage.

    Args:
        state: name -> initial value of each per-element state.
        prepare: the function that turns the step count and the group's numbers into hypers.
        after: the stages that come before the decorated one. A name that a stage returns and that
            is no element is a per-tensor sum. A pair is a stage and its turn: a function that runs
            once a tensor, in fp64, on sums, hypers, scalars and ``numel``; what it returns is a
            scalar's new value or a per-tensor value. Later stages take sums and values as
            arguments.
        scalars: name -> initial value of each scalar that is kept per parameter; `prepare` or a
            turn takes it and returns its new value.

    Raises:
        RuleError: the text is not in the language, or an argument comes from nowhere.
    """

    def build(text: Text) -> Rule:
        return _Building(analyse(prepare), state, scalars or {}).build((*after, text))

    return build


class _Building:
    """Puts the functions of a rule together; knows which per-tensor numbers there are so far."""

    def __init__(
        self, prepare: Function, state: Mapping[str, Initial], scalars: Mapping[str, Initial]
    ) -> None:
        self.prepare = prepare
        self.state = state
        self.elements = ("param", "grad", *state)
        counted = tuple(name for name in scalars if name in prepare.results)
        self.scalars = {name: scalars[name] for name in (*counted, *scalars)}
        self.counted = counted
        self.hypers = tuple(name for name in prepare.results if name not in scalars)
        self.per_tensor: list[str] = []
        self.turned: list[str] = []

    def build(self, parts: Sequence[Before]) -> Rule:
        prepare = self.prepare
        if prepare.arguments[:1] != ("step",):
            raise error_at(prepare.text, prepare.tree, "the first argument of a prepare is 'step'")
        numbers = prepare.arguments[1 : len(prepare.arguments) - len(self.counted)]
        if prepare.arguments[1:] != (*numbers, *self.counted) or set(numbers) & set(self.scalars):
            message = f"a prepare takes the scalars that it returns, {self.counted}, last"
            raise error_at(prepare.text, prepare.tree, message)
        if taken := [name for name in numbers if name in self.elements]:
            message = (
                f"a prepare runs once a step, before there are elements, but takes {taken}: take "
                "them in the rule, and leave the prepare 'step' and the group's numbers"
            )
            raise error_at(prepare.text, prepare.tree, message)
        for name, initial in (*self.state.items(), *self.scalars.items()):
            if isinstance(initial, str) and initial not in (*numbers, "param"):
                message = f"'{name}' begins as '{initial}', which is none of the numbers {numbers}"
                raise error_at(prepare.text, prepare.tree, message)
        stages = [self.stage(part) for part in parts]
        last = stages[-1]
        if last.leaves:
            raise error_at(
                last.function.text, last.function.tree, f"nobody reads the sums {last.leaves}"
            )
        if missing := set(self.scalars) - {*self.counted, *self.turned}:
            raise error_at(
                prepare.text, prepare.tree, f"nobody returns the scalars {sorted(missing)}"
            )
        if why_not := why_not_a_rule(last.function.name):
            raise error_at(last.function.text, last.function.tree, why_not)
        return Rule(
            name=last.function.name,
            state=dict(self.state),
            scalars=self.scalars,
            stages=tuple(stages),
            prepare=prepare,
            numbers=numbers,
            counted=self.counted,
            hypers=self.hypers,
        )

    def stage(self, part: Before) -> Stage:
        text, turn_text = part if isinstance(part, tuple) else (part, None)
        function = analyse(text)
        _refuse_scalar_calls(function)
        self.check(function, (*self.elements, *self.per_tensor, *self.hypers))
        if not function.results:
            raise error_at(function.text, function.tree, "a stage returns names, not expressions")
        if "grad" in function.results:
            raise error_at(function.text, function.tree, "a rule does not write the gradient")
        sums = tuple(name for name in function.results if name not in self.elements)
        self.per_tensor.extend(sums)
        turn, values = (None, ()) if turn_text is None else self.turn(analyse(turn_text))
        self.per_tensor.extend(values)
        return Stage(
            function=function,
            elements=tuple(n for n in self.elements if n in function.arguments),
            writes=tuple(n for n in self.elements if n in function.results),
            sums=sums,
            turn=turn,
            values=values,
            hypers=tuple(n for n in self.hypers if n in function.arguments),
        )

    def turn(self, function: Function) -> tuple[Function, tuple[str, ...]]:
        own = [name for name in self.scalars if name not in self.counted]
        self.check(function, (*self.per_tensor, *self.hypers, *own, "numel"))
        if not function.results:
            raise error_at(function.text, function.tree, "a turn returns names, not expressions")
        new = [name for name in function.results if name in self.scalars]
        if twice := [name for name in new if name in (*self.counted, *self.turned)]:
            raise error_at(function.text, function.tree, f"{twice} have another new value already")
        self.turned.extend(new)
        return function, tuple(name for name in function.results if name not in self.scalars)

    def check(self, function: Function, known: tuple[str, ...]) -> None:
        for name in function.arguments:
            if name not in known:
                message = (
                    f"argument '{name}' is no element, no per-tensor number and not among what "
                    f"{self.prepare.name} returns; there are: {', '.join(known)}"
                )
                raise error_at(function.text, function.tree, message)


def _refuse_scalar_calls(function: Function) -> None:
    """Refuse the functions of `scalar.py` in a sweep: in float32 their splitting is wrong."""
    of_name = {callee.name: callee for callee in function.calls}
    for node in ast.walk(function.tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        callee = of_name.get(node.func.id)
        if callee is None:
            continue
        if callee.text.__module__ == f"{__package__}.scalar":
            message = (
                f"{callee.name} is for numbers in float64, not for elements: call it in the "
                "prepare or in a turn, and take here what that returns"
            )
            raise error_at(function.text, node, message)
        _refuse_scalar_calls(callee)
