# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding by itself: unbiased, exact values stay, three texts give the same bits."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest
import torch
from bits import array_of, assert_same_bits
from compiling import shared_library
from test_storage import (
    every_value,
    halves,
    random_patterns,
    rounded,
    ties,
)

from pyupdate.kernels import rounding

_SOURCE = """
#include "rounding.h"
using namespace pyupdate;
#define BOTH(type)                                                                          \\
  extern "C" void store_##type(const float* from, const int64_t* drawn, uint16_t* to,      \\
                               int64_t n) {                                                 \\
    for (int64_t i = 0; i < n; ++i)                                                         \\
      store(from[i], reinterpret_cast<type*>(to) + i, static_cast<uint32_t>(drawn[i]));     \\
  }
BOTH(bf16) BOTH(fp16)
extern "C" void draws(const int64_t* key, const int64_t* element, int64_t* to, int64_t n) {
  const uint64_t made = key_of(key[0], key[1], key[2], static_cast<int>(key[3]),
                               static_cast<int>(key[4]));
  for (int64_t i = 0; i < n; ++i) {
    to[i] = draw(made, static_cast<uint32_t>(element[i]), static_cast<uint32_t>(element[i] >> 32));
  }
}
"""

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_TEXTS = {torch.bfloat16: rounding.to_bf16, torch.float16: rounding.to_fp16}
_CUT = {torch.bfloat16: 16, torch.float16: 13}
"""The bits of fp32 that a normal result loses."""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return shared_library(_SOURCE, tmp_path_factory.mktemp("rounding"))


