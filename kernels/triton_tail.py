# SPDX-License-Identifier: Apache-2.0
"""What follows a sweep in Triton, in fp64, on the device: nobody waits for a number.

The last program of the reduce pass to arrive joins the chunks' sums and makes multiplier and skip
(`decide`); the last one of a row joins what a stage has left and runs the rule's turn (`turn_row`).
`prepare_class` runs a rule's prepare for one class of rows. A class is what rows of one group have
in common that were stepped alike: their step count and scalars.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bind import bind
from .rules import multiplier as multiplier_text
from .triton_layout import (
    CLASS_COLUMNS,
    CLASS_GROUP,
    CLASS_HYPERS,
    CLASS_SCALARS_AT,
    CLASS_SIGN,
    CLASS_STEP,
    CLASS_STEP_AT,
    DIVISOR,
    FINITE_NORM,
    FIRST_CHUNK,
    HYPER,
    INF_NORM,
    MAX_NORM,
    MULTIPLIER,
    NORM,
    NUMEL,
    PER_TENSOR,
    REDUCES,
    REQUEST,
    RESULT,
    SCALAR,
    SCALARS,
    SIZE,
    SKIP,
    SKIP_NONFINITE,
    TWO_NORM,
    UNSCALE,
)
from .triton_order import joined, load_number, store_number, tree_in_place

multiplier_of = bind(multiplier_text, "triton scalar")

WIDE = tl.constexpr(1024)  # elements of a sweep of the one program


@triton.jit
def is_last(ticket, programs):
    """Whether this program is the last of so many to come here; then it sees what all have written.

    All that a program's threads wrote is ordered before its atomic addition by the barrier, and
    the addition releases it to the device; the last addition acquires what the others released,
    because each of them has changed the one number that it reads. A barrier that Triton puts behind
    it, to tell all threads the result, orders their loads behind it. (In the PTX: bar.sync,
    atom.global.gpu.acq_rel, bar.sync.) The ticket is left at 0; the next launch finds it so.
    """
    tl.debug_barrier()
    before = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu")
    last = before == programs - 1
    if last:
        tl.store(ticket, 0)
    return last


@triton.jit
def unscale_of(request, scale, is_scaled: tl.constexpr):
    """What gradients are multiplied by before the norm, in fp64; 1 / scale as torch rounds it."""
    unscale = tl.load(request + UNSCALE)
    if is_scaled:
        inverse = 1.0 / tl.load(scale).to(tl.float64)
        unscale = inverse.to(tl.float32).to(tl.float64) * unscale
    return unscale / tl.load(request + DIVISOR)


@triton.jit
def join_runs(of, values, total, is_largest: tl.constexpr):
    """Join the values of each run into its first; all runs' trees go down together, by levels.

    `of` has of each value its index in its run and how many that run has (index << 32 | number).
    """
    most = tl.full((), 0, tl.int64)
    for start in range(0, total, WIDE):
        v = start + tl.arange(0, WIDE)
        numbers = tl.load(of + v, v < total, other=0) & 0xFFFFFFFF
        most = max(most, tl.max(numbers, 0))
    half = tl.full((), 1, tl.int64)
    while half < most:
        half *= 2
    half = half // 2
    while half > 0:
        for start in range(0, total, WIDE):
            v = start + tl.arange(0, WIDE)
            place = tl.load(of + v, v < total, other=0)
            index = place >> 32
            inside = (index < half) & (index + half < (place & 0xFFFFFFFF))
            at = values + v
            upper = tl.load(at + half, inside, other=0.0)
            tl.store(at, joined(tl.load(at, inside, other=0.0), upper, is_largest), inside)
        tl.debug_barrier()
        half = half // 2


@triton.jit
def decide(
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
    reduces: tl.constexpr,
    is_inf_norm: tl.constexpr,
    is_scaled: tl.constexpr,
    is_found: tl.constexpr,
):
    """Norm, multiplier and skip of each member of a step; by one program.

    Chunks are joined to rows, and rows, in their order, to members: all at once. Who asks for the
    other norm has launches of its own; what stands in its place is joined here, too, but not read.
    """
    wanted: tl.constexpr = INF_NORM if is_inf_norm else TWO_NORM
    other: tl.constexpr = TWO_NORM if is_inf_norm else INF_NORM
    if reduces:
        join_runs(chunk_of, sums, total_chunks, is_inf_norm)
        for start in range(0, total_rows, WIDE):
            r = start + tl.arange(0, WIDE)
            inside = r < total_rows
            first = tl.load(first_chunks + r, inside, other=0)
            tl.store(row_sums + r, tl.load(sums + first, inside, other=0.0), inside)
        tl.debug_barrier()
        join_runs(row_of, row_sums, total_rows, is_inf_norm)
    for member in range(0, member_count):
        own = request + member * REQUEST
        asks = tl.load(own + REDUCES) if reduces else 0.0
        if asks != other:
            taken = unscale_of(own, scale + member, is_scaled)
            norm = tl.full((), -1.0, tl.float64)
            skip = 0.0
            if is_found:
                skip = tl.where(tl.load(found + member) != 0.0, 1.0, 0.0)
            if reduces:
                if asks == wanted:
                    row = tl.load(first_rows + member)
                    norm = tl.load(row_sums + row)
                    if not is_inf_norm:
                        norm = tl.sqrt(norm)
                    taken = multiplier_of(norm, taken, tl.load(own + MAX_NORM))
                    if norm - norm != 0.0:
                        begin = tl.load(first_chunks + row)
                        end = tl.load(first_chunks + tl.load(first_rows + member + 1))
                        is_bad = any_of(flags, begin, end)
                        unwanted = is_bad & (tl.load(own + SKIP_NONFINITE) != 0.0)
                        unwanted |= tl.load(own + FINITE_NORM) != 0.0
                        skip = tl.where(unwanted, 1.0, skip)
            tl.store(result + member * RESULT + NORM, norm)
            tl.store(result + member * RESULT + MULTIPLIER, taken)
            tl.store(result + member * RESULT + SKIP, skip)


@triton.jit
def any_of(flags, begin, end):
    """Whether one of them is not zero."""
    found = tl.zeros((WIDE,), tl.float32)
    for start in range(begin, end, WIDE):
        f = start + tl.arange(0, WIDE)
        found += tl.load(flags + f, f < end, other=0.0)
    return tl.max(found, 0) != 0.0


@triton.jit
def prepare_class(
    c,
    class_table,
    numbers,
    classes,
    prepare: tl.constexpr,
    number_count: tl.constexpr,
    counted: tl.constexpr,
    results: tl.constexpr,
    class_width: tl.constexpr,
):
    """Make the hypers of a rule's class `c`; `results` says of each of prepare's where it goes."""
    own = class_table + c * CLASS_COLUMNS
    of_group = numbers + tl.load(own + CLASS_GROUP) * (1 + number_count)
    step = load_number(tl.load(own + CLASS_STEP_AT)) + 1.0
    arguments = (step,)
    for k in tl.static_range(number_count):
        arguments = arguments + (tl.load(of_group + (1 + k)),)
    for k in tl.static_range(counted):
        arguments = arguments + (load_number(tl.load(own + (CLASS_SCALARS_AT + k))),)
    if len(results) == 1:
        made = (prepare(*arguments),)
    else:
        made = prepare(*arguments)
    to = classes + c * class_width
    tl.store(to + CLASS_STEP, step)
    tl.store(to + CLASS_SIGN, tl.load(of_group))
    for k in tl.static_range(len(results)):
        tl.store(to + results[k], tl.core.to_tensor(made[k]).to(tl.float64))


@triton.jit
def turn_row(
    row,
    own,
    sums,
    numbers,
    total_chunks,
    chunks,
    turn: tl.constexpr,
    takes: tl.constexpr,
    gives: tl.constexpr,
    sum_indices: tl.constexpr,
):
    """After a stage: add a row's chunks and run the rule's turn on the sums.

    `own` is the row's class, `numbers` are its own per-tensor numbers.
    """
    for k in tl.static_range(len(sum_indices)):
        begin = total_chunks.to(tl.int64) * sum_indices[k] + tl.load(row + FIRST_CHUNK)
        tl.store(numbers + sum_indices[k], tree_in_place(sums, begin, chunks, False, WIDE))
    tl.debug_barrier()
    if turn is not None:
        arguments = ()
        for k in tl.static_range(len(takes)):
            if takes[k] == NUMEL:
                value = tl.load(row + SIZE).to(tl.float64)
            elif takes[k] >= SCALAR:
                value = load_number(tl.load(row + SCALARS + (takes[k] - SCALAR)))
            elif takes[k] >= PER_TENSOR:
                value = tl.load(numbers + (takes[k] - PER_TENSOR))
            else:
                value = tl.load(own + (CLASS_HYPERS + takes[k] - HYPER))
            arguments = arguments + (value,)
        if len(gives) == 1:
            made = (turn(*arguments),)
        else:
            made = turn(*arguments)
        for k in tl.static_range(len(gives)):
            value = tl.core.to_tensor(made[k]).to(tl.float64)
            if gives[k] >= SCALAR:
                store_number(tl.load(row + SCALARS + (gives[k] - SCALAR)), value, True)
            else:
                tl.store(numbers + (gives[k] - PER_TENSOR), value)
