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
from .triton_layout import (
    CHUNK,
    FIRST_CHUNK,
    INF_NORM,
    MEMBER,
    REDUCES,
    REQUEST,
    SIZE,
    TWO_NORM,
    WIDTH,
    loaded,
)
from .triton_order import joined, tree_of_lanes
from .triton_tail import decide, is_last, prepare_class, unscale_of

squared_of = bind(squared, "triton")
magnitude_of = bind(magnitude, "triton")
nonfinite_of = bind(nonfinite, "triton")


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


@triton.jit(do_not_specialize=["total_chunks", "total_rows", "member_count", "class_count"])
def reduce_pass(
    rows,
    work,
    chunk_of,
    row_of,
    first_chunks,
    first_rows,
    request,
    scale,
    found,
    sums,
    flags,
    row_sums,
    ticket,
    result,
    class_table,
    numbers,
    classes,
    total_chunks,
    total_rows,
    member_count,
    class_count,
    prepare: tl.constexpr,
    number_count: tl.constexpr,
    counted: tl.constexpr,
    results: tl.constexpr,
    class_width: tl.constexpr,
    grad: tl.constexpr,
    aligned: tl.constexpr,
    is_inf_norm: tl.constexpr,
    is_scaled: tl.constexpr,
    is_found: tl.constexpr,
    decides: tl.constexpr,
):
    """Sum the squares of a chunk of unscaled gradients, or find their largest magnitude.

    Whether an inf or nan is among them is looked for only where that is not finite. Members that
    ask for another norm, or for none, are left alone. Of a rule's launches the last one also makes
    its classes; the last launch of a norm `decides`.
    """
    compute: tl.constexpr = tl.float64 if grad == tl.float64 else tl.float32
    wanted: tl.constexpr = INF_NORM if is_inf_norm else TWO_NORM
    item = tl.load(work + tl.program_id(0))
    row = rows + (item >> 32) * WIDTH
    member = tl.load(row + MEMBER)
    own = request + member * REQUEST
    if tl.load(own + REDUCES) == wanted:
        chunk = item & 0xFFFFFFFF
        begin = chunk * CHUNK
        count = min(tl.load(row + SIZE) - begin, CHUNK).to(tl.int32)
        address = tl.load(row + 1) + begin * (grad.primitive_bitwidth // 8)
        unscale = unscale_of(own, scale + member, is_scaled).to(compute)
        if is_inf_norm:
            lanes = lanes_of(address, count, unscale, magnitude_of, grad, aligned, True)
            total = tree_of_lanes(lanes, True)
        else:
            lanes = lanes_of(address, count, unscale, squared_of, grad, aligned, False)
            total = tree_of_lanes(lanes, False)
        at = tl.load(row + FIRST_CHUNK) + chunk
        tl.store(sums + at, total)
        flag = 0.0
        if total - total != 0.0:
            bad = lanes_of(address, count, unscale, nonfinite_of, grad, aligned, False)
            flag = tree_of_lanes(bad, False).to(tl.float32)
        tl.store(flags + at, flag)
    if prepare is not None:
        for c in range(tl.program_id(0), class_count, tl.num_programs(0)):
            prepare_class(
                c.to(tl.int64),
                class_table,
                numbers,
                classes,
                prepare,
                number_count,
                counted,
                results,
                class_width,
            )
    if decides:
        # The launches before this one are over: it alone counts its programs.
        if is_last(ticket, tl.num_programs(0)):
            decide(
                chunk_of,
                row_of,
                sums,
                flags,
                row_sums,
                first_chunks,
                first_rows,
                total_chunks,
                total_rows,
                member_count,
                request,
                scale,
                found,
                result,
                True,
                is_inf_norm,
                is_scaled,
                is_found,
            )


@triton.jit(do_not_specialize=["member_count"])
def prepare_pass(
    request,
    scale,
    found,
    result,
    class_table,
    numbers,
    classes,
    member_count,
    prepare: tl.constexpr,
    number_count: tl.constexpr,
    counted: tl.constexpr,
    results: tl.constexpr,
    class_width: tl.constexpr,
    is_scaled: tl.constexpr,
    is_found: tl.constexpr,
    decides: tl.constexpr,
):
    """What `reduce_pass` does beside reading gradients, in a step that does not read them first.

    A program is one class of a rule.
    """
    if decides:
        if tl.program_id(0) == 0:
            decide(
                None,
                None,
                None,
                None,
                None,
                None,
                None,
                0,
                0,
                member_count,
                request,
                scale,
                found,
                result,
                False,
                False,
                is_scaled,
                is_found,
            )
    prepare_class(
        tl.program_id(0).to(tl.int64),
        class_table,
        numbers,
        classes,
        prepare,
        number_count,
        counted,
        results,
        class_width,
    )