def as_stored(patterns: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return patterns.astype(np.uint16).view(array_of(torch.empty(0, dtype=dtype)).dtype)


def by_numpy(values: np.ndarray, drawn: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    bits = values.view(np.uint32).astype(np.int64)
    return as_stored(_TEXTS[dtype](bits, drawn), dtype)


def by_torch(values: np.ndarray, drawn: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    bits = torch.from_numpy(values.view(np.uint32).astype(np.int64))
    return as_stored(_TEXTS[dtype](bits, torch.from_numpy(drawn)).numpy(), dtype)


def by_compiled(
    library: ctypes.CDLL, values: np.ndarray, drawn: np.ndarray, dtype: torch.dtype
) -> np.ndarray:
    out = np.empty(values.shape, np.uint16)
    given = (ctypes.c_void_p(a.ctypes.data) for a in (values, drawn, out))
    getattr(library, f"store_{_NAMES[dtype]}")(*given, ctypes.c_int64(out.size))
    return as_stored(out, dtype)


def words(n: int, seed: int = 71) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 32, n)


def wide(stored: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(stored.view(np.uint16).copy()).view(dtype).double().numpy()


# ----- the three are one --------------------------------------------------------------------------


@halves
@pytest.mark.parametrize("values", [ties, lambda _: random_patterns(1 << 19)], ids=["ties", "any"])
def test_numpy_torch_and_the_compiled_one_store_the_same_bits(dtype, values, library):
    given = values(dtype)
    for drawn in (words(given.size), np.zeros(given.size, np.int64), words(given.size) | 0xFFFF):
        truth = by_numpy(given, drawn, dtype)
        assert_same_bits(by_torch(given, drawn, dtype), truth, "torch")
        assert_same_bits(by_compiled(library, given, drawn, dtype), truth, "compiled")


@pytest.mark.parametrize(
    "key", [(0, 1, 0, 0, 0), (2**63 - 1, 2**52, 3 << 32 | 5, 2, 4), (12345, 77, 8, 1, 2)], ids=str
)
def test_numpy_torch_and_the_compiled_one_draw_the_same(key, library):
    elements = np.concatenate(
        [np.arange(5_000), (1 << 32) - 100 + np.arange(200), (5 << 32) + np.arange(100)]
    )
    made = rounding.key_of(*key)
    truth = rounding.draws(made, elements)
    assert truth.min() >= 0 and truth.max() < 1 << 32
    assert np.array_equal(rounding.draws(made, torch.from_numpy(elements)).numpy(), truth)
    out = np.empty_like(elements)
    given = (ctypes.c_void_p(a.ctypes.data) for a in (np.array(key), elements, out))
    library.draws(*given, ctypes.c_int64(out.size))
    assert np.array_equal(out, truth)


# ----- what is stored -----------------------------------------------------------------------------


def inside(dtype: torch.dtype) -> np.ndarray:
    """fp32 values up to the largest finite one of the storage, of all sizes and both signs."""
    values = random_patterns(1 << 17)
    largest = torch.finfo(dtype).max
    rng = np.random.default_rng(72)
    small = rng.standard_normal(1 << 15) * np.exp2(rng.integers(-30, 16, 1 << 15))
    values = np.concatenate([values, small.astype(np.float32)])
    return values[np.abs(values) <= largest]


@halves
def test_the_result_is_one_of_the_two_neighbours_by_the_distance(dtype):
    """Against fp64: up where the draw is below (fp16's subnormals) or above what is left over."""
    values = inside(dtype)
    drawn = words(values.size)
    found = wide(by_numpy(values, drawn, dtype), dtype)
    exact = np.abs(values.astype(np.float64))
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    exponent = np.floor(np.log2(np.maximum(exact, info.smallest_normal)))
    place = np.maximum(np.exp2(exponent) * info.eps, smallest)
    below = np.floor(exact / place) * place
    left = (exact - below) / place
    assert set(np.unique(np.round((np.abs(found) - below) / place, 9))) <= {0.0, 1.0}
    up = np.abs(found) > below
    if dtype is torch.float16:
        subnormal = exact < info.smallest_normal
        share = np.where(subnormal, np.floor(left * 2.0**31), left)
        expected = np.where(subnormal, (drawn >> 1) < share, (drawn >> 19) / 2.0**13 >= 1.0 - left)
    else:
        expected = (drawn >> 16) / 2.0**16 >= 1.0 - left
    assert np.array_equal(up, expected & (left > 0.0))
    assert np.array_equal(np.signbit(found), np.signbit(values))


@halves
def test_the_mean_over_all_draws_is_the_value(dtype):
    """Exact: each draw of 16 bits once. fp16's subnormals in steps that 16 bits can tell."""
    values = inside(dtype)[::1500]
    if dtype is torch.float16:
        small = np.abs(values) < torch.finfo(dtype).smallest_normal
        values = np.where(small, np.round(values.astype(np.float64) * 2.0**40) / 2.0**40, values)
        values = np.append(values, [5 * 2.0**-40, 2.0**-25, 2.0**-15 + 2.0**-38])
    values = values.astype(np.float32)
    drawn = np.arange(1 << 16) << 16
    assert values.size > 50
    for value in values:
        stored = by_numpy(np.full(drawn.size, value), drawn, dtype)
        mean = math.fsum(wide(stored, dtype).tolist()) / drawn.size
        assert mean == float(value), float(value).hex()


@halves
def test_what_is_exact_or_not_finite_never_moves(dtype, library):
    patterns = array_of(every_value(dtype))
    values = every_value(dtype).float().numpy()
    for drawn in (words(values.size), np.full(values.size, (1 << 32) - 1), 0 * words(values.size)):
        assert_same_bits(by_numpy(values, drawn, dtype), patterns, "numpy")
        assert_same_bits(by_compiled(library, values, drawn, dtype), patterns, "compiled")


@halves
def test_beyond_the_largest_value_rounding_is_to_nearest(dtype):
    largest = np.float32(torch.finfo(dtype).max)
    count = min(1 << _CUT[dtype], 1 << 16)
    above = (np.arange(1, count) + int(largest.view(np.uint32))).astype(np.uint32)
    values = above.view(np.float32)
    values = np.concatenate([values, -values, np.float32([np.inf, -np.inf, 3e38, -3.4e38])])
    for drawn in (words(values.size), np.full(values.size, (1 << 32) - 1), 0 * words(values.size)):
        found = by_numpy(values, drawn, dtype)
        expected = rounded(values, dtype)
        inner = np.abs(values) <= float(largest)  # of bf16, 3e38 is inside
        assert_same_bits(found[~inner], expected[~inner], "beyond")


# ----- what is drawn ------------------------------------------------------------------------------

N = 1 << 20
SIGMAS = 5.0
"""Of 200 statistics of good draws, one in 10,000 runs would be further out; the keys are fixed."""


def uniform(*key: int, start: int = 0) -> np.ndarray:
    return rounding.draws(rounding.key_of(*key), start + np.arange(N)) / 2.0**32


def test_draws_are_uniform_in_every_bit_and_in_256_bins():
    drawn = rounding.draws(rounding.key_of(0, 1, 0, 0, 0), np.arange(N))
    for bit in range(32):
        ones = int(((drawn >> bit) & 1).sum())
        assert abs(ones - N / 2) < SIGMAS * math.sqrt(N) / 2, bit
    for shift in (24, 16):  # the bits that decide
        counts = np.bincount((drawn >> shift) & 0xFF, minlength=256)
        chi_square = ((counts - N / 256) ** 2 / (N / 256)).sum()
        assert abs(chi_square - 255) < SIGMAS * math.sqrt(2 * 255)


@pytest.mark.parametrize(
    ("other", "start"),
    [
        ((0, 1, 0, 0, 0), 1),
        ((0, 1, 0, 0, 0), 2_048),
        ((0, 1, 0, 0, 0), 1 << 32),
        ((0, 2, 0, 0, 0), 0),
        ((0, 1, 1, 0, 0), 0),
        ((0, 1, 1 << 32, 0, 0), 0),
        ((0, 1, 0, 1, 0), 0),
        ((0, 1, 0, 0, 2), 0),
        ((1, 1, 0, 0, 0), 0),
        ((1, 0, 0, 0, 0), 0),
    ],
    ids=str,
)
def test_draws_of_another_element_step_parameter_role_or_seed_are_independent(other, start):
    a, b = uniform(0, 1, 0, 0, 0) - 0.5, uniform(*other, start=start) - 0.5
    # The product of two independent uniform ones has the variance 1/144.
    assert abs((a * b).sum()) < SIGMAS * math.sqrt(N / 144)
    # Quarters of both: 16 bins, 9 degrees of freedom if they are independent, 15 of uniform ones.
    bins = np.bincount((4 * (a + 0.5)).astype(int) * 4 + (4 * (b + 0.5)).astype(int), minlength=16)
    chi_square = ((bins - N / 16) ** 2 / (N / 16)).sum()
    assert abs(chi_square - 15) < SIGMAS * math.sqrt(2 * 15)
