# SPDX-License-Identifier: Apache-2.0
"""What the language means: IEEE primitives, exact powers, and C++ that gives the bits of Python."""

from __future__ import annotations

import ctypes
import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from compiling import compiler, rules_of, shared_library

from pyupdate.kernels import emit_cpp, rules
from pyupdate.kernels.bind import bind
from pyupdate.kernels.families import decay
from pyupdate.kernels.language import analyse, divide, maximum, minimum, named_results, sqrt
from pyupdate.kernels.scalar import integer_power

# ----- the primitives on Python floats are IEEE's -------------------------------------------------

SPECIAL = [0.0, -0.0, 1.0, -3.0, 5e-324, -5e-324, 1e308, math.inf, -math.inf, math.nan]


def same(a: float, b: float) -> bool:
    """Equal, with the sign of zero, or both nan."""
    return (a != a and b != b) or (a == b and math.copysign(1.0, a) == math.copysign(1.0, b))


def test_primitives_on_special_values():
    with np.errstate(all="ignore"):
        for a in SPECIAL:
            assert same(sqrt(a), float(np.sqrt(np.float64(a)))), a
            for b in SPECIAL:
                assert same(divide(a, b), float(np.float64(a) / np.float64(b))), (a, b)
                larger, smaller = np.maximum(a, b), np.minimum(a, b)  # nan if either is
                assert maximum(a, b) == larger or (math.isnan(larger) and math.isnan(maximum(a, b)))
                assert minimum(a, b) == smaller or (
                    math.isnan(smaller) and math.isnan(minimum(a, b))
                )


# ----- integer_power ------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [0.9, 0.999, 0.95, 0.5, 1.0, 0.0, 1.5, 1.0 - 2.0**-53])
@pytest.mark.parametrize("exponent", [0, 1, 2, 3, 7, 10, 63, 1000, 1023])
def test_integer_power_is_within_its_roundings_of_the_exact_power(base, exponent):
    found = integer_power(base, float(exponent))
    exact = Fraction(base) ** exponent
    if exponent == 0 or base in (0.0, 1.0):
        assert found == exact
        return
    # Each of e - 1 multiplications may be off by half a last place: (1 + 2^-53)^(e - 1).
    slack = exact * ((1 + Fraction(1, 2**53)) ** (exponent - 1) - 1)
    assert abs(Fraction(found) - exact) <= slack


def test_integer_power_of_large_exponents():
    assert integer_power(2.0, 1023.0) == 2.0**1023
    assert integer_power(-1.0, 2.0**53 - 1.0) == -1.0
    assert integer_power(1.0, 2.0**53 - 1.0) == 1.0
    assert integer_power(0.5, 2000.0) == 0.0
    # (1 - 1/n)^n with n = 2^40 is 1/e (1 - 1/(2n)), and 2 log2(n) roundings double at each square.
    n = 2.0**40
    assert integer_power(1.0 - 1.0 / n, n) == pytest.approx(math.exp(-1.0), rel=n * 2.0**-52)


# ----- what is emitted ----------------------------------------------------------------------------

_LOOP = """
def turn_by_turn(x, turn):
    for _ in range(3):
        turn = turn * x
        y = turn + x
        for _ in range(2):
            x = x * 0.5 + y
    return divide(turn - x, 3.0)

def swapped(x, y):
    a, b = pair(x, y)
    b, a = pair(b, a)
    return a - b * -2.0

def chosen(x, y):
    return where(x < y, where(x != x, 1.0, sqrt(y)), maximum(x, half(y)))

@rule(state={}, prepare=prepare)
def toy(param, grad, lr):
    param = turn_by_turn(param, lr)
    lr = swapped(param, grad)
    grad = chosen(lr, grad)
    param = param + grad
    return param

RULES = {"toy": toy}
"""


