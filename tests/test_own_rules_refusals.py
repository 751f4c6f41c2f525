# SPDX-License-Identifier: Apache-2.0

"""What `pyupdate.rule`, `from_rule` and `build` refuse of a user's rule, in words with the line."""

from __future__ import annotations

import functools
import math
import re

import pytest
import torch
from own_rules import (
    descent,
    signum,
)

import pyupdate
from pyupdate.language import RuleError, exp, integer_power, log, power
from pyupdate.optim import from_rule


@pytest.mark.parametrize(
    ("numbers", "kind", "message"),
    [
        ({}, TypeError, "from_rule(signum): number 'lr' has no default: give lr=..., or defaults"),
        ({"lr": 0.1}, TypeError, "number 'weight_decay' has no default"),
        ({"lr": "0.1", "weight_decay": 0.0}, TypeError, "'lr' must be a number, but is '0.1'"),
        ({"lr": torch.ones(2), "weight_decay": 0.0}, TypeError, "but is a tensor of (2,)"),
        ({"lr": float("nan"), "weight_decay": 0.0}, ValueError, "number 'lr' is nan"),
        ({"lr": 0.1, "wd": 0.0}, TypeError, "takes no 'wd'; its numbers are: lr, beta, weight"),
    ],
)
def test_a_constructor_refuses_what_is_no_number_of_the_rule(numbers, kind, message):
    with pytest.raises(kind) as caught:
        from_rule(signum)([torch.nn.Parameter(torch.ones(1))], **numbers)
    assert message in str(caught.value)


def test_a_later_group_is_checked_and_not_added():
    a, b = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = from_rule(descent)([{"params": [a], "lr": 0.1}])
    with pytest.raises(TypeError, match="number 'lr' has no default"):
        optimizer.add_param_group({"params": [b]})
    assert len(optimizer.param_groups) == 1


def line_of(function) -> int:
    return function.__code__.co_firstlineno


def taken(param, max_norm):
    return param


def undefined(param, state, lr):
    return param


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: from_rule(taken), TypeError, "got a function: decorate it with pyupdate.rule"),
        (lambda: from_rule("signum"), TypeError, "from_rule takes a pyupdate.rule, but got a str"),
        (lambda: from_rule(pyupdate.rule(taken)), ValueError, "['max_norm'] have names that every"),
        (lambda: signum(1.0, 2.0), TypeError, "pyupdate.optim.from_rule(signum)"),
        (lambda: pyupdate.rule(3), TypeError, "takes plain functions, but got a int"),
        (lambda: pyupdate.rule(len), TypeError, "takes plain functions"),
        (lambda: pyupdate.rule(state={"a": []}), TypeError, "state['a'] must be a number"),
        (
            lambda: pyupdate.rule(state={"momentum": "mu"})(taken),
            RuleError,
            "'momentum' begins as 'mu', which is none of the numbers ('max_norm',)",
        ),
        (
            lambda: pyupdate.rule(state={"ema": 0.0})(taken),
            RuleError,
            "state cannot be named 'ema'",
        ),
        (
            lambda: pyupdate.rule(state={"mistyped": 0.0})(taken),
            RuleError,
            "state ['mistyped'] is taken by no function",
        ),
        (
            lambda: pyupdate.rule(state={"step": 0.0})(taken),
            RuleError,
            f"test_own_rules_refusals.py:{line_of(taken)}: in taken: state cannot be named 'step'",
        ),
        (
            lambda: pyupdate.rule(defaults={"mu": 0.5})(undefined),
            RuleError,
            f"test_own_rules_refusals.py:{line_of(undefined)}: in undefined: defaults: 'mu' is "
            "no number of this rule; there are: state, lr",
        ),
        (
            lambda: pyupdate.rule(defaults={"lr": None})(undefined),
            TypeError,
            "defaults['lr'] must be a number, but is None",
        ),
    ],
)
def test_what_is_no_rule_is_refused(make, kind, message):
    with pytest.raises(kind) as caught:
        make()
    assert message in str(caught.value)


def wrapped(function):
    @functools.wraps(function)
    def inner(param, lr):
        return function(param, lr)

    return inner


@wrapped
def behind_another(param, lr):
    return param


async def later(param, lr):
    return param


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (behind_another, "another decorator wraps this function"),
        (lambda param: param, "is a function made by 'def'"),
        (later, "is a function made by 'def'"),
    ],
)
def test_a_function_whose_text_is_not_what_runs_is_refused_with_its_line(function, message):
    with pytest.raises(RuleError) as caught:
        pyupdate.rule(function)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{__file__}:{line_of(function)}: in ")


def test_a_rule_without_a_readable_text_is_refused():
    made: dict = {}
    exec("def descent(param, lr):\n    return param\n", made)
    with pytest.raises(RuleError, match=r"<string>:1: in descent: .* write it in a file"):
        pyupdate.rule(made["descent"])
    # A file of that name and line exists, but another function stands there.
    exec(compile("def hidden(param, lr):\n    return param\n", __file__, "exec"), made)
    with pytest.raises(RuleError, match="in hidden: the text of this function cannot be read"):
        pyupdate.rule(made["hidden"])


