# SPDX-License-Identifier: Apache-2.0
"""The one reduction order (csrc/reduce.h) in Triton, and numbers that stand in tensors of one.

Every joining is of two values by an explicit reshape, so the order is the contract's whatever the
compiler makes of a reduction: lanes by a halving tree in registers, chunks and rows by a halving
tree in place in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bind import bind
from .rules import larger

larger_of = bind(larger, "triton")


@triton.jit
def sum_of(a, b):
    """How the 2-norm and a rule's sums join two numbers."""
    return a + b


@triton.jit
def joined(a, b, is_largest: tl.constexpr):
    """The sum of two, or the larger of them for the inf norm."""
    if is_largest:
        return larger_of(a, b)
    else:
        return sum_of(a, b)


@triton.jit
def tree_of_lanes(lanes, is_largest: tl.constexpr):
    """The one number of 2,048 lanes, in fp64."""
    x = lanes.to(tl.float64)
    for level in tl.static_range(11):
        # Pairs only: element i of the first half with element i of the second.
        pairs = tl.reshape(x, (2, 1024 >> level))
        if is_largest:
            x = tl.reduce(pairs, 0, larger_of)
        else:
            x = tl.reduce(pairs, 0, sum_of)
    return tl.sum(x, 0)  # of one


@triton.jit
def tree_in_place(x, begin, count, is_largest: tl.constexpr, block: tl.constexpr):
    """Join x[begin], ..., x[begin + count - 1] into x[begin] and return it; 0 of none.

    All threads of the program take part: a barrier stands between two levels.
    """
    half = tl.full((), 1, tl.int64)
    while half < count:
        half *= 2
    half = half // 2
    left = half * 0 + count  # of int64
    while half > 0:
        for start in range(0, left - half, block):
            i = start + tl.arange(0, block)
            inside = i + half < left
            at = x + begin + i
            upper = tl.load(at + half, inside, other=0.0)
            tl.store(at, joined(tl.load(at, inside, other=0.0), upper, is_largest), inside)
        tl.debug_barrier()
        left = min(left, half)
        half = half // 2
    return tl.load(x + begin, count > 0, other=0.0)


@triton.jit
def load_number(address):
    """The number of a tensor of one, whose address has 1 added where it is fp64 and not fp32."""
    is_wide = (address & 1) != 0
    exists = address != 0
    wide = (address - 1).to(tl.pointer_type(tl.float64))
    narrow = address.to(tl.pointer_type(tl.float32))
    of_wide = tl.load(wide, is_wide & exists, other=0.0)
    of_narrow = tl.load(narrow, (is_wide == 0) & exists, other=0.0)
    return tl.where(is_wide, of_wide, of_narrow.to(tl.float64))


@triton.jit
def store_number(address, value, wanted):
    """The other way, where it is wanted and there is such a tensor."""
    is_wide = (address & 1) != 0
    exists = (address != 0) & wanted
    tl.store((address - 1).to(tl.pointer_type(tl.float64)), value, is_wide & exists)
    narrow = address.to(tl.pointer_type(tl.float32))
    tl.store(narrow, value.to(tl.float32), (is_wide == 0) & exists)
