# SPDX-License-Identifier: Apache-2.0
"""The rule language: each construct that it does not know is refused, with file and line."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from compiling import ROOT, RULES_HEAD, rules_of

from pyupdate.kernels import emit_cpp, grammar, rules
from pyupdate.kernels.language import RuleError


def check_refused(text: str, message: str, folder: Path) -> None:
    """RuleError with the file, the message, and the line that is marked with `# <-`."""
    lines = (RULES_HEAD + textwrap.dedent(text)).splitlines()
    (line,) = [i for i, content in enumerate(lines, 1) if content.endswith("# <-")]
    with pytest.raises(RuleError) as caught:
        rules_of(text, folder)
    assert str(caught.value).startswith(f"{folder / 'bad.py'}:{line}: in "), str(caught.value)
    assert message in str(caught.value)


# Statements of a rule on (param, grad, buffer, lr, eps): the marked line is refused.
STATEMENTS = {
    # operators
    "param = param / lr  # <-": "write divide(a, b)",
    "param = param ** 2.0  # <-": "'**' is not in the language",
    "param = param // lr  # <-": "this operator",
    "param = param % lr  # <-": "this operator",
    "param = param @ lr  # <-": "this operator",
    "param = param << 1  # <-": "this operator",
    "param = param | lr  # <-": "this operator",
    "param = -param  # <-": "write 0.0 - x",
    "param = -(param * lr)  # <-": "write 0.0 - x",
    "param = +param  # <-": "'UnaryOp'",
    "param = ~param  # <-": "'UnaryOp'",
    "param = not param  # <-": "'UnaryOp'",
    "param = param and lr  # <-": "nest where",
    "param = param or lr  # <-": "nest where",
    "param = lr if grad else eps  # <-": "write where",
    # comparisons
    "param = param > lr  # <-": "only as the condition of where",
    "param = param * (param > lr)  # <-": "only as the condition of where",
    "param = where(param, lr, eps)  # <-": "one comparison of two values",
    "param = where(lr < param < eps, lr, eps)  # <-": "one comparison of two values",
    "param = where(param > lr and param < eps, lr, eps)  # <-": "nest where",
    "param = where(param is lr, lr, eps)  # <-": "one comparison of two values",
    "param = where(param in lr, lr, eps)  # <-": "one comparison of two values",
    "param = where(1.0, lr, eps)  # <-": "one comparison of two values",
    # literals
    "param = param * 0.1  # <-": "0.1 is not exact in fp32",
    "param = param * 16777217  # <-": "16777217 is not exact in fp32",
    "param = param * 1e39  # <-": "not exact in fp32",
    "param = param * 1e999  # <-": "inf is no finite number",
    "param = param * -0.3  # <-": "not exact in fp32",
    "param = param * True  # <-": "True is no number",
    "param = param * -True  # <-": "True is no number",
    "param = param * None  # <-": "None is no number",
    "param = param * 1j  # <-": "1j is no number",
    "param = 'lr'  # <-": "'lr' is no number",
    # calls
    "param = abs(param)  # <-": "'abs' is no function of the language",
    "param = min(param, lr)  # <-": "'min' is no function of the language",
    "param = max(param, lr)  # <-": "'max' is no function of the language",
    "param = float(param)  # <-": "'float' is no function of the language",
    "param = unheard_of(param)  # <-": "'unheard_of' is no function of the language",
    "param = another_name(param)  # <-": "defined as 'half'",
    "param = bad(param)  # <-": "'bad' is no function of the language",
    "param = divide(param)  # <-": "divide takes 2 arguments",
    "param = sqrt(param, lr)  # <-": "sqrt takes 1 arguments",
    "param = where(param > lr, lr)  # <-": "where takes 3 arguments",
    "param = half(param, lr)  # <-": "half takes 1 arguments",
    "param = half(a=param)  # <-": "only plain calls",
    "param = divide(param, divisor=lr)  # <-": "only plain calls",
    "param = half(*param)  # <-": "'Starred'",
    "param = param.sqrt()  # <-": "only plain calls",
    "param = half(param)(lr)  # <-": "only plain calls",
    "param = pair(param, lr)  # <-": "pair returns several",
    "param = pair(param, lr) + 1.0  # <-": "pair returns several",
    # names, attributes and other expressions
    "param = unknown  # <-": "'unknown' has no value here",
    "param = param + later  # <-\nlater = lr": "'later' has no value here",
    "param = param.grad  # <-": "'Attribute'",
    "param = param[0]  # <-": "'Subscript'",
    "param = lambda x: x  # <-": "'Lambda'",
    "param = [param]  # <-": "'List'",
    "param = [lr for _ in grad]  # <-": "'ListComp'",
    "param = (x := param)  # <-": "'NamedExpr'",
    "param = f'{lr}'  # <-": "'JoinedStr'",
    "param = yield  # <-": "'Yield'",
    # assignments
    "param += lr  # <-": "'AugAssign'",
    "param = grad = lr  # <-": "'Assign'",
    "param: float = lr  # <-": "'AnnAssign'",
    "param, lr = lr, param  # <-": "only plain calls",
    "a, b, c = pair(param, lr)  # <-": "the names that one call returns",
    "a, b = half(param)  # <-": "the names that one call returns",
    "a, b = divide(param, lr)  # <-": "the names that one call returns",
    "a, *b = pair(param, lr)  # <-": "only plain names",
    "a, (b, c) = pair(param, lr)  # <-": "only plain names",
    "param.x = lr  # <-": "only plain names",
    "param[0] = lr  # <-": "only plain names",
    # statements
    "if param: pass  # <-": "write where",
    "while lr: pass  # <-": "'While'",
    "return param  # <-": "'Return'",
    "assert param  # <-": "'Assert'",
    "pass  # <-": "'Pass'",
    "del lr  # <-": "'Delete'",
    "global lr_  # <-": "'Global'",
    "import math  # <-": "'Import'",
    "raise ValueError  # <-": "'Raise'",
    "param  # <-": "'Expr'",
    "param = lr\n'a text in the middle'  # <-": "'Expr'",
    "with param: pass  # <-": "'With'",
    "def inner(): pass  # <-": "'FunctionDef'",
    "class Inner: pass  # <-": "'ClassDef'",
    # loops
    "for _ in param: pass  # <-": "for _ in range(<literal>)",
    "for _ in range(lr): pass  # <-": "for _ in range(<literal>)",
    "for _ in range(-3): pass  # <-": "for _ in range(<literal>)",
    "for _ in range(2.0): pass  # <-": "for _ in range(<literal>)",
    "for _ in range(True): pass  # <-": "for _ in range(<literal>)",
    "for _ in range(1, 3): pass  # <-": "for _ in range(<literal>)",
    "for _ in range(3, step=1): pass  # <-": "for _ in range(<literal>)",
    "for a, b in range(3): pass  # <-": "for _ in range(<literal>)",
    "for grad in range(3): pass  # <-": "'grad' has a value already",
    "for i in range(3):\n    param = param + i  # <-": "'i' has no value here",
    "for _ in range(3):\n    x = lr\nparam = x  # <-": "'x' has no value here",
    "for _ in range(3):\n    break  # <-": "'Break'",
    "for _ in range(3):\n    continue  # <-": "'Continue'",
    "for _ in range(3):\n    while lr: pass  # <-": "'While'",
}


@pytest.mark.parametrize("statements", STATEMENTS)
def test_a_construct_outside_the_language_is_refused_with_its_line(statements, tmp_path):
    text = (
        "@rule(state={'buffer': 0.0}, prepare=prepare)\n"
        "def bad(param, grad, buffer, lr, eps):\n"
        "    '''A docstring is fine.'''\n"
        f"{textwrap.indent(statements, '    ')}\n"
        "    return param\n"
    )
    check_refused(text, STATEMENTS[statements], tmp_path)


# Whole definitions.
DEFINITIONS = {
    "default": ("def bad(param, lr=1.0):  # <-\n    return param", "plain positional"),
    "keyword-only": ("def bad(param, *, lr):  # <-\n    return param", "plain positional"),
    "star": ("def bad(param, *lr):  # <-\n    return param", "plain positional"),
    "two-stars": ("def bad(param, **lr):  # <-\n    return param", "plain positional"),
    "no-return": ("def bad(param, lr):  # <-\n    param = lr", "ends in its one 'return'"),
    "no-body": ("def bad(param, lr):  # <-\n    '''Text.'''", "ends in its one 'return'"),
    "argument-from-nowhere": (
        "def bad(param, learning_rate):  # <-\n    return param",
        "argument 'learning_rate' is no element",
    ),
    "no-state": ("def bad(param, exp_avg):  # <-\n    return param", "argument 'exp_avg'"),
    "writes-gradient": (
        "def bad(param, grad):  # <-\n    grad = grad * param\n    return param, grad",
        "does not write the gradient",
    ),
    "sum-nobody-reads": (
        "def bad(param, grad):  # <-\n    total = grad * grad\n    return param, total",
        "nobody reads the sums ('total',)",
    ),
    "expression": (
        "def bad(param, lr):  # <-\n    return param * lr",
        "returns names, not expressions",
    ),
    "expressions": (
        "def bad(param, buffer):\n    return param, buffer * 0.5  # <-",
        "must be names",
    ),
    "twice": ("def bad(param, buffer):\n    return param, param  # <-", "returned twice"),
    "unknown-result": ("def bad(param, lr):\n    return x  # <-", "'x' has no value here"),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_rule_outside_the_language_is_refused_with_its_line(name, tmp_path):
    definition, message = DEFINITIONS[name]
    # The decorator is line one of the function: errors of the whole name the line of `def`.
    text = f"@rule(state={{'buffer': 0.0}}, prepare=prepare)\n{definition}\n"
    check_refused(text, message, tmp_path)


def test_a_prepare_and_earlier_stages_are_checked_too(tmp_path):
    body = "def bad(param, grad):\n    return param\n"
    prepare = "def wrong(step, lr):\n    rate = lr / step  # <-\n    return rate\n"
    check_refused(f"{prepare}@rule(state={{}}, prepare=wrong)\n{body}", "divide(a, b)", tmp_path)
    unstepped = "def wrong(lr):  # <-\n    return lr\n"
    check_refused(f"{unstepped}@rule(state={{}}, prepare=wrong)\n{body}", "'step'", tmp_path)
    stage = "def first(param, grad):\n    total = abs(grad)  # <-\n    return total\n"
    check_refused(
        f"{stage}@rule(state={{}}, prepare=prepare, after=(first,))\n{body}", "'abs'", tmp_path
    )
    called = "def helper(a):\n    b = a / 2.0  # <-\n    return b\n"
    calling = "@rule(state={}, prepare=prepare)\ndef bad(param):\n    return helper(param)\n"
    check_refused(called + calling, "divide(a, b)", tmp_path)


_BODY = "def bad(param, grad):\n    return param\n"
_ADVANCES = "def advances(step, lr, mu):\n    mu = mu * lr\n    return lr, mu\n"
_SQUARES = "def squares(grad):\n    total = grad * grad\n    return total\n"
TURNS = {
    "a turn reads an element": (
        f"{_SQUARES}def turn(grad):  # <-\n    level = grad\n    return level\n"
        f"@rule(state={{}}, prepare=prepare, after=((squares, turn),))\n{_BODY}",
        "argument 'grad' is no element, no per-tensor number",
    ),
    "a turn reads a scalar that prepare advances": (
        f"{_ADVANCES}{_SQUARES}def turn(mu):  # <-\n    level = mu\n    return level\n"
        f"@rule(state={{}}, scalars={{'mu': 1.0}}, prepare=advances, "
        f"after=((squares, turn),))\n{_BODY}",
        "argument 'mu'",
    ),
    "a scalar that nobody advances": (
        "def still(step, lr):  # <-\n    return lr\n"
        f"@rule(state={{}}, scalars={{'mu': 1.0}}, prepare=still)\n{_BODY}",
        "nobody returns the scalars ['mu']",
    ),
    "a scalar that is not taken": (
        "def lacks(step, lr):  # <-\n    mu = lr\n    return lr, mu\n"
        f"@rule(state={{}}, scalars={{'mu': 1.0}}, prepare=lacks)\n{_BODY}",
        "takes the scalars that it returns, ('mu',), last",
    ),
    "two new values": (
        f"{_ADVANCES}{_SQUARES}def turn(total):  # <-\n    mu = total\n    return mu\n"
        f"@rule(state={{}}, scalars={{'mu': 1.0}}, prepare=advances, "
        f"after=((squares, turn),))\n{_BODY}",
        "['mu'] have another new value already",
    ),
    "state that begins as nothing known": (
        "def still(step, lr):  # <-\n    return lr\n"
        f"@rule(state={{'z': 'params'}}, prepare=still)\n{_BODY}",
        "'z' begins as 'params'",
    ),
}


@pytest.mark.parametrize("name", TURNS)
def test_turns_and_scalars_are_checked(name, tmp_path):
    text, message = TURNS[name]
    check_refused(text, message, tmp_path)


def test_the_build_stops_with_the_line(tmp_path):
    path = tmp_path / "bad.py"
    text = "\n@rule(state={}, prepare=prepare)\ndef bad(param, lr):\n    param = param / lr\n"
    path.write_text(f"{RULES_HEAD}{text}    return param\nRULES = {{'bad': bad}}\n")
    line = path.read_text().splitlines().index("    param = param / lr") + 1
    output = tmp_path / "out.h"
    done = subprocess.run(
        [sys.executable, "-m", "pyupdate.kernels.emit_cpp", "--output", output, "--rules", path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert f"{path}:{line}: in bad: '/' is not in the language: write divide(a, b)" in done.stderr
    assert not output.exists()


def test_two_functions_of_one_name_are_not_emitted(tmp_path):
    text = """
        def maximum(a, b):
            return where(a > b, a, b)

        @rule(state={"exp_avg": 0.0}, prepare=prepare)
        def own(param, grad, exp_avg, lr):
            param = maximum(param, lr)
            exp_avg = grad
            return param, exp_avg
        RULES = {"own": own}
        """
    found = rules_of(text, tmp_path)
    shipped = {"adam_amsgrad": rules.adam_amsgrad}  # calls the language's own maximum
    with pytest.raises(ValueError, match="two functions are named 'maximum'"):
        emit_cpp.emit({**found, **shipped})


def test_the_table_knows_every_mend_of_the_checker():
    said = " ".join(STATEMENTS.values())
    for mend in grammar._MENDS.values():
        assert any(part in mend for part in STATEMENTS.values()), (mend, said)


RINGS = {
    "itself": (
        "def again(a):\n    return again(a) * a  # <-\n",
        "again calls again",
    ),
    "each other": (
        "def one(a):\n    return again(a)  # <-\n\ndef again(a):\n    return one(a) * a\n",
        "again calls one calls again",
    ),
}


@pytest.mark.parametrize("ring", RINGS)
def test_recursion_is_refused_with_its_line(ring, tmp_path):
    functions, said = RINGS[ring]
    body = "def bad(param, grad):\n    param = again(param)\n    return param\n"
    text = f"{functions}\n@rule(state={{}}, prepare=prepare)\n{body}"
    check_refused(text, f"recursion is not in the language ({said})", tmp_path)
