# SPDX-License-Identifier: Apache-2.0
"""Write the C++ functors of the update rules: the build runs this, nobody edits what it writes.

    python -m pyupdate.kernels.emit_cpp --output rules_generated.h [--rules my_rules.py]

Every function of the language becomes a template of the same name over the compute type T, with
the same operations in the same order; literals become T(0.5). Every rule becomes a struct that the
passes of csrc/ are generic over. What the language does not hold never gets here:
`language.analyse` has refused it with its line.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from . import rules as shipped
from .language import PRIMITIVES, Function, Rule, RuleError, Stage, analyse

_OPERATORS = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
}

_HEADER = """\
// SPDX-License-Identifier: Apache-2.0
// Written by kernels/emit_cpp.py; do not edit. What it was written from:
{sources}
#pragma once
#include "types.h"

namespace pyupdate {{
inline namespace PYUPDATE_ISA {{

// ----- the functions of the language, over the compute type
namespace text {{
{functions}
}}  // namespace text

// ----- what the reduce pass adds up or keeps the largest of, as stages
{reductions}
// ----- the rules, as the passes see them
namespace rules {{
{rules}
}}  // namespace rules

using Rules = List<{names}>;

}}  // namespace PYUPDATE_ISA
}}  // namespace pyupdate
"""


def emit(rules: Mapping[str, Rule]) -> str:
    """The whole header for these rules."""
    used: dict[str, Function] = {}
    added = [analyse(f) for f in (shipped.squared, shipped.nonfinite)]
    largest, join = analyse(shipped.magnitude), analyse(shipped.larger)
    others = [analyse(f) for f in (shipped.multiplier, shipped.clipped, shipped.averaged)]
    for function in (*others, *added, largest, join):
        _collect(function, used)
    for entry in rules.values():
        _collect(entry.prepare, used)
        for stage in entry.stages:
            _collect(stage.function, used)
            if stage.turn is not None:
                _collect(stage.turn, used)
    return _HEADER.format(
        sources="\n".join(f"//   {path}" for path in sorted(set(map(_source, used.values())))),
        functions="\n".join(map(_function, used.values())),
        reductions="\n".join([*map(_reduction, added), _reduction(largest, join)]),
        rules="\n".join(map(_rule, rules.values())),
        names=", ".join(f"rules::{name}" for name in rules),
    )


def _collect(function: Function, used: dict[str, Function]) -> None:
    """Add a function after those that it calls; two functions of one name would be two truths."""
    for call in function.calls:
        _collect(call, used)
    if used.setdefault(function.name, function) is not function:
        message = f"two functions are named '{function.name}'"
        raise ValueError(message)


def _source(function: Function) -> str:
    """The file that a function stands in, without the path of this machine."""
    path = Path(function.text.__code__.co_filename).resolve()
    room = Path(__file__).resolve().parent
    return str(path.relative_to(room.parent)) if path.is_relative_to(room) else path.name


# ----- functions ---------------------------------------------------------------------------------


def _function(function: Function) -> str:
    several = len(function.results) > 1
    result = f"{function.name}_results<T>" if several else "T"
    lines = []
    if several:
        fields = " ".join(f"T {name};" for name in function.results)
        lines += ["template <class T>", f"struct {function.name}_results {{ {fields} }};"]
    # A prepare may take a number only because state begins there.
    arguments = ", ".join(f"[[maybe_unused]] T {name}" for name in function.arguments)
    lines += ["template <class T>", f"PYUPDATE_HD {result} {function.name}({arguments}) {{"]
    known = set(function.arguments)
    for statement in function.tree.body:
        lines += _statement(statement, function, known, "  ")
    return "\n".join([*lines, "}"])


def _statement(node: ast.stmt, function: Function, known: set[str], indent: str) -> list[str]:
    if isinstance(node, ast.Expr):  # the docstring
        return []
    if isinstance(node, ast.Return):
        assert node.value is not None
        if isinstance(node.value, ast.Tuple):
            return [f"{indent}return {{{', '.join(map(_expression, node.value.elts))}}};"]
        return [f"{indent}return {_expression(node.value)};"]
    if isinstance(node, ast.For):
        assert isinstance(node.iter, ast.Call)
        count = ast.literal_eval(node.iter.args[0])
        inner = set(known)
        body = [s for n in node.body for s in _statement(n, function, inner, indent + "  ")]
        turn = "turn"
        while turn in {n.id for n in ast.walk(function.tree) if isinstance(n, ast.Name)}:
            turn += "_"  # a counter of the rule's own name would hide it without a word
        counts = f"int {turn} = 0; {turn} < {count}; ++{turn}"
        return [f"{indent}for ({counts}) {{", *body, f"{indent}}}"]
    assert isinstance(node, ast.Assign)
    target = node.targets[0]
    if isinstance(target, ast.Name):
        return [f"{indent}{_declared(target.id, known)} = {_expression(node.value)};"]
    assert isinstance(target, ast.Tuple)
    assert isinstance(node.value, ast.Call)
    assert isinstance(node.value.func, ast.Name)
    called = node.value.func.id
    results = next(call.results for call in function.calls if call.name == called)
    out = f"from_{called}_{node.lineno}"
    return [
        f"{indent}const auto {out} = {_expression(node.value)};",
        *(
            f"{indent}{_declared(name.id, known)} = {out}.{result};"
            for name, result in zip(target.elts, results, strict=True)
            if isinstance(name, ast.Name)
        ),
    ]


def _declared(name: str, known: set[str]) -> str:
    if name in known:
        return name
    known.add(name)
    return f"T {name}"


def _expression(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Constant | ast.UnaryOp):
        return f"T({float(ast.literal_eval(node))!r})"
    if isinstance(node, ast.BinOp):
        operator = _OPERATORS[type(node.op)]
        return f"({_expression(node.left)} {operator} {_expression(node.right)})"
    if isinstance(node, ast.Compare):
        operator = _OPERATORS[type(node.ops[0])]
        return f"{_expression(node.left)} {operator} {_expression(node.comparators[0])}"
    assert isinstance(node, ast.Call)
    assert isinstance(node.func, ast.Name)
    arguments = [_expression(argument) for argument in node.args]
    if node.func.id == "where":
        return f"({arguments[0]} ? {arguments[1]} : {arguments[2]})"
    template = "" if node.func.id in PRIMITIVES else "<T>"
    return f"{node.func.id}{template}({', '.join(arguments)})"


# ----- rules -------------------------------------------------------------------------------------


def _mask(names: Iterable[str], order: tuple[str, ...]) -> str:
    return "|".join(f"1u << {order.index(name)}" for name in names) or "0u"


def _rule(rule: Rule) -> str:
    taken = ("step", *rule.numbers, *rule.counted)
    given = (*rule.hypers, *rule.counted)
    numbers = {name: f"number[{i}]" for i, name in enumerate(taken)}
    places = {name: f"hyper[{i}]" for i, name in enumerate(given)}
    stages = "\n".join(_stage(rule, i, stage) for i, stage in enumerate(rule.stages))
    names = ", ".join(f"stage{i}" for i in range(len(rule.stages)))
    return f"""struct {rule.name} {{
  static constexpr const char* kName = "{rule.name}";
  static constexpr const char* kDigest = "{rule.digest}";
  static constexpr int kStates = {len(rule.state)};
  static constexpr int kScalars = {len(rule.scalars)};  // {", ".join(rule.scalars)}
  static constexpr int kCounted = {len(rule.counted)};  // those that prepare advances, first
  static constexpr int kNumbers = {1 + len(rule.numbers)};  // step, {", ".join(rule.numbers)}
  static constexpr int kHypers = {len(rule.hypers)};  // {", ".join(rule.hypers)}
  static constexpr int kPerTensor = {len(rule.per_tensor)};  // {", ".join(rule.per_tensor)}
  PYUPDATE_HD static void prepare(const double* number, double* hyper) {{
{_call(rule.prepare, "double", numbers, places, "    ")}
  }}
{stages}
  using Stages = List<{names}>;
}};
"""


def _call(
    function: Function, kind: str, takes: Mapping[str, str], gives: Mapping[str, str], indent: str
) -> str:
    """A call of a function of the language, its arguments from places and its results to places."""
    arguments = ", ".join(takes[name] for name in function.arguments)
    single = len(function.results) == 1
    return "\n".join(
        [
            f"{indent}const auto out = text::{function.name}<{kind}>({arguments});",
            *(
                f"{indent}{gives[name]} = {'out' if single else f'out.{name}'};"
                for name in function.results
            ),
        ]
    )


def _stage(rule: Rule, index: int, stage: Stage) -> str:
    before = sum(len(earlier.leaves) for earlier in rule.stages[:index])
    elements = {name: f"element[{i}]" for i, name in enumerate(rule.elements)}
    hypers = {name: f"hyper[{i}]" for i, name in enumerate(rule.hypers)}
    per_tensor = {name: f"per_tensor[{i}]" for i, name in enumerate(rule.per_tensor)}
    sums = {name: f"sum_out[{i}]" for i, name in enumerate(stage.sums)}
    run = _call(stage.function, "T", elements | hypers | per_tensor, elements | sums, "      ")
    return f"""  struct stage{index} {{
    static constexpr unsigned kReads = {_mask(stage.elements, rule.elements)};
    static constexpr unsigned kWrites = {_mask(stage.writes, rule.elements)};
    static constexpr int kSums = {len(stage.sums)};
    static constexpr int kFirstSum = {before};  // among the per-tensor numbers
    static constexpr int kPerTensorRead = {before};
    static constexpr int kHypers = {len(rule.hypers)};
    static constexpr int kElements = {len(rule.elements)};
    static constexpr bool kTurns = {"false" if stage.turn is None else "true"};
    template <class T>
    PYUPDATE_HD static void run([[maybe_unused]] T* element, [[maybe_unused]] const T* hyper,
                                [[maybe_unused]] const T* per_tensor,
                                [[maybe_unused]] T* sum_out) {{
{run}
    }}
{_CLIP if "grad" in stage.elements else ""}{_turn(rule, stage)}
  }};"""


_CLIP = """\
    template <class T>
    PYUPDATE_HD static T clip(T grad, T clip_value) {
      return text::clipped<T>(grad, clip_value);
    }
