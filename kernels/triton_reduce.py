# SPDX-License-Identifier: Apache-2.0
"""The reduce pass in Triton: a program is one chunk of one row, and leaves a number and a flag.

Element i of the chunk goes to lane i mod 2,048, and the lanes are joined by triton_order.py: the
bits are the contract's (csrc/reduce.h).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bind import bind
from .rules import magnitude, nonfinite, squared
from .triton_order import joined, tree_of_lanes
from .triton_passes import CHUNK, DIVISOR, FIRST_CHUNK, SIZE, UNSCALE, WIDTH, loaded

squared_of = bind(squared, "triton")
magnitude_of = bind(magnitude, "triton")
nonfinite_of = bind(nonfinite, "triton")


@triton.jit
def unscale_of(request, scale, is_scaled: tl.constexpr):
    """What gradients are multiplied by before the norm, in fp64; 1 / scale as torch rounds it."""
    unscale = tl.load(request + UNSCALE)
    if is_scaled:
        inverse = 1.0 / tl.load(scale).to(tl.float64)
        unscale = inverse.to(tl.float32).to(tl.float64) * unscale
    return unscale / tl.load(request + DIVISOR)


@triton.jit
def reduced_block(address, place, inside, unscale, text: tl.constexpr, grad: tl.constexpr, aligned):
    """One text of a block of unscaled gradients, 0 outside."""
    values = text(loaded(address, place, inside, grad, aligned).to(unscale.dtype) * unscale)
    if inside is not None:
        values = tl.where(inside, values, 0.0)
    return values


@triton.jit
def lanes_of(
    address,
    count,
    unscale,
    text: tl.constexpr,
    grad: tl.constexpr,
    aligned: tl.constexpr,
    is_largest: tl.constexpr,
):
    """The lanes of a chunk: eight turns of 2,048 elements, each lane in order."""
    lane = tl.arange(0, 2048)
    total = tl.zeros((2048,), unscale.dtype)
    if count == CHUNK:
        for turn in range(0, CHUNK, 2048):
            place = turn + lane
            left = reduced_block(address, place, None, unscale, text, grad, aligned)
            total = joined(total, left, is_largest)
    else:
        for masked_turn in range(0, count, 2048):
            place = masked_turn + lane
            left = reduced_block(address, place, place < count, unscale, text, grad, aligned)
            total = joined(total, left, is_largest)
    return total


@triton.jit
def reduce_pass(
    rows,
    work,
    request,
    scale,
    sums,
    flags,
    grad: tl.constexpr,
    aligned: tl.constexpr,
    is_inf_norm: tl.constexpr,
    is_scaled: tl.constexpr,
):
    """Sum the squares of a chunk of unscaled gradients, or find their largest magnitude.

    Whether an inf or nan is among them is looked for only where that is not finite.
    """
    compute: tl.constexpr = tl.float64 if grad == tl.float64 else tl.float32
    item = tl.load(work + tl.program_id(0))
    row = rows + (item >> 32) * WIDTH
    chunk = item & 0xFFFFFFFF
    begin = chunk * CHUNK
    count = min(tl.load(row + SIZE) - begin, CHUNK).to(tl.int32)
    address = tl.load(row + 1) + begin * (grad.primitive_bitwidth // 8)
    unscale = unscale_of(request, scale, is_scaled).to(compute)
    if is_inf_norm:
        lanes = lanes_of(address, count, unscale, magnitude_of, grad, aligned, True)
        total = tree_of_lanes(lanes, True)
    else:
        lanes = lanes_of(address, count, unscale, squared_of, grad, aligned, False)
        total = tree_of_lanes(lanes, False)
    at = tl.load(row + FIRST_CHUNK) + chunk
    tl.store(sums + at, total)
    found = 0.0
    if total - total != 0.0:
        bad = lanes_of(address, count, unscale, nonfinite_of, grad, aligned, False)
        found = tree_of_lanes(bad, False).to(tl.float32)
    tl.store(flags + at, found)
