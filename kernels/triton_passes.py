# SPDX-License-Identifier: Apache-2.0
"""The apply pass in Triton, generic over the rule: the mirror of csrc/element.h.

A launch takes all rows of one (rule, storages, alignment), whatever their number, from int64 tables
on the device: a program is one chunk of one row. The rows may be those of several plans that are
stepped as one: a row says whose it is, and each member has its own request, norm, multiplier and
skip. What a step does with them:

    reduce_pass   (triton_reduce.py)    norm and finite check; multiplier, skip, hypers
    or prepare_pass, where neither is asked for        multiplier, skip, hypers alone
    apply_pass    each of the rule's stages, and the turn behind it


The numeric contract: compile with ``enable_fp_fusion=False``; division and square root are the
bound texts' `div_rn` and `sqrt_rn`; sums follow triton_order.py.

Why it looks as it does, as seen in the PTX of Triton 3.9:
- The main loop is unmasked and the tail masked: a mask on a bound that is no multiple of 16 turns
  every 16-byte access into scalar ones.
- The alignment hint stands on the cast pointer; on the integer before it, it has no effect.
- All roles of a launch have one hint, and a block is as wide as 16 bytes of its widest type a
  thread (`block_of`): else loads and stores get different layouts, and values are moved between
  them through shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bind import bind
from .rules import averaged, clipped
from .triton_layout import (
    AVERAGE,
    CHUNK,
    CLASS,
    CLASS_HYPERS,
    CLASS_SIGN,
    CLASS_STEP,
    CLIP_VALUE,
    EMA_WEIGHT,
    FIRST_CHUNK,
    HYPER,
    IDENTITY,
    MEMBER,
    MULTIPLIER,
    PER_TENSOR,
    REQUEST,
    RESULT,
    SCALARS,
    SEED,
    SIZE,
    SKIP,
    STEP,
    WIDTH,
    loaded,
    stored_at,
)
from .triton_order import store_number, tree_of_lanes
from .triton_rounding import by_chance, draw, key_of
from .triton_tail import is_last, turn_row

clipped_of = bind(clipped, "triton")
averaged_of = bind(averaged, "triton")


def block_of(bytes_each: tuple[int, ...], sums: bool) -> tuple[int, int]:
    """Elements of a block and warps of a program, by the bytes of an element of each role.

    A thread has 16 bytes of the widest role, which is all that a store may take, so that every role
    has one layout. A stage that leaves sums takes its 2,048 lanes at once.
    """
    if sums:
        threads = min(512, 2048 * max(bytes_each) // 16)
        return 2048, threads // 32
    return 256 * 16 // max(bytes_each), 8


# ----- apply -------------------------------------------------------------------------------------


@triton.jit
def stage_of_block(
    addresses,
    place,
    element,
    inside,
    numbers,
    taken,
    keys,
    text: tl.constexpr,
    takes: tl.constexpr,
    gives: tl.constexpr,
    block: tl.constexpr,
    param: tl.constexpr,
    state: tl.constexpr,
    aligned: tl.constexpr,
    clips: tl.constexpr,
    averages: tl.constexpr,
):
    """One block of one row: load, multiply, clip, rule, store, average; the sums that it leaves.

    `keys` has one for each of `gives`, or none without stochastic rounding.
    """
    multiplier, clip_value, ema_weight = taken
    compute: tl.constexpr = tl.float64 if param == tl.float64 else tl.float32
    arguments = ()
    for k in tl.static_range(len(takes)):
        if takes[k] >= HYPER:
            arguments = arguments + (numbers[k],)
        else:
            values = loaded(
                addresses[takes[k]], place, inside, param if takes[k] < 2 else state, aligned
            ).to(compute)
            if takes[k] == 1:
                values = values * multiplier
                if clips:
                    values = clipped_of(values, clip_value)
            arguments = arguments + (values,)
    if len(gives) == 1:
        results = (text(*arguments),)
    else:
        results = text(*arguments)
    left = ()
    moved = None
    for k in tl.static_range(len(gives)):
        # What a rule gives of numbers alone is no block yet.
        values = tl.broadcast_to(tl.core.to_tensor(results[k]).to(compute), (block,))
        if gives[k] >= PER_TENSOR:
            if inside is not None:
                values = tl.where(inside, values, 0.0)
            left = left + (values,)
        else:
            kind = param if gives[k] < 2 else state
            if len(keys) > 0 and kind.primitive_bitwidth == 16:
                rounded = by_chance(values, draw(keys[k], element), kind)
            else:
                rounded = values.to(kind)
            stored_at(addresses[gives[k]], place, rounded, inside, kind, aligned)
            if gives[k] == 0:
                moved = rounded
    if averages:
        if moved is None:
            moved = loaded(addresses[0], place, inside, param, aligned)
        before = loaded(addresses[AVERAGE], place, inside, compute, aligned)
        after = averaged_of(before, moved.to(compute), ema_weight)
        stored_at(addresses[AVERAGE], place, after, inside, compute, aligned)
    return left


@triton.jit
def added(lanes, left):
    """Each of the lanes with what a block leaves for it."""
    total = ()
    for k in tl.static_range(len(lanes)):
        total = total + (lanes[k] + left[k],)
    return total


@triton.jit(do_not_specialize=["total_chunks"])
def apply_pass(
    rows,
    work,
    classes,
    request,
    result,
    sums,
    per_tensor,
    tickets,
    total_chunks,
    text: tl.constexpr,
    takes: tl.constexpr,
    gives: tl.constexpr,
    sum_indices: tl.constexpr,
    turn_text: tl.constexpr,
    turn_takes: tl.constexpr,
    turn_gives: tl.constexpr,
    ends: tl.constexpr,
    counted: tl.constexpr,
    class_width: tl.constexpr,
    per_tensor_width: tl.constexpr,
    stage: tl.constexpr,
    block: tl.constexpr,
    param: tl.constexpr,
    state: tl.constexpr,
    aligned: tl.constexpr,
    clips: tl.constexpr,
    is_by_chance: tl.constexpr,
    averages: tl.constexpr,
    is_joint: tl.constexpr,
):
    """Make one stage of a rule on one chunk.

    The chunks go backwards: what the reduce pass has read last is still in the cache. The first
    chunk of a row also advances its step and counted scalars. A stage that `ends` leaves
    sums or has a turn, made with the last of a row's chunks to be done. Where it `is_joint`, rows
    are of several members: to look up whose takes 11 registers more on sm_80 (ptxas 12.9).
    """
    last = tl.num_programs(0) - 1
    item = tl.load(work + (last - tl.program_id(0)))
    r = item >> 32
    row = rows + r * WIDTH
    if is_joint:
        member = tl.load(row + MEMBER)
        request += member * REQUEST
        result += member * RESULT
    if tl.load(result + SKIP) == 0.0:
        compute: tl.constexpr = tl.float64 if param == tl.float64 else tl.float32
        chunk = item & 0xFFFFFFFF
        begin = chunk * CHUNK
        count = min(tl.load(row + SIZE) - begin, CHUNK).to(tl.int32)
        own = classes + tl.load(row + CLASS) * class_width
        step = tl.load(own + CLASS_STEP)

        addresses = ()
        for role in tl.static_range(AVERAGE + 1):
            kind = param if role < 2 else (compute if role == AVERAGE else state)
            address = tl.load(row + role) + begin * (kind.primitive_bitwidth // 8)
            addresses = addresses + (address,)
        numbers = ()
        for k in tl.static_range(len(takes)):
            number = 0.0
            if takes[k] >= PER_TENSOR:
                at = r * per_tensor_width + (takes[k] - PER_TENSOR)
                number = tl.load(per_tensor + at).to(compute)
            elif takes[k] >= HYPER:
                number = tl.load(own + (CLASS_HYPERS + takes[k] - HYPER)).to(compute)
            numbers = numbers + (number,)
        keys = ()
        if is_by_chance:
            seed = tl.load(request + SEED).to(tl.int64, bitcast=True)
            for k in tl.static_range(len(gives)):
                key = key_of(
                    seed, step.to(tl.int64), tl.load(row + IDENTITY), stage << 8 | gives[k]
                )
                keys = keys + (key,)
        multiplier = tl.load(result + MULTIPLIER) * tl.load(own + CLASS_SIGN)
        taken = (
            multiplier.to(compute),
            tl.load(request + CLIP_VALUE).to(compute),
            tl.load(request + EMA_WEIGHT).to(compute),
        )

        lane = tl.arange(0, block)
        lanes = ()
        for k in tl.static_range(len(gives)):
            if gives[k] >= PER_TENSOR:
                lanes = lanes + (tl.zeros((block,), compute),)
        whole = count // block
        for turn in range(0, whole):
            place = turn * block + lane
            left = stage_of_block(
                addresses,
                place,
                begin + place,
                None,
                numbers,
                taken,
                keys,
                text,
                takes,
                gives,
                block,
                param,
                state,
                aligned,
                clips,
                averages,
            )
            if len(lanes) > 0:
                lanes = added(lanes, left)
        if whole * block < count:
            place = whole * block + lane
            left = stage_of_block(
                addresses,
                place,
                begin + place,
                place < count,
                numbers,
                taken,
                keys,
                text,
                takes,
                gives,
                block,
                param,
                state,
                aligned,
                clips,
                averages,
            )
            if len(lanes) > 0:
                lanes = added(lanes, left)
        if len(lanes) > 0:
            left_at = tl.load(row + FIRST_CHUNK) + chunk
            for k in tl.static_range(len(lanes)):
                column = total_chunks.to(tl.int64) * sum_indices[k]
                tl.store(sums + column + left_at, tree_of_lanes(lanes[k], False))
        if stage == 0:
            first = chunk == 0
            store_number(tl.load(row + STEP), step, first)
            for k in tl.static_range(counted):
                value = tl.load(own + (class_width - counted + k))
                store_number(tl.load(row + SCALARS + k), value, first)
        if ends:
            chunks = max((tl.load(row + SIZE) + (CHUNK - 1)) // CHUNK, 1)
            if is_last(tickets + r, chunks):
                turn_row(
                    row,
                    own,
                    sums,
                    per_tensor + r * per_tensor_width,
                    total_chunks,
                    chunks,
                    turn_text,
                    turn_takes,
                    turn_gives,
                    sum_indices,
                )
