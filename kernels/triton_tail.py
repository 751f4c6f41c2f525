# SPDX-License-Identifier: Apache-2.0
"""What stands between the passes in Triton, in fp64, on the device: nobody waits for a number.

`finish` comes after the reduce pass (alone where there is none). Its first program joins the
chunks' sums and makes the multiplier and the skip; each runs a rule's prepare for one class of
rows. A class is what rows of one group have in common that were stepped alike: their step count
and scalars.
A launch of its own, instead of the last program of the reduce pass: launches of a stream follow
each other, so no ticket, no fence and nothing that has to be reset; it costs some 3 us.

`turn_rows` is one program a row between two stages: it joins what the stage has left and runs the
rule's turn.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bind import bind
from .rules import multiplier as multiplier_text
from .triton_order import joined, load_number, store_number, tree_in_place
from .triton_passes import (
    CLASS,
    CLASS_HYPERS,
    CLASS_SIGN,
    CLASS_STEP,
    FINITE_NORM,
    FIRST_CHUNK,
    HYPER,
    MAX_NORM,
    MULTIPLIER,
    NORM,
    PER_TENSOR,
    SCALARS,
    SIZE,
    SKIP,
    SKIP_NONFINITE,
    WIDTH,
)
from .triton_reduce import unscale_of

multiplier_of = bind(multiplier_text, "triton scalar")

# Columns of the table of classes that the device reads: where the numbers before the step stand.
CLASS_GROUP = tl.constexpr(0)
CLASS_STEP_AT = tl.constexpr(1)
CLASS_SCALARS_AT = tl.constexpr(2)
CLASS_COLUMNS = tl.constexpr(4)

# What a turn takes and gives beside hypers and per-tensor numbers.
SCALAR = tl.constexpr(300)
NUMEL = tl.constexpr(400)

WIDE = tl.constexpr(1024)  # elements of a sweep of the one program


@triton.jit
def joined_rows(chunk_of, sums, row_sums, rows, total_chunks, total_rows, is_largest: tl.constexpr):
    """The sum of all rows, in their order, of the chunks' sums; overwrites both.

    All rows' trees go down together, level by level: `chunk_of` has a chunk's index in its row
    and the row's number of chunks (index << 32 | number). `rows` are the first chunks of rows.
    """
    most = tl.full((), 0, tl.int64)
    for start in range(0, total_chunks, WIDE):
        c = start + tl.arange(0, WIDE)
        numbers = tl.load(chunk_of + c, c < total_chunks, other=0) & 0xFFFFFFFF
        most = max(most, tl.max(numbers, 0))
    half = tl.full((), 1, tl.int64)
    while half < most:
        half *= 2
    half = half // 2
    while half > 0:
        for start in range(0, total_chunks, WIDE):
            c = start + tl.arange(0, WIDE)
            of = tl.load(chunk_of + c, c < total_chunks, other=0)
            index = of >> 32
            inside = (index < half) & (index + half < (of & 0xFFFFFFFF))
            at = sums + c
            upper = tl.load(at + half, inside, other=0.0)
            tl.store(at, joined(tl.load(at, inside, other=0.0), upper, is_largest), inside)
        tl.debug_barrier()
        half = half // 2
    for start in range(0, total_rows, WIDE):
        r = start + tl.arange(0, WIDE)
        inside = r < total_rows
        first = tl.load(rows + r, inside, other=0)
        tl.store(row_sums + r, tl.load(sums + first, inside, other=0.0), inside)
    tl.debug_barrier()
    return tree_in_place(row_sums, 0, total_rows, is_largest, WIDE)


@triton.jit(do_not_specialize=["total_chunks", "total_rows"])
def finish(
    chunk_of,
    sums,
    flags,
    row_sums,
    first_chunks,
    total_chunks,
    total_rows,
    request,
    scale,
    found,
    result,
    class_table,
    numbers,
    classes,
    prepare: tl.constexpr,
    number_count: tl.constexpr,
    number_width: tl.constexpr,
    counted: tl.constexpr,
    results: tl.constexpr,
    class_width: tl.constexpr,
    is_first: tl.constexpr,
    reduces: tl.constexpr,
    is_inf_norm: tl.constexpr,
    is_scaled: tl.constexpr,
    is_found: tl.constexpr,
):
    """Norm, multiplier and skip (once a step), and the hypers of one rule's classes.

    `results` says of each of prepare's where it goes in a class.
    """
    if is_first:
        if tl.program_id(0) == 0:
            taken = unscale_of(request, scale, is_scaled)
            skip = 0.0
            if is_found:
                skip = tl.where(tl.load(found) != 0.0, 1.0, 0.0)
            if reduces:
                total = joined_rows(
                    chunk_of,
                    sums,
                    row_sums,
                    first_chunks,
                    total_chunks,
                    total_rows,
                    is_inf_norm,
                )
                norm = total if is_inf_norm else tl.sqrt(total)
                bad = tl.zeros((WIDE,), tl.float32)
                for start in range(0, total_chunks, WIDE):
                    c = start + tl.arange(0, WIDE)
                    bad += tl.load(flags + c, c < total_chunks, other=0.0)
                is_bad = tl.max(bad, 0) != 0.0
                taken = multiplier_of(norm, taken, tl.load(request + MAX_NORM))
                unwanted = is_bad & (tl.load(request + SKIP_NONFINITE) != 0.0)
                unwanted |= (norm - norm != 0.0) & (tl.load(request + FINITE_NORM) != 0.0)
                skip = tl.where(unwanted, 1.0, skip)
                tl.store(result + NORM, norm)
            tl.store(result + MULTIPLIER, taken)
            tl.store(result + SKIP, skip)
    c = tl.program_id(0).to(tl.int64)
    own = class_table + c * CLASS_COLUMNS
    of_group = numbers + tl.load(own + CLASS_GROUP) * number_width
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
        tl.store(to + results[k], tl.to_tensor(made[k]).to(tl.float64))


@triton.jit(do_not_specialize=["total_chunks"])
def turn_rows(
    rows,
    classes,
    result,
    sums,
    per_tensor,
    total_chunks,
    turn: tl.constexpr,
    takes: tl.constexpr,
    gives: tl.constexpr,
    sum_indices: tl.constexpr,
    class_width: tl.constexpr,
    per_tensor_width: tl.constexpr,
):
    """Between two stages, a row: adds its chunks and runs the rule's turn on the sums."""
    if tl.load(result + SKIP) == 0.0:
        r = tl.program_id(0).to(tl.int64)
        row = rows + r * WIDTH
        own = classes + tl.load(row + CLASS) * class_width
        size = tl.load(row + SIZE)
        chunks = max((size + 16383) // 16384, 1)
        at = per_tensor + r * per_tensor_width
        for k in tl.static_range(len(sum_indices)):
            begin = total_chunks.to(tl.int64) * sum_indices[k] + tl.load(row + FIRST_CHUNK)
            tl.store(at + sum_indices[k], tree_in_place(sums, begin, chunks, False, WIDE))
        tl.debug_barrier()
        if turn is not None:
            arguments = ()
            for k in tl.static_range(len(takes)):
                if takes[k] == NUMEL:
                    value = size.to(tl.float64)
                elif takes[k] >= SCALAR:
                    value = load_number(tl.load(row + SCALARS + (takes[k] - SCALAR)))
                elif takes[k] >= PER_TENSOR:
                    value = tl.load(at + (takes[k] - PER_TENSOR))
                else:
                    value = tl.load(own + (CLASS_HYPERS + takes[k] - HYPER))
                arguments = arguments + (value,)
            if len(gives) == 1:
                made = (turn(*arguments),)
            else:
                made = turn(*arguments)
            for k in tl.static_range(len(gives)):
                value = tl.to_tensor(made[k]).to(tl.float64)
                if gives[k] >= SCALAR:
                    store_number(tl.load(row + SCALARS + (gives[k] - SCALAR)), value, True)
                else:
                    tl.store(at + (gives[k] - PER_TENSOR), value)