"""


def _turn(rule: Rule, stage: Stage) -> str:
    """The function that runs once a tensor when a stage is over, in fp64."""
    head = """\
    PYUPDATE_HD static void turn([[maybe_unused]] const double* hyper,
                                 [[maybe_unused]] double numel,
                                 [[maybe_unused]] double* per_tensor,
                                 [[maybe_unused]] double* scalar) {"""
    if stage.turn is None:
        return f"{head}}}"
    places = {"numel": "numel"}
    places |= {name: f"hyper[{i}]" for i, name in enumerate(rule.hypers)}
    places |= {name: f"per_tensor[{i}]" for i, name in enumerate(rule.per_tensor)}
    places |= {name: f"scalar[{i}]" for i, name in enumerate(rule.scalars)}
    return f"{head}\n{_call(stage.turn, 'double', places, places, '      ')}\n    }}"


def _reduction(function: Function, join: Function | None = None) -> str:
    name = function.name
    joined = ""
    if join is not None:
        joined = f"""  template <class T>
  PYUPDATE_HD static T join(T a, T b) {{
    return text::{join.name}<T>(a, b);
  }}
"""
    return f"""struct {name}_stage {{
  static constexpr unsigned kReads = 1u << 1;
  static constexpr unsigned kWrites = 0u;
  static constexpr int kSums = 1;
  static constexpr int kFirstSum = 0;
  static constexpr int kPerTensorRead = 0;
  static constexpr int kHypers = 0;
  static constexpr int kElements = 2;
  static constexpr bool kTurns = false;
  template <class T>
  PYUPDATE_HD static void run(T* element, const T*, const T*, T* sum_out) {{
    sum_out[0] = text::{name}<T>(element[1]);
  }}
{joined}}};
"""


def load_rules(path: Path) -> Mapping[str, Rule]:
    """The rules of a module file that was named explicitly, for the build.

    They are its RULES where it has such a dict, else every rule that it makes.

    Raises:
        RuleError: a rule is not in the language, there is none, or two have one name.
    """
    name = f"pyupdate_rules_of_{path.stem}"  # hides no module that the file may import
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    beside = str(path.parent)
    sys.path.insert(0, beside)  # as for `python my_rules.py`: it may import its neighbours
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(beside)
    if hasattr(module, "RULES"):
        listed: Mapping[str, Rule] = module.RULES
        return listed
    found: dict[str, Rule] = {}
    made = [value for value in vars(module).values() if isinstance(value, Rule)]
    for rule in made:
        if rule.stages[-1].function.text.__module__ != name:
            continue  # imported from elsewhere
        if found.setdefault(rule.name, rule) is not rule:
            message = f"{path}: two rules are named '{rule.name}': rename one of them"
            raise RuleError(message)
    if not found:
        message = f"{path}: there is no rule in it: decorate a function with pyupdate.rule"
        raise RuleError(message)
    return found


def main() -> None:
    """Command line of the build."""
    parser = argparse.ArgumentParser(description="Write the C++ functors of the update rules.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rules", type=Path, help="a module file with a RULES dict")
    arguments = parser.parse_args()
    own = Path(shipped.__file__).resolve()
    foreign = arguments.rules is not None and arguments.rules.resolve() != own
    found = load_rules(arguments.rules) if foreign else shipped.RULES
    header = emit(found)
    if not arguments.output.exists() or arguments.output.read_text() != header:
        arguments.output.write_text(header)


if __name__ == "__main__":
    main()
