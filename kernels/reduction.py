# SPDX-License-Identifier: Apache-2.0
"""The one reduction order (csrc/reduce.h) on whole arrays, for numpy and torch alike.

Element i of a chunk goes to lane i mod 2,048; a lane adds its elements in the compute type, in
order; lanes, then the chunks of a row, then rows are added in fp64 by a halving tree over the next
power of two. The inf norm keeps the largest where the 2-norm adds. Only slices, sums, maxima and
shapes are used, so one text serves arrays and tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .rules import larger

CHUNK = 16_384
LANES = 2_048


def halving_tree(values: Sequence[float]) -> float:
    """The sum of some fp64 numbers; 0.0 of none."""
    x = list(values)
    half = _tree_width(len(x)) // 2
    while half > 0:
        for i in range(len(x) - half):
            x[i] += x[i + half]
        del x[half:]
        half //= 2
    return x[0] if x else 0.0


def sum_of_row(values: Any, zeros: Any, widen: Any) -> float:
    """The sum of one row's values, in fp64.

    Args:
        values: 1-D array of the compute type.
        zeros: ``zeros(n)`` makes n zeros like `values`.
        widen: turns an array of the compute type into one of fp64.
    """
    size = values.shape[0]
    chunks = max(1, -(-size // CHUNK))
    padded = zeros(chunks * CHUNK)
    padded[:size] = values
    lanes = padded.reshape(chunks, CHUNK // LANES, LANES)
    total = zeros(chunks * LANES).reshape(chunks, LANES)
    for turn in range(CHUNK // LANES):
        total = total + lanes[:, turn]
    wide = widen(total)
    half = LANES // 2
    while half > 0:
        wide = wide[:, :half] + wide[:, half:]
        half //= 2
    return halving_tree([float(x) for x in wide[:, 0]])


def largest(values: Sequence[float]) -> float:
    """The largest of some numbers from 0 on, nan if one is nan; 0.0 of none."""
    most = 0.0
    for value in values:
        most = larger(most, value)
    return most


def largest_of_row(values: Any) -> float:
    """The largest of one row's values from 0 on. Nothing is rounded, so the order is no matter."""
    return float(values.max()) if values.shape[0] else 0.0


def _tree_width(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 0 else 0
