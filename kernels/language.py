# SPDX-License-Identifier: Apache-2.0
"""The language that update rules are written in, and the check that a rule keeps to it.

A rule is a plain Python function of numbers. It is run as it stands (Python floats, fp64), re-bound
to numpy, torch and Triton (`bind.py`) and translated to C++ (`emit_cpp.py`). All of them must round
every operation once and alike, so the language holds only what they all do alike:

* ``+ - *``, comparisons as the condition of ``where``, calls of `divide`, `sqrt` and `where`;
* calls of other functions written in the language, such as `maximum` below;
* ``for _ in range(N)`` with a literal N; one ``return`` at the end.

``/``, ``**``, ``if``, ``and``, ``abs`` and the rest are refused with their line: an operator cannot
be rebound, and Triton's ``/`` is not IEEE division. Literals must be exact in fp32 (0.5, not 0.1).
"""

from __future__ import annotations

import ast
import inspect
import math
import struct
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any, NoReturn

Text = Callable[..., Any]
"""A function written in the language."""


class RuleError(Exception):
    """A rule uses something that is not in the language; the message starts with file and line."""


# ----- the three primitives, on Python floats ----------------------------------------------------


def divide(dividend: float, divisor: float) -> float:
    """IEEE division; on a zero divisor Python raises where IEEE answers inf or nan."""
    if divisor != 0.0:
        return dividend / divisor
    if dividend == 0.0 or dividend != dividend or divisor != divisor:
        return math.nan
    return math.copysign(math.inf, dividend) * math.copysign(1.0, divisor)


def sqrt(x: float) -> float:
    """IEEE square root; nan below zero."""
    return math.sqrt(x) if x >= 0.0 else math.nan


def where(condition: bool, if_true: float, if_false: float) -> float:
    """Select; both branches are evaluated."""
    return if_true if condition else if_false


PRIMITIVES: dict[str, Text] = {"divide": divide, "sqrt": sqrt, "where": where}


# ----- what can be said with them ----------------------------------------------------------------


def maximum(a: float, b: float) -> float:
    """The larger; nan if either is nan."""
    return where(a > b, a, where(a != a, a, b))


def minimum(a: float, b: float) -> float:
    """The smaller; nan if either is nan."""
    return where(a < b, a, where(a != a, a, b))


# ----- rules -------------------------------------------------------------------------------------


def named_results(function: Function, returned: Any) -> dict[str, Any]:
    """What a call of a function returned, by the names that it returns."""
    several = len(function.results) > 1
    return dict(zip(function.results, returned if several else (returned,), strict=True))


@dataclass(frozen=True)
class Function:
    """A checked function of the language: its syntax tree and its interface."""

    text: Text
    tree: ast.FunctionDef
    arguments: tuple[str, ...]
    results: tuple[str, ...]
    """The names that it returns, or () if it returns one unnamed expression."""
    calls: tuple[Function, ...]
    """The functions of the language that it calls, each once."""

    @property
    def name(self) -> str:
        """Its name, the same in every language it goes to."""
        return self.tree.name


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
            raise _error(prepare.text, prepare.tree, "the first argument of a prepare is 'step'")
        numbers = prepare.arguments[1 : len(prepare.arguments) - len(self.counted)]
        if prepare.arguments[1:] != (*numbers, *self.counted) or set(numbers) & set(self.scalars):
            message = f"a prepare takes the scalars that it returns, {self.counted}, last"
            raise _error(prepare.text, prepare.tree, message)
        for name, initial in (*self.state.items(), *self.scalars.items()):
            if isinstance(initial, str) and initial not in (*numbers, "param"):
                message = f"'{name}' begins as '{initial}', which is none of the numbers {numbers}"
                raise _error(prepare.text, prepare.tree, message)
        stages = [self.stage(part) for part in parts]
        last = stages[-1]
        if last.leaves:
            raise _error(
                last.function.text, last.function.tree, f"nobody reads the sums {last.leaves}"
            )
        if missing := set(self.scalars) - {*self.counted, *self.turned}:
            raise _error(
                prepare.text, prepare.tree, f"nobody returns the scalars {sorted(missing)}"
            )
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
        self.check(function, (*self.elements, *self.per_tensor, *self.hypers))
        if not function.results:
            raise _error(function.text, function.tree, "a stage returns names, not expressions")
        if "grad" in function.results:
            raise _error(function.text, function.tree, "a rule does not write the gradient")
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
            raise _error(function.text, function.tree, "a turn returns names, not expressions")
        new = [name for name in function.results if name in self.scalars]
        if twice := [name for name in new if name in (*self.counted, *self.turned)]:
            raise _error(function.text, function.tree, f"{twice} have another new value already")
        self.turned.extend(new)
        return function, tuple(name for name in function.results if name not in self.scalars)

    def check(self, function: Function, known: tuple[str, ...]) -> None:
        for name in function.arguments:
            if name not in known:
                message = (
                    f"argument '{name}' is no element, no per-tensor number and not among what "
                    f"{self.prepare.name} returns; there are: {', '.join(known)}"
                )
                raise _error(function.text, function.tree, message)


