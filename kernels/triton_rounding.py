# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding (kernels/rounding.py says what and why) in Triton, in unsigned integers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mixed(x):
    """SplitMix64's output function."""
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def key_of(seed, step, parameter, which: tl.constexpr):
    """64 bits for one written role of one parameter in one step; `which` is stage << 8 | role."""
    key = mixed(seed.to(tl.uint64))
    key = mixed(key ^ step.to(tl.uint64))
    key = mixed(key ^ parameter.to(tl.uint64))
    return mixed(key ^ which)


@triton.jit
def scrambled(x):
    """A bijection of 32-bit words in which each bit moves all."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def draw(key, element):
    """32 random bits for each element, by its int64 index in the row."""
    low = element.to(tl.uint32)
    high = (element >> 32).to(tl.uint32)
    first = scrambled(low ^ key.to(tl.uint32))
    return scrambled((first + high * 0x9E3779B9) ^ (key >> 32).to(tl.uint32))


@triton.jit
def by_chance(value, drawn, half: tl.constexpr):
    """fp32 values rounded up or down to bf16 or fp16 by drawn bits."""
    bits = value.to(tl.uint32, bitcast=True)
    if half == tl.bfloat16:
        patterns = bf16_patterns(bits, drawn)
    else:
        patterns = fp16_patterns(bits, drawn)
    return patterns.to(tl.uint16).to(half, bitcast=True)


@triton.jit
def bf16_patterns(bits, drawn):
    """What is cut off is 16 bits; so many are drawn and added."""
    magnitude = bits & 0x7FFFFFFF
    nearest = ((bits >> 16) & 1) + 0x7FFF
    added = tl.where(magnitude > 0x7F7F0000, nearest, drawn >> 16)
    return tl.where(magnitude > 0x7F800000, (bits >> 16) | 0x40, (bits + added) >> 16)


@triton.jit
def fp16_patterns(bits, drawn):
    """A normal result loses 13 bits; one below 2**-14 is a multiple of 2**-24."""
    magnitude = bits & 0x7FFFFFFF
    nearest = ((magnitude >> 13) & 1) + 0xFFF
    added = tl.where(magnitude > 0x477FE000, nearest, drawn >> 19)
    normal = (magnitude + added - 0x38000000) >> 13
    # magnitude = significand x 2**(exponent - 150); in units of 2**-24 it is shifted by this.
    exponent = magnitude >> 23
    significand = (magnitude & 0x7FFFFF) | tl.where(exponent > 0, 0x800000, 0).to(tl.uint32)
    bounded = tl.where(exponent < 64, 64, exponent).to(tl.uint64)  # 62: nothing is left
    shift = tl.where(bounded > 112, 14, 126 - bounded).to(tl.uint64)
    wide = significand.to(tl.uint64)
    whole = wide >> shift
    left = ((wide - (whole << shift)) << 31) >> shift
    up = tl.where((drawn >> 1).to(tl.uint64) < left, 1, 0).to(tl.uint64)
    finite = tl.where(magnitude < 0x38800000, (whole + up).to(tl.uint32), normal)
    special = tl.where(magnitude > 0x7F800000, 0x7E00, 0x7C00).to(tl.uint32)
    sign = (bits >> 16) & 0x8000
    return sign | tl.where(magnitude >= 0x477FF000, special, finite)
