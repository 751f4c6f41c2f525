# SPDX-License-Identifier: Apache-2.0
"""Functions of fp64 numbers that `prepare` may use, written in the rule language.

Not libm: its power differs from repeated squaring in three of four fp64 cases, and nvcc's contracts
whatever the flags, so only a text of our own gives every back end the same bits.

`exp` and `log` are within 0.6 units in the last place, `power` within 1.5 (0.7 for results from
1e-100 to 1e100); subnormal results round twice. They work in double-double, a number as an
unevaluated sum of two: Dekker 1971, "A floating-point technique for extending the available
precision"; the exact sum is Knuth's. A power by a plain logarithm would be off by 700.
"""

from __future__ import annotations

from .language import absolute, divide, sqrt, where


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


# ----- double-double ------------------------------------------------------------------------------


def two_sum(a: float, b: float) -> tuple[float, ...]:
    """a + b, and exactly what its rounding left out."""
    total = a + b
    of_b = total - a
    rest = (a - (total - of_b)) + (b - of_b)
    return total, rest


def upper_half(a: float) -> float:
    """The upper 26 bits of a number below 2^996."""
    # 2^27 + 1 in two literals, as fp32 does not hold it.
    scaled = a * (134217728.0 + 1.0)
    return scaled - (scaled - a)


def two_product(a: float, b: float) -> tuple[float, ...]:
    """a * b, and exactly what its rounding left out, while nothing over- or underflows."""
    product = a * b
    a_upper = upper_half(a)
    b_upper = upper_half(b)
    a_lower = a - a_upper
    b_lower = b - b_upper
    rest = a_upper * b_upper - product
    rest = ((rest + a_upper * b_lower) + a_lower * b_upper) + a_lower * b_lower
    return product, rest


# ----- log, exp, power ----------------------------------------------------------------------------
#       ln 2 = 0.6931471824645996 - 1.9046542121259336e-09 - 8.78318373858934e-17 to 2^-78, in
#       literals of 20, 20 and 24 bits: a whole number of up to 11 bits times each of them is exact.


def log_pair(x: float) -> tuple[float, ...]:
    """ln x in double-double; ln 1 where x is not a finite number above zero.

    x = m 2^e with m in [3/4, 3/2);  f = (m - 1) / (m + 1);  ln m = 2 f (1 + f^2/3 + f^4/5 + ...)
    """
    m = where(x > 0.0, where(x - x == 0.0, x, 1.0), 1.0)
    e = m - m  # a zero of the type of m
    for _ in range(17):  # times 2^64 until m >= 1; the smallest number is 2^-1074
        e = where(m < 1.0, e - 64.0, e)
        m = where(m < 1.0, m * 18446744073709551616.0, m)
    for _ in range(15):
        e = where(m < 18446744073709551616.0, e, e + 64.0)
        m = where(m < 18446744073709551616.0, m, divide(m, 18446744073709551616.0))
    size = 4294967296.0
    count = 32.0
    for _ in range(6):  # by 2^32, 2^16, 2^8, 2^4, 2^2, 2
        e = where(m < size, e, e + count)
        m = where(m < size, m, divide(m, size))
        size = sqrt(size)
        count = count * 0.5
    e = where(m < 1.5, e, e + 1.0)
    m = where(m < 1.5, m, m * 0.5)

    over = m - 1.0  # exact
    under, under_rest = two_sum(m, 1.0)
    f = divide(over, under)
    product, rest = two_product(f, under)
    f_rest = divide(((over - product) - rest) - f * under_rest, under)

    square, square_rest = two_product(f, f)
    square_rest = square_rest + f * f_rest * 2.0
    third = divide(square, 3.0)
    product, rest = two_product(third, 3.0)
    third_rest = divide(((square - product) - rest) + square_rest, 3.0)
    # f^4/5 + f^6/7 + ... in plain fp64: at most 0.00036, so its roundings are below 2^-64.
    tail = divide(1.0, 35.0)
    odd = 33.0
    for _ in range(15):
        tail = tail * square + divide(1.0, odd)
        odd = odd - 2.0
    series, series_rest = two_sum(third, tail * square * square)
    series_rest = series_rest + third_rest

    product, rest = two_product(f, series)
    rest = rest + f * series_rest + f_rest * series + f_rest
    half, half_rest = two_sum(f, product)
    half_rest = half_rest + rest

    of_e, of_e_rest = two_sum(e * 0.6931471824645996, e * -1.9046542121259336e-09)
    of_e_rest = of_e_rest + e * -8.78318373858934e-17
    log_x, rest = two_sum(of_e, half * 2.0)
    rest = rest + (of_e_rest + half_rest * 2.0)
    log_x, log_x_rest = two_sum(log_x, rest)
    return log_x, log_x_rest


