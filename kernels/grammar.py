# SPDX-License-Identifier: Apache-2.0
"""The grammar of the rule language: three primitives, and the check that a text keeps to it.

A rule is a plain Python function of numbers. It is run as it stands (Python floats, fp64), re-bound
to numpy, torch and Triton (`bind.py`) and translated to C++ (`emit_cpp.py`). All of them must round
every operation once and alike, so the language holds only what they all do alike:

* ``+ - *``, comparisons as the condition of ``where``, calls of `divide`, `sqrt` and `where`;
* calls of other functions written in the language, such as `maximum` in `language.py`;
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
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NoReturn

from .naming import why_not_a_name

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


# ----- the check ---------------------------------------------------------------------------------


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


_BINARY = (ast.Add, ast.Sub, ast.Mult)
_COMPARISONS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq)
_MENDS = {
    ast.Div: "'/' is not in the language: write divide(a, b)",
    ast.Pow: "'**' is not in the language: write a * a, or integer_power in a prepare",
    ast.If: "'if' is not in the language: write where(condition, a, b)",
    ast.IfExp: "'if' is not in the language: write where(condition, a, b)",
    ast.BoolOp: "'and' and 'or' are not in the language: nest where(...)",
}


def analyse(text: Text) -> Function:
    """Check that a function is in the language and return its syntax tree and interface.

    Raises:
        RuleError: with file, line and the mend.
    """
    return _analyse(text, ())


_analysed: dict[Text, Function] = {}


def _analyse(text: Text, callers: tuple[Text, ...]) -> Function:
    found = _analysed.get(text)
    if found is None:
        assert isinstance(text, FunctionType)
        tree = _parse(text)
        ast.increment_lineno(tree, text.__code__.co_firstlineno - 1)
        found = _analysed[text] = _Check(text, tree, (*callers, text)).run()
    return found


def _parse(text: FunctionType) -> ast.FunctionDef:
    first = text.__code__.co_firstlineno
    if hasattr(text, "__wrapped__"):
        message = "another decorator wraps this function: its text is not what would run"
        raise error_at(text, first, message)
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(text))).body
    except (OSError, SyntaxError, ValueError):
        tree = None
    if isinstance(tree, ast.FunctionDef) and tree.name == text.__name__:
        return tree
    if text.__name__ == "<lambda>" or isinstance(tree, ast.AsyncFunctionDef):
        raise error_at(text, first, "a text of the language is a function made by 'def'")
    message = (
        "the text of this function cannot be read (made by exec, python -c or at a prompt?): "
        "write it in a file and import it"
    )
    raise error_at(text, first, message)


def error_at(text: Text, node: ast.AST | int, message: str) -> RuleError:
    """The error for one place of a function, a node of its tree or a line."""
    line = node if isinstance(node, int) else getattr(node, "lineno", "?")
    return RuleError(f"{text.__code__.co_filename}:{line}: in {text.__name__}: {message}")


class _Check:
    """Walks one function; knows which names have a value at each point."""

    def __init__(
        self, text: FunctionType, tree: ast.FunctionDef, callers: tuple[Text, ...]
    ) -> None:
        self.text = text
        self.callers = callers  # this function last: who is being checked
        self.tree = tree
        self.known: set[str] = set()
        self.calls: dict[str, Function] = {}

    def run(self) -> Function:
        arguments = self.tree.args
        if arguments.vararg or arguments.kwarg or arguments.kwonlyargs or arguments.defaults:
            self.refuse(self.tree, "only plain positional arguments are in the language")
        self.named(self.tree.name, self.tree)
        for argument in arguments.posonlyargs + arguments.args:
            self.named(argument.arg, argument)
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

    def named(self, name: str, node: ast.AST) -> None:
        """A name that the emitted C++ gives to something too."""
        why_not = why_not_a_name(name)
        if why_not is not None:
            self.refuse(node, why_not)

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
                self.named(name.id, name)
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
        if name not in self.text.__code__.co_names:
            self.refuse(node, f"'{name}' is a value here, not a function: choose another name")
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
        if callee in self.callers:
            ring = [one.__name__ for one in self.callers[self.callers.index(callee) :]]
            said = " calls ".join([*ring, callee.__name__])
            self.refuse(node, f"recursion is not in the language ({said}): write a loop")
        function = self.calls[name] = _analyse(callee, self.callers)
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
        raise error_at(self.text, where_, message)
