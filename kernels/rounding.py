# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding to bf16 and fp16, on whole arrays: one text for numpy and torch.

A value between two neighbours of the storage becomes the upper one with the probability of its
distance from the lower one, so that on average nothing is lost. What decides is no generator with a
state but a hash of (seed, step, parameter, stage, role, element): the same bits on every back end
and in every order. csrc/rounding.h is the same in C++; this says why.

What never moves by chance: a value that the storage holds exactly, inf and nan. Beyond the largest
finite value rounding is to nearest even, so only what overflows there is infinite here.

Integers are kept below 2**63 (numpy's and torch's are signed); bits are those of fp32, as int64.
"""

from __future__ import annotations

from typing import Any

_WORD = 0xFFFF_FFFF
_LONG = 0xFFFF_FFFF_FFFF_FFFF


def key_of(seed: int, step: int, parameter: int, stage: int, role: int) -> int:
    """64 bits that stand for one written role of one parameter in one step.

    Args:
        seed: the option.
        step: the step count that is made.
        parameter: its group's index x 2**32 + its position there.
        stage: of the rule.
        role: 0 for the parameter, 2 for the first state and so on, as in csrc/plan.h.
    """
    key = 0
    for word in (seed, step, parameter, stage << 8 | role):
        key = _mixed(key ^ word)
    return key


def _mixed(x: int) -> int:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014), its increment included."""
    x = (x + 0x9E37_79B9_7F4A_7C15) & _LONG
    x = ((x ^ (x >> 30)) * 0xBF58_476D_1CE4_E5B9) & _LONG
    x = ((x ^ (x >> 27)) * 0x94D0_49BB_1331_11EB) & _LONG
    return x ^ (x >> 31)


def draws(key: int, elements: Any) -> Any:
    """32 random bits for each element: two rounds of a 32-bit hash, each with half of the key.

    Two, because with one the draws of two keys would be the same ones in another order.

    Args:
        key: what `key_of` made.
        elements: int64 array of indices in the order of the parameter's memory.
    """
    low, high = elements & _WORD, elements >> 32
    first = _scrambled(low ^ (key & _WORD))
    return _scrambled(((first + _times(high, 0x9E37_79B9)) & _WORD) ^ (key >> 32))


def _scrambled(x: Any) -> Any:
    """A bijection of 32-bit words in which each bit moves all; the constants are Wellons' (2018).

    His "hash prospector" searched for them (lowbias32): bias 0.17 in 1000, the least it found.
    """
    x = x ^ (x >> 16)
    x = _times(x, 0x7FEB_352D)
    x = x ^ (x >> 15)
    x = _times(x, 0x846C_A68B)
    return x ^ (x >> 16)


def _times(x: Any, factor: int) -> Any:
    """The low 32 bits of a product of 32-bit words, by parts that fit in 48."""
    low, high = factor & 0xFFFF, factor >> 16
    return (x * low + (((x * high) & 0xFFFF) << 16)) & _WORD


def to_bf16(bits: Any, drawn: Any) -> Any:
    """Patterns of bf16, 0 to 65,535: what is cut off is 16 bits; so many are drawn and added."""
    magnitude = bits & 0x7FFF_FFFF
    nearest = 0x7FFF + ((bits >> 16) & 1)
    added = _where(magnitude > 0x7F7F_0000, nearest, drawn >> 16)
    rounded = ((bits + added) >> 16) & 0xFFFF
    return _where(magnitude > 0x7F80_0000, (bits >> 16) | 0x40, rounded)


def to_fp16(bits: Any, drawn: Any) -> Any:
    """Patterns of fp16, 0 to 65,535.

    Of a normal result 13 bits are cut off. One below 2**-14 is a multiple of 2**-24; what is left
    over of that is compared with 31 drawn bits, which is exact to 2**-31 of 2**-24.
    """
    sign, magnitude = (bits >> 16) & 0x8000, bits & 0x7FFF_FFFF
    nearest = 0xFFF + ((magnitude >> 13) & 1)
    added = _where(magnitude > 0x477F_E000, nearest, drawn >> 19)
    normal = (magnitude + added - 0x3800_0000) >> 13
    # magnitude = significand x 2**(exponent - 150), so in units of 2**-24 it is shifted by this.
    exponent = magnitude >> 23
    significand = (magnitude & 0x7F_FFFF) | ((exponent > 0) * 0x80_0000)
    shift = 126 - _where(exponent < 64, 64 + 0 * exponent, exponent)  # 62: nothing is left
    shift = _where(shift < 14, 14 + 0 * shift, shift)
    whole = significand >> shift
    left = ((significand - (whole << shift)) << 31) >> shift
    subnormal = whole + ((drawn >> 1) < left)
    finite = _where(magnitude < 0x3880_0000, subnormal, normal)
    special = _where(magnitude > 0x7F80_0000, 0x7E00 + 0 * bits, 0x7C00 + 0 * bits)
    return sign | _where(magnitude >= 0x477F_F000, special, finite)


def _where(condition: Any, a: Any, b: Any) -> Any:
    return b + (a - b) * condition
