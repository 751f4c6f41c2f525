# SPDX-License-Identifier: Apache-2.0
"""A user's own rule: the decorator `pyupdate.rule`.

It is `language.rule` with what a user need not know left out: without a `prepare`, every argument
that is no element is a number of the optimizer's groups (``lr``, ``momentum``) or ``step``, and
reaches the rule as it is, rounded once to the compute type.
"""

from __future__ import annotations

import importlib
import linecache
import math
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from types import FunctionType
from typing import Any, overload

from . import language
from .grammar import error_at
from .language import Before, Initial, Rule, RuleError, Text, analyse, divide

_GIVEN = ("param", "grad", "step", "numel")
_KEPT = ("ema",)  # under which an average stands beside the state
RESERVED = ("params", "maximize", "differentiable", "capturable", "foreach", "fused", "accumulated")
"""Names in an optimizer's group that mean something to torch or to pyupdate."""


@dataclass(frozen=True, eq=False, repr=False)
class OwnRule(Rule):
    """A rule of the user's; `pyupdate.optim.from_rule` makes an optimizer class of it.

    Attributes:
        defaults: values of numbers that need not be given.
        text: the decorated function, for errors and for pickles.
    """

    defaults: Mapping[str, float] = field(default_factory=dict)
    text: Text = divide

    __eq__ = object.__eq__  # two rules are the same only if they are one
    __hash__ = object.__hash__

    @property
    def place(self) -> str:
        """File and line of the decorated function."""
        code = self.text.__code__
        return f"{code.co_filename}:{code.co_firstlineno}"

    def __repr__(self) -> str:
        numbers = ", ".join(
            f"{name}={self.defaults[name]!r}" if name in self.defaults else name
            for name in self.numbers
        )
        return f"<pyupdate.rule {self.name}({numbers}), state: {', '.join(self.state) or 'none'}>"

    def __call__(self, *_: object, **__: object) -> Any:
        """Refuse: a rule is no function any more.

        Raises:
            TypeError: always.
        """
        message = (
            f"the rule '{self.name}' is not called: make an optimizer class of it with "
            f"pyupdate.optim.from_rule({self.name}), or give it to pyupdate.build"
        )
        raise TypeError(message)

    def __copy__(self) -> OwnRule:
        return self

    def __deepcopy__(self, memo: object) -> OwnRule:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        home, name = self.text.__module__, self.text.__qualname__
        try:
            found = rule_at(home, name)
        except (ImportError, AttributeError, TypeError):
            found = None
        if found is not self:
            message = (
                f"the rule '{self.name}' cannot be pickled: it is not what the name {name} of the "
                f"module {home} refers to; decorate it at the top level of a module"
            )
            raise pickle.PicklingError(message)
        return rule_at, (home, name)


def rule_at(module: str, name: str) -> OwnRule:
    """The rule of that name in a module: how a pickle finds it again."""
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    if not isinstance(found, OwnRule):
        message = f"{module}.{name} is a {type(found).__name__}, not a pyupdate.rule"
        raise TypeError(message)
    return found