# ----- the check ---------------------------------------------------------------------------------

_BINARY = (ast.Add, ast.Sub, ast.Mult)
_COMPARISONS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq)
_MENDS = {
    ast.Div: "'/' is not in the language: write divide(a, b)",
    ast.Pow: "'**' is not in the language: write a * a, or integer_power in a prepare",
    ast.If: "'if' is not in the language: write where(condition, a, b)",
    ast.IfExp: "'if' is not in the language: write where(condition, a, b)",
    ast.BoolOp: "'and' and 'or' are not in the language: nest where(...)",
}


@cache
def analyse(text: Text) -> Function:
    """Check that a function is in the language and return its syntax tree and interface.

    Raises:
        RuleError: with file, line and the mend.
    """
    assert isinstance(text, FunctionType)
    module = ast.parse(textwrap.dedent(inspect.getsource(text)))
    tree = module.body[0]
    assert isinstance(tree, ast.FunctionDef)
    ast.increment_lineno(tree, text.__code__.co_firstlineno - 1)
    return _Check(text, tree).run()


def _error(text: Text, node: ast.AST, message: str) -> RuleError:
    line = getattr(node, "lineno", "?")
    return RuleError(f"{text.__code__.co_filename}:{line}: in {text.__name__}: {message}")


class _Check:
    """Walks one function; knows which names have a value at each point."""

    def __init__(self, text: FunctionType, tree: ast.FunctionDef) -> None:
        self.text = text
        self.tree = tree
        self.known: set[str] = set()
        self.calls: dict[str, Function] = {}

    def run(self) -> Function:
        arguments = self.tree.args
        if arguments.vararg or arguments.kwarg or arguments.kwonlyargs or arguments.defaults:
            self.refuse(self.tree, "only plain positional arguments are in the language")
        names = tuple(argument.arg for argument in arguments.posonlyargs + arguments.args)
        self.known.update(names)
        body = self.tree.body
        if ast.get_docstring(self.tree) is not None:
            body = body[1:]
        if not body or not isinstance(body[-1], ast.Return):
            self.refuse(self.tree, "a function ends in its one 'return'")
        for statement in body[:-1]:
            self.statement(statement)
        return Function(
            self.text, self.tree, names, self.results(body[-1]), tuple(self.calls.values())
        )

    def results(self, node: ast.stmt) -> tuple[str, ...]:
        assert isinstance(node, ast.Return)
        values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
        if len(values) == 1 and not isinstance(values[0], ast.Name):
            self.expression(values[0])
            return ()
        for value in values:
            if not isinstance(value, ast.Name):
                self.refuse(node, "what is returned must be names, or one expression")
            self.expression(value)
        names = tuple(value.id for value in values if isinstance(value, ast.Name))
        if len(set(names)) != len(names):
            self.refuse(node, "a name is returned twice")
        return names

    def statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.For):
            self.loop(node)
        elif isinstance(node, ast.Assign) and len(node.targets) == 1:
            target = node.targets[0]
            targets = target.elts if isinstance(target, ast.Tuple) else [target]
            if isinstance(target, ast.Tuple):
                function = self.call(node.value)
                if function is None or len(function.results) != len(targets):
                    self.refuse(node, "several names take the names that one call returns")
            else:
                self.expression(node.value)
            for name in targets:
                if not isinstance(name, ast.Name):
                    self.refuse(node, "only plain names can be assigned")
                self.known.add(name.id)
        else:
            self.refuse(node, f"'{type(node).__name__}' is not in the language")

    def loop(self, node: ast.For) -> None:
        call = node.iter
        if not (
            isinstance(node.target, ast.Name)
            and isinstance(call, ast.Call)
            and isinstance(call.func, ast.Name)
            and call.func.id == "range"
            and len(call.args) == 1
            and isinstance(call.args[0], ast.Constant)
            and type(call.args[0].value) is int
            and not call.keywords
            and not node.orelse
        ):
            self.refuse(node, "the one loop of the language is 'for _ in range(<literal>)'")
        if node.target.id in self.known:
            self.refuse(node, f"'{node.target.id}' has a value already: count with '_'")
        before = set(self.known)
        for statement in node.body:
            self.statement(statement)
        self.known = before

    def expression(self, node: ast.AST | None) -> None:
        if isinstance(node, ast.Name):
            if node.id not in self.known:
                self.refuse(node, f"'{node.id}' has no value here")
        elif isinstance(node, ast.Constant):
            self.literal(node, node.value)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            if not isinstance(node.operand, ast.Constant):
                self.refuse(node, "negation is not in the language: write 0.0 - x")
            self.literal(node, node.operand.value)
        elif isinstance(node, ast.BinOp):
            if not isinstance(node.op, _BINARY):
                self.refuse(node.op, "this operator is not in the language", node)
            self.expression(node.left)
            self.expression(node.right)
        elif isinstance(node, ast.Call):
            function = self.call(node)
            if function is not None and len(function.results) > 1:
                self.refuse(node, f"{function.name} returns several: a, b = {function.name}(...)")
        elif isinstance(node, ast.Compare):
            self.refuse(node, "a comparison stands only as the condition of where(...)")
        else:
            self.refuse(node, f"'{type(node).__name__}' is not in the language")

    def literal(self, node: ast.AST, value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(node, f"{value!r} is no number")
        if not math.isfinite(value):
            self.refuse(node, f"{value!r} is no finite number")
        try:
            exact = struct.unpack("f", struct.pack("f", value))[0] == value
        except OverflowError:
            exact = False
        if not exact:
            self.refuse(node, f"{value!r} is not exact in fp32: let prepare return it as a hyper")

    def call(self, node: ast.AST | None) -> Function | None:
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.keywords:
            self.refuse(node, "only plain calls f(a, b) are in the language")
        name = node.func.id
        arguments = list(node.args)
        if name in PRIMITIVES and self.text.__globals__.get(name) is PRIMITIVES[name]:
            arity = len(inspect.signature(PRIMITIVES[name]).parameters)
            if len(arguments) != arity:
                self.refuse(node, f"{name} takes {arity} arguments, not {len(arguments)}")
            if name == "where":
                self.condition(arguments.pop(0))
            for argument in arguments:
                self.expression(argument)
            return None
        callee = self.text.__globals__.get(name)
        if not isinstance(callee, FunctionType):
            self.refuse(node, f"'{name}' is no function of the language")
        function = self.calls[name] = analyse(callee)
        if function.name != name:
            self.refuse(node, f"'{name}' is defined as '{function.name}': call it by that name")
        if len(arguments) != len(function.arguments):
            self.refuse(node, f"{name} takes {len(function.arguments)} arguments")
        for argument in arguments:
            self.expression(argument)
        return function

    def condition(self, node: ast.AST) -> None:
        if (
            not isinstance(node, ast.Compare)
            or len(node.ops) != 1
            or not isinstance(node.ops[0], _COMPARISONS)
        ):
            self.refuse(node, "the condition of where is one comparison of two values")
        self.expression(node.left)
        self.expression(node.comparators[0])

    def refuse(self, node: ast.AST | None, message: str, place: ast.AST | None = None) -> NoReturn:
        where_ = place if place is not None else node if node is not None else self.tree
        for kind, mend in _MENDS.items():
            if isinstance(node, kind):
                message = mend
        raise _error(self.text, where_, message)
