# SPDX-License-Identifier: Apache-2.0
"""exp, log and power of prepare: near the exact values, and the same bits in every language."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest
from compiling import compiler, rules_of, shared_library
from scalar_truths import points

from pyupdate.kernels import emit_cpp, scalar
from pyupdate.kernels.bind import bind

NAMES = ("exp", "log", "power")


@pytest.mark.parametrize("name", NAMES)
def test_within_its_bound_of_the_exact_value(name):
    ours = getattr(scalar, name)
    for point in points(400):
        if point.name == name:
            error = point.error(ours(*point.arguments))
            assert error <= point.bound, (point, error)


SPECIAL = (0.0, -0.0, 1.0, 0.5, 2.0, 5e-324, 1.7e308, math.inf, math.nan)


def c_power(base: float, exponent: float) -> float:
    with np.errstate(all="ignore"):
        return float(np.power(np.float64(base), np.float64(exponent)))


def test_special_values_are_those_of_ieee_754():
    with np.errstate(all="ignore"):
        for x in (*SPECIAL, -1.0, -math.inf):
            # -0.0 ** -1.0 and the like are -inf in C: here every zero counts as positive.
            assert scalar.exp(x) == pytest.approx(float(np.exp(x)), rel=1e-15, nan_ok=True), x
            assert scalar.log(x) == pytest.approx(float(np.log(x)), rel=1e-15, nan_ok=True), x
            for base in SPECIAL:
                if base == 1.0 and x != x:  # C says 1, we keep the nan
                    assert math.isnan(scalar.power(base, x))
                    continue
                expected = abs(c_power(base, x))
                found = scalar.power(base, x)
                assert found == pytest.approx(expected, rel=1e-15, nan_ok=True), (base, x)
    assert scalar.power(-2.0, 0.0) == 1.0
    for exponent in (1.0, -3.0, 0.5, math.inf):
        assert math.isnan(scalar.power(-2.0, exponent))


def test_whole_powers_that_fp64_holds_are_exact():
    for base, exponent in ((2.0, 10), (2.0, -1074), (3.0, 33), (10.0, 22), (0.5, 30), (1.5, 20)):
        assert scalar.power(base, float(exponent)) == float(base) ** exponent


_TOYS = """
from pyupdate.kernels.scalar import exp, log, power

def prepare_toy(step, lr):
    a = exp(lr)
    b = log(step)
    c = power(step, lr)
    return a, b, c

@rule(state={}, prepare=prepare_toy)
def toy(param, grad, a, b, c):
    param = param - a * grad
    return param

RULES = {"toy": toy}
"""


@pytest.fixture(scope="module")
def arguments() -> list[tuple[float, float]]:
    rng = np.random.default_rng(72)
    drawn = [*rng.normal(0.0, 300.0, 500), *rng.normal(0.0, 1.0, 500), *SPECIAL, -1.0, -math.inf]
    sizes = [
        *np.exp2(rng.normal(0.0, 200.0, 500)),
        *rng.uniform(0.0, 2.0, 500),
        *SPECIAL,
        -1.0,
        0.9,
    ]
    return [(float(a), float(b)) for a, b in zip(sizes, drawn, strict=True)]


def test_compiled_they_give_the_bits_of_python(tmp_path, arguments):
    compiler()
    found = rules_of(_TOYS, tmp_path)
    (tmp_path / "rules_generated.h").write_text(emit_cpp.emit(found))
    library = shared_library(
        '#include "rules_generated.h"\nextern "C" void prepare(const double* n, double* h) '
        "{ pyupdate::rules::toy::prepare(n, h); }\n",
        tmp_path,
        *("-Wall", "-Wextra", "-Werror"),
    )
    for pair in arguments:
        out = (ctypes.c_double * 3)()
        library.prepare((ctypes.c_double * 2)(*pair), out)
        np.testing.assert_array_equal(list(out), found["toy"].prepare.text(*pair), str(pair))


def test_bound_to_numpy_they_give_the_bits_of_python(arguments):
    base, exponent = np.array(arguments).T
    with np.errstate(all="ignore"):
        for name, columns in (("exp", [exponent]), ("log", [base]), ("power", [base, exponent])):
            found = bind(getattr(scalar, name), "numpy")(*columns)
            assert found.dtype == np.float64
            expected = [getattr(scalar, name)(*row) for row in zip(*columns, strict=True)]
            np.testing.assert_array_equal(found, expected, name)