def exp_pair(x: float, x_rest: float) -> float:
    """e^(x + x_rest) for x_rest far below x, rounded to fp64; 0 or inf where it is.

    x = n ln 2 + r with |r| <= 0.35;  e^x = 2^n (1 + r + r^2/2 (1 + r/3 (1 + r/4 (...))))
    """
    low = where(x < -746.0, 0.0, where(x > 710.0, 0.0, x_rest))
    bounded = where(x < -746.0, -746.0, where(x > 710.0, 710.0, x))
    # The nearest whole number, as in integer_power; 1.5 * 2^52 serves both signs.
    n = (bounded * 1.4426950216293335 + 6755399441055744.0) - 6755399441055744.0
    r, r_rest = two_sum(bounded - n * 0.6931471824645996, n * 1.9046542121259336e-09)
    r, r_rest = two_sum(r, r_rest + (n * 8.78318373858934e-17 + low))
    series = 1.0
    k = 15.0
    for _ in range(13):
        series = 1.0 + divide(r, k) * series
        k = k - 1.0
    bend, bend_rest = two_sum(r, r * r * 0.5 * series)
    value, value_rest = two_sum(1.0, bend)
    value = value + (value_rest + (bend_rest + (r_rest + r * r_rest)))
    # 2^n in two halves, as 2^1024 and 2^-1075 are not numbers; the first multiplication is exact.
    half = (n * 0.5 + 6755399441055744.0) - 6755399441055744.0
    base = where(n < 0.0, 0.5, (n - n) + 2.0)  # not two literals: numpy would choose fp32
    value = value * integer_power(base, absolute(half))
    return value * integer_power(base, absolute(n - half))


def exp(x: float) -> float:
    """e^x."""
    return exp_pair(x, 0.0)


def log(x: float) -> float:
    """ln x; -inf at zero, nan below it."""
    log_x, log_rest = log_pair(x)
    at_zero = where(x == 0.0, divide(-1.0, 0.0), divide(x - x, x - x))
    return where(x > 0.0, where(x - x == 0.0, log_x + log_rest, x), at_zero)


def power(base: float, exponent: float) -> float:
    """base ** exponent for a base from zero on; nan for a negative one, but 1 to the power of 0."""
    log_base, log_rest = log_pair(base)
    # Beyond 2^64 only a base of exactly 1 has a power that is neither 0 nor inf.
    y = where(exponent > 18446744073709551616.0, 18446744073709551616.0, exponent)
    y = where(y < -18446744073709551616.0, -18446744073709551616.0, y)
    product, rest = two_product(y, log_base)
    finite = exp_pair(product, rest + y * log_rest)
    infinity = divide(1.0, 0.0)
    at_zero = where(exponent > 0.0, 0.0, infinity)
    at_infinity = where(exponent > 0.0, base, where(exponent < 0.0, 0.0, exponent))
    positive = where(base - base == 0.0, finite, at_infinity)
    known = where(base > 0.0, positive, where(base == 0.0, at_zero, divide(0.0, 0.0)))
    return where(exponent == 0.0, 1.0, where(exponent != exponent, exponent, known))
