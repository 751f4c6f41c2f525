# SPDX-License-Identifier: Apache-2.0
"""What exp, log and power must give, from mpmath at 300 bits, and how far off one may be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import mpmath
import numpy as np

# Units in the last place; 0.5 is the rounding of the result itself.
EXP, LOG, POWER, POWER_FAR = 0.6, 0.6, 0.7, 1.5


class Point(NamedTuple):
    """Arguments, the exact result as two fp64 numbers, and the bound on the error."""

    name: str
    arguments: tuple[float, ...]
    exact: float
    rest: float
    bound: float

    def error(self, found: float) -> float:
        """Units in the last place."""
        if found == self.exact == math.inf:
            return 0.0
        error: float = abs((found - self.exact) - self.rest) / math.ulp(self.exact)
        return error if math.isfinite(error) else math.inf


def _point(name: str, arguments: tuple[float, ...]) -> Point:
    with mpmath.workprec(300):
        wide = [mpmath.mpf(argument) for argument in arguments]
        exact: Any = {"exp": mpmath.exp, "log": mpmath.log, "power": mpmath.power}[name](*wide)
        nearest = float(exact)
        bound = {"exp": EXP, "log": LOG, "power": POWER}[name]
        if name == "power" and not 1e-100 < nearest < 1e100:
            bound = POWER_FAR
        if nearest < 2.3e-308 and name != "log":
            bound = 1.5  # rounded twice
        rest = 0.0 if math.isinf(nearest) else float(exact - mpmath.mpf(nearest))
        return Point(name, arguments, nearest, rest, bound)


@cache
def points(n: int) -> tuple[Point, ...]:
    """n points of each function, over all that fp64 holds."""
    return tuple(_points(np.random.default_rng(71), n))


def _points(rng: np.random.Generator, n: int) -> Iterator[Point]:
    edges = (0.0, 1.0, -1.0, 709.78, 709.79, 800.0, -744.4, -745.2, -746.5, 5e-324, -1e-300)
    spread = [*edges, *rng.uniform(-745.0, 709.7, n), *rng.normal(0.0, 1.0, n)]
    for x in spread:
        yield _point("exp", (float(x),))
    binades = np.exp2(rng.integers(-1070, 1023, n)) * rng.uniform(1.0, 2.0, n)
    for x in (1.0, 5e-324, 1.7e308, 0.75, 1.5, 2.0, *binades, *rng.uniform(0.5, 2.0, n)):
        yield _point("log", (float(x),))
    for base in (0.96, 0.5, 2.0, 1.0, *rng.uniform(0.0, 3.0, n), *binades[: n // 2]):
        most = 700.0 / max(abs(math.log(base)), 0.1)
        for exponent in (0.5, -3.0, *rng.uniform(-most, most, 2), *rng.normal(0.0, 1.0, 1)):
            yield _point("power", (float(base), float(exponent)))


def log_pairs(n: int) -> Iterator[tuple[float, float, float]]:
    """x, and ln x as two fp64 numbers."""
    for point in points(n):
        if point.name == "log":
            yield point.arguments[0], point.exact, point.rest
