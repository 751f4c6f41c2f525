# SPDX-License-Identifier: Apache-2.0
"""Functions of one fp64 number that `prepare` may use, written in the rule language.

Not libm: its power differs from repeated squaring in three of four fp64 cases, and nvcc's contracts
whatever the flags, so only a text of our own gives every back end the same bits.
"""

from __future__ import annotations

from .language import where


def integer_power(base: float, exponent: float) -> float:
    """base ** exponent for a whole exponent in [0, 2**53), by binary exponentiation.

    The nearest whole number to x in [0, 2**51] is (x + 2**52) - 2**52 in fp64.
    """
    result = 1.0
    for _ in range(53):
        half = exponent * 0.5
        whole = (half + 4503599627370496.0) - 4503599627370496.0
        whole = where(whole > half, whole - 1.0, whole)
        result = where(exponent - whole * 2.0 != 0.0, result * base, result)
        base = base * base
        exponent = whole
    return result