def test_a_number_with_a_reserved_name_is_refused_with_its_line():
    def text(param, grad, lr, accumulated):
        param = param - lr * accumulated * grad
        return param  # noqa: RET504

    line = text.__code__.co_firstlineno
    with pytest.raises(RuleError, match=rf"{line}.*\['accumulated'\] have names that every"):
        pyupdate.rule(text)


# ----- functions of float64 numbers, on elements --------------------------------------------------


def by_exp(param, grad, lr):
    param = param - lr * exp(grad)
    return param  # noqa: RET504


def by_log(param, grad, lr):
    size = grad * grad
    param = param - lr * log(size)
    return param  # noqa: RET504


def by_power(param, grad, lr):
    param = power(grad, lr)
    return param  # noqa: RET504


def by_whole_power(param, grad, step):
    param = integer_power(grad, step)
    return param  # noqa: RET504


def softplus(x):
    return log(1.0 + exp(x))


def by_a_function(param, grad, lr):
    param = param - lr * softplus(grad)
    return param  # noqa: RET504


def total(param, grad):
    size = exp(grad)
    return size  # noqa: RET504


def by_total(param, grad, size, lr):
    param = param - lr * size * grad
    return param  # noqa: RET504


@pytest.mark.parametrize(
    ("make", "function", "line", "name"),
    [
        (pyupdate.rule, by_exp, 1, "exp"),
        (pyupdate.rule, by_log, 2, "log"),
        (pyupdate.rule, by_power, 1, "power"),
        (pyupdate.rule, by_whole_power, 1, "integer_power"),
        (lambda _: pyupdate.rule(by_a_function), softplus, 1, "(log|exp)"),
        (lambda _: pyupdate.rule(after=(total,))(by_total), total, 1, "exp"),
    ],
)
def test_float64_functions_of_elements_are_refused_with_the_line(make, function, line, name):
    with pytest.raises(RuleError) as caught:
        make(function)
    where = f"{__file__}:{line_of(function) + line}: in {function.__name__}: "
    assert str(caught.value).startswith(where)
    words = rf"{name} is for numbers in float64, .* in the prepare or in a turn"
    assert re.search(words, str(caught.value))


def test_float64_functions_are_taken_in_a_prepare_and_in_a_turn():
    def prepare(step, lr):
        rate = exp(lr) * power(lr, 2.0)
        return rate  # noqa: RET504

    def squares(param, grad):
        squared = grad * grad
        return squared  # noqa: RET504

    def turn(squared):
        size = log(squared)
        return size  # noqa: RET504

    def by_turn(param, grad, size, rate):
        param = param - rate * size
        return param  # noqa: RET504

    param = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    param.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    made = pyupdate.rule(prepare=prepare, after=((squares, turn),))(by_turn)
    from_rule(made)([param], lr=0.5).step()
    expected = -math.exp(0.5) * 0.25 * math.log(25.0)
    assert param.tolist() == pytest.approx([expected] * 2, rel=1e-15)


# ----- every error has file and line --------------------------------------------------------------


def plain(param, grad, momentum, lr):
    momentum = grad
    param = param - lr * momentum
    return param, momentum


def takes_grad(step, lr, grad):
    return lr, grad


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: pyupdate.rule(state=["momentum"]), TypeError, "state must be a dict of name"),
        (lambda: pyupdate.rule(scalars=3), TypeError, "scalars must be a dict of name"),
        (lambda: pyupdate.rule(defaults="lr"), TypeError, "defaults must be a dict of name"),
        (lambda: pyupdate.rule(state={"momentum": math.nan}), RuleError, "'momentum'] is nan"),
        (lambda: pyupdate.rule(state={"momentum": None}), TypeError, "must be a number"),
        (lambda: pyupdate.rule(prepare=3)(plain), TypeError, "got a int: 3"),
        (lambda: pyupdate.rule(type("f", (), {})), TypeError, "plain functions, but got a type"),
        (lambda: pyupdate.rule(defaults={"lr": "x"})(undefined), TypeError, "must be a number"),
    ],
)
def test_a_bad_argument_of_the_decorator_is_named_with_its_line(make, kind, message):
    with pytest.raises(kind) as caught:
        make()
    assert str(caught.value).startswith(f"{__file__}:{line_of(make)}: pyupdate.rule")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("make", "function", "message"),
    [
        (
            lambda: pyupdate.rule(state={"momentum": "a"})(plain),
            plain,
            "'momentum' begins as 'a', which is none of the numbers ('lr',)",
        ),
        (
            lambda: pyupdate.rule(state={"momentum": 0.0}, prepare=takes_grad)(plain),
            takes_grad,
            "a prepare runs once a step, before there are elements, but takes ['grad']",
        ),
    ],
)
def test_what_is_wrong_between_functions_has_a_line_of_one(make, function, message):
    with pytest.raises(RuleError) as caught:
        make()
    start = f"{__file__}:{line_of(function)}: in {function.__name__}: "
    assert str(caught.value).startswith(start + message)
