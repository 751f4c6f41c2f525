# SPDX-License-Identifier: Apache-2.0
"""Where the Triton kernels find things: the columns of their tables, and how values are moved."""

from __future__ import annotations

import triton
import triton.language as tl

from .reduction import CHUNK as _CHUNK

CHUNK = tl.constexpr(_CHUNK)

# Columns of the table of rows: the roles, the average, then these.
AVERAGE = tl.constexpr(6)
SIZE = tl.constexpr(7)
FIRST_CHUNK = tl.constexpr(8)
CLASS = tl.constexpr(9)
MEMBER = tl.constexpr(10)
STEP = tl.constexpr(11)
SCALARS = tl.constexpr(12)
IDENTITY = tl.constexpr(14)
WIDTH = tl.constexpr(15)

# What a step asks for, in fp64, for each of the plans that are its members; the seed is an int64 in
# the place of one.
UNSCALE = tl.constexpr(0)
DIVISOR = tl.constexpr(1)
MAX_NORM = tl.constexpr(2)
CLIP_VALUE = tl.constexpr(3)
EMA_WEIGHT = tl.constexpr(4)
SKIP_NONFINITE = tl.constexpr(5)
FINITE_NORM = tl.constexpr(6)
SEED = tl.constexpr(7)
REDUCES = tl.constexpr(8)
REQUEST = tl.constexpr(9)

# What REDUCES says: which norm is taken, or that none is.
NO_NORM = tl.constexpr(0)
TWO_NORM = tl.constexpr(1)
INF_NORM = tl.constexpr(2)

# What a step finds, in fp64, for each member.
MULTIPLIER = tl.constexpr(0)
SKIP = tl.constexpr(1)
NORM = tl.constexpr(2)
RESULT = tl.constexpr(3)

# What a stage takes and gives, as one number each: a role, or these and an index.
HYPER = tl.constexpr(100)
PER_TENSOR = tl.constexpr(200)
# And a turn, beside them.
SCALAR = tl.constexpr(300)
NUMEL = tl.constexpr(400)

# A class has its step count, sign and hypers; behind them the counted scalars' new values.
CLASS_STEP = tl.constexpr(0)
CLASS_SIGN = tl.constexpr(1)
CLASS_HYPERS = tl.constexpr(2)

# Columns of the table of classes that the device reads: where the numbers before the step stand.
CLASS_GROUP = tl.constexpr(0)
CLASS_STEP_AT = tl.constexpr(1)
CLASS_SCALARS_AT = tl.constexpr(2)
CLASS_COLUMNS = tl.constexpr(4)


@triton.jit
def loaded(address, place, inside, stored: tl.constexpr, aligned: tl.constexpr):
    """What is stored, in its own type; 0 outside."""
    pointer = address.to(tl.pointer_type(stored))
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    if inside is None:
        values = tl.load(pointer + place)
    else:
        values = tl.load(pointer + place, inside, other=0.0)
    return values


@triton.jit
def stored_at(address, place, values, inside, stored: tl.constexpr, aligned: tl.constexpr):
    """Store values of that type."""
    pointer = address.to(tl.pointer_type(stored))
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    if inside is None:
        tl.store(pointer + place, values)
    else:
        tl.store(pointer + place, values, inside)