@overload
def rule(text: Text, /) -> OwnRule: ...
@overload
def rule(
    *,
    state: Mapping[str, Initial] | None = ...,
    defaults: Mapping[str, float] | None = ...,
    prepare: Text | None = ...,
    after: tuple[Before, ...] = ...,
    scalars: Mapping[str, Initial] | None = ...,
) -> Callable[[Text], OwnRule]: ...
def rule(
    text: Text | None = None,
    /,
    *,
    state: Mapping[str, Initial] | None = None,
    defaults: Mapping[str, float] | None = None,
    prepare: Text | None = None,
    after: tuple[Before, ...] = (),
    scalars: Mapping[str, Initial] | None = None,
) -> OwnRule | Callable[[Text], OwnRule]:
    """Make an update rule of a function of a few lines; it is checked here and now.

    The function takes, by their names, ``param`` and ``grad`` (the gradient after unscaling,
    clipping and ``maximize``), the state that it keeps per element, the numbers of the optimizer's
    group and, if it likes, ``step`` (1 in the first step). It returns the names of what it changed:
    ``param`` and state. All are numbers of the compute type (float64 for float64 parameters,
    float32 for all others), every operation is rounded once, and state is stored in the type of
    the parameter. What may be written is said in `pyupdate.language`.

    Args:
        text: the function, where the decorator is written without arguments.
        state: name -> value before the first step, for each number that is kept per element: a
            number, the name of a number of the group, or "param".
        defaults: name -> value, for the numbers that need not be given to the optimizer.
        prepare: the long form. A function of ``step`` and of the group's numbers that returns the
            names of what the rule takes instead of them; it runs once a step, in float64, so that
            a bias correction costs nothing per element. None passes every number on as it is.
        after: functions that come before the decorated one, as sweeps of their own. A name that
            one of them returns and that is neither ``param`` nor state is summed over the tensor,
            and later ones may take it. A pair of functions is such a sweep and its turn, which runs
            once a tensor when the sweep is over, in float64: it takes sums, scalars, the numbers
            and ``numel``, the number of elements, and what it returns later sweeps may take.
        scalars: name -> value before the first step, for each number that is kept per parameter; a
            turn or the `prepare` takes it and returns its new value.

    Returns:
        The rule, for `pyupdate.optim.from_rule`, `pyupdate.build` and ``python -m
        pyupdate.compile``.

    Raises:
        pyupdate.language.RuleError: something cannot be expressed; starts with file and line.
        TypeError: what is decorated is no function, or a value is no number; with file and line.

    Example:
        >>> import torch, pyupdate
        >>> from pyupdate.language import sign
        >>> @pyupdate.rule(state={"exp_avg": 0.0}, defaults={"beta": 0.5})
        ... def sign_momentum(param, grad, exp_avg, lr, beta):
        ...     exp_avg = exp_avg * beta + grad * (1.0 - beta)
        ...     param = param - lr * sign(exp_avg)
        ...     return param, exp_avg
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = pyupdate.optim.from_rule(sign_momentum)([p], lr=0.25)
        >>> p.grad = torch.tensor([3.0, -1.0])
        >>> optimizer.step()
        >>> p.tolist(), optimizer.state[p]["exp_avg"].tolist()
        ([0.75, 1.25], [1.5, -0.5])
    """
    if text is not None:
        return rule()(text)
    place = _place()
    for what, given in (("state", state), ("scalars", scalars), ("defaults", defaults)):
        if given is not None and not isinstance(given, Mapping):
            message = f"{place}: pyupdate.rule: {what} must be a dict of name -> value: {given!r}"
            raise TypeError(message)
    state, scalars = dict(state or {}), dict(scalars or {})
    for what, kept in (("state", state), ("scalars", scalars)):
        for name, initial in kept.items():
            if not isinstance(initial, str):
                _check_number(place, f"{what}[{name!r}]", initial)
    before = [f for part in after for f in (part if isinstance(part, tuple) else (part,))]

    def build(text: Text) -> OwnRule:
        for function in (*before, text, *([] if prepare is None else [prepare])):
            if not isinstance(function, FunctionType):
                found = f"a {type(function).__name__}: {function!r}"
                message = f"{place}: pyupdate.rule takes plain functions, but got {found}"
                raise TypeError(message)
        first = text.__code__.co_firstlineno
        for name in (*state, *scalars):
            if not name.isidentifier() or name in (*_GIVEN, *_KEPT):
                raise error_at(text, first, f"state cannot be named '{name}'")
        made = prepare
        if made is None:
            numbers = tuple(_numbers({*_GIVEN, *state, *scalars}, (*before, text)))
            for name, initial in (*state.items(), *scalars.items()):
                if isinstance(initial, str) and initial not in (*numbers, "param"):
                    message = f"'{name}' begins as '{initial}', which is none of the numbers"
                    raise error_at(text, first, f"{message} {numbers}")
            made = _passing(text, numbers)
        checked = language.rule(state=state, prepare=made, after=after, scalars=scalars)(text)
        touched = {name for s in checked.stages for name in (*s.elements, *s.writes)}
        if unused := [name for name in state if name not in touched]:
            raise error_at(text, first, f"state {unused} is taken by no function of the rule")
        if taken := [name for name in checked.numbers if name in RESERVED]:
            message = f"the numbers {taken} have names that every optimizer keeps for itself"
            raise error_at(text, first, f"{message}; choose others")
        for name, value in (defaults or {}).items():
            if name not in checked.numbers:
                there = ", ".join(checked.numbers) or "none"
                message = f"defaults: '{name}' is no number of this rule; there are: {there}"
                raise error_at(text, first, message)
            _check_number(place, f"defaults[{name!r}]", value)
        shared = {f.name: getattr(checked, f.name) for f in fields(Rule)}
        return OwnRule(**shared, defaults=dict(defaults or {}), text=text)

    return build


def _numbers(known: set[str], functions: tuple[Text, ...]) -> Iterator[str]:
    """The arguments of all functions of a rule that come from the group, each once."""
    for function in map(analyse, functions):
        for name in function.arguments:
            if name not in known:
                known.add(name)
                yield name
        known.update(function.results)


def _passing(text: Text, numbers: Iterable[str]) -> Text:
    """A prepare that returns the step and its numbers as they are.

    Written as text like any other, so that every back end reads it alike; `linecache` keeps it for
    whoever asks for its source.
    """
    code = text.__code__
    name = f"prepare_{text.__name__}"
    names = ", ".join(["step", *numbers])
    source = f"def {name}({names}):\n    return {names}\n"
    file = f"<numbers of {text.__qualname__} at {code.co_filename}:{code.co_firstlineno}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    made: dict[str, Any] = {"__name__": text.__module__}
    exec(compile(source, file, "exec"), made)
    function: Text = made[name]
    return function


def _place() -> str:
    """File and line from which the decorator is called."""
    frame = sys._getframe()
    while frame.f_globals is globals() and frame.f_back is not None:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _check_number(place: str, what: str, value: object) -> None:
    if not isinstance(value, int | float):
        message = f"{place}: pyupdate.rule: {what} must be a number, but is {value!r}"
        raise TypeError(message)
    if math.isnan(value):
        message = f"{place}: pyupdate.rule: {what} is nan"
        raise RuleError(message)