def test_emitted_functions_give_the_bits_of_python(tmp_path):
    compiler()
    found = rules_of(_LOOP, tmp_path)
    header = emit_cpp.emit({**rules.RULES, **found})
    (tmp_path / "rules_generated.h").write_text(header)
    calls = {call.name: call for call in analyse(found["toy"].stages[0].function.text).calls}
    calls |= {"multiplier": analyse(rules.multiplier), "nonfinite": analyse(rules.nonfinite)}
    calls |= {"integer_power": analyse(integer_power)}
    exported = "".join(
        f'extern "C" double call_{name}(const double* x) {{ return pyupdate::text::{name}<double>('
        f"{', '.join(f'x[{i}]' for i in range(len(call.arguments)))}); }}\n"
        for name, call in calls.items()
    )
    library = shared_library('#include "rules_generated.h"\n' + exported, tmp_path)
    rng = np.random.default_rng(61)
    values = [*SPECIAL, *rng.standard_normal(200).tolist()]
    for name, call in calls.items():
        compiled = getattr(library, f"call_{name}")
        compiled.restype = ctypes.c_double
        for _ in range(500):
            arguments = rng.choice(values, len(call.arguments)).tolist()
            if name == "integer_power":  # a whole number
                arguments[1] = float(rng.integers(0, 200))
            expected = call.text(*arguments)
            got = compiled((ctypes.c_double * len(arguments))(*arguments))
            assert same(got, expected), (name, arguments, got.hex(), expected.hex())


@pytest.mark.parametrize("name", rules.RULES)
def test_prepare_gives_the_bits_of_python_when_compiled(name, tmp_path):
    compiler()
    rule = rules.RULES[name]
    (tmp_path / "rules_generated.h").write_text(emit_cpp.emit({name: rule}))
    library = shared_library(
        '#include "rules_generated.h"\nextern "C" void prepare(const double* n, double* h) '
        f"{{ pyupdate::rules::{name}::prepare(n, h); }}\n",
        tmp_path,
    )
    rng = np.random.default_rng(62)
    for step in [1, 2, 3, 6, 999, 100_000, 2**24 + 1, 2**53 - 1]:
        taken = len(rule.numbers) + len(rule.counted)
        numbers = [float(step), *rng.uniform(0.0, 1.0, taken).tolist()]
        out = (ctypes.c_double * (len(rule.hypers) + len(rule.counted)))()
        library.prepare((ctypes.c_double * len(numbers))(*numbers), out)
        made = named_results(rule.prepare, rule.prepare.text(*numbers))
        expected = [made[name] for name in (*rule.hypers, *rule.counted)]
        assert all(map(same, out, expected)), step


def test_a_header_says_what_it_was_written_from(tmp_path):
    toys = rules_of(_LOOP, tmp_path)
    said = emit_cpp.emit({"sgd": rules.sgd, **toys}).partition("#pragma")[0]
    listed = [line.removeprefix("//   ") for line in said.splitlines() if line.startswith("//   ")]
    assert listed == [
        "bad.py",
        *("kernels/families/decay.py", "kernels/families/sgd.py"),
        *("kernels/language.py", "kernels/rules.py"),
    ]


def test_bound_functions_find_what_an_import_looks_for():
    # Torch's first comparison of a tensor with a number imports from within the bound function.
    code = (
        "import torch\n"
        "from pyupdate.kernels.bind import bind\n"
        "from pyupdate.kernels.families.decay import coupled_decay\n"
        "x = torch.ones(2)\n"
        "print(bind(coupled_decay, 'torch')(x, x, torch.tensor(0.5)).tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "[1.5, 1.5]\n", done.stderr
    assert "__builtins__" in bind(decay.coupled_decay, "torch").__globals__


_LITERALS = """
@rule(state={}, prepare=prepare)
def toy(param, grad, lr):
    size = where(grad > 0.0, 1.5, where(grad < -1.0, 2, 0.75))
    param = param - lr * grad * size
    return param

RULES = {"toy": toy}
"""


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_a_choice_between_literals_keeps_the_compute_type(kind, tmp_path):
    text = rules_of(_LITERALS, tmp_path)["toy"].stages[0].function.text
    rng = np.random.default_rng(63)
    param, grad = (rng.standard_normal(10_000).astype(kind) for _ in range(2))
    lr = kind(0.1)
    size = np.where(grad > 0, kind(1.5), np.where(grad < -1, kind(2), kind(0.75)))
    expected = param - lr * grad * size
    found = bind(text, "numpy")(param, grad, lr)
    assert found.dtype == kind
    assert np.array_equal(found, expected)
    before = torch.get_default_dtype()
    try:
        for default in (torch.float32, torch.float64):
            torch.set_default_dtype(default)
            rate = torch.from_numpy(np.array(lr))
            tensors = torch.from_numpy(param), torch.from_numpy(grad), rate
            found = bind(text, "torch")(*tensors).numpy()
            assert found.dtype == kind
            assert np.array_equal(found, expected)
    finally:
        torch.set_default_dtype(before)
