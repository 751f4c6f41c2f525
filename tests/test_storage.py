# SPDX-License-Identifier: Apache-2.0
"""bf16 and fp16: all 65,536 patterns, and rounding to nearest even, subnormals and overflow too."""

from __future__ import annotations

import ctypes
import math
from bisect import bisect_right
from fractions import Fraction

import numpy as np
import pytest
import torch
from bits import array_of, assert_same_bits, tensor_of, torch_steps
from cases import name_of
from compiling import shared_library
from conftest import ISAS

import pyupdate
from pyupdate.kernels import oracle

HALVES = (torch.bfloat16, torch.float16)
halves = pytest.mark.parametrize("dtype", HALVES, ids=name_of)

PATTERNS = np.arange(1 << 16, dtype=np.uint16)


def every_value(dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(PATTERNS.copy()).view(dtype)


def ties(dtype: torch.dtype) -> np.ndarray:
    """Every finite value, every middle between neighbours, and the fp32 values beside those.

    Beyond the largest value the next neighbour is where an infinite exponent range would have it:
    from the middle on the result is infinite.
    """
    positive = every_value(dtype)[: 1 << 15].double()
    values = positive[torch.isfinite(positive)].numpy()
    last = values[-1] + (values[-1] - values[-2])
    # In fp64: bf16's "next" after its largest value is 2^128, the middle before it is no fp32 inf.
    middles = (values + np.append(values[1:], last)) / 2.0
    exact = np.concatenate([values, middles]).astype(np.float32)
    below, above = np.nextafter(exact, np.float32(-np.inf)), np.nextafter(exact, np.float32(np.inf))
    both = np.concatenate([exact, below, above])
    return np.concatenate([both, -both])


def random_patterns(n: int) -> np.ndarray:
    """fp32 values of any kind, nans and infinities among them."""
    return np.random.default_rng(51).integers(0, 1 << 32, n, dtype=np.uint32).view(np.float32)


def rounded(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The truth, as stored bits: numpy's conversion to fp16, torch's to bf16."""
    if dtype is torch.float16:
        with np.errstate(over="ignore", invalid="ignore"):
            return values.astype(np.float16)
    return array_of(torch.from_numpy(values).to(torch.bfloat16))


# ----- the truth itself ---------------------------------------------------------------------------


@halves
def test_the_truth_is_nearest_even_in_exact_arithmetic(dtype):
    def exact(value: float) -> int:
        return int(Fraction(value) * (1 << 150))  # fp32's smallest value is 2^-149

    finite = [exact(v) for v in every_value(dtype)[: 1 << 15].tolist() if math.isfinite(v)]
    finite.append(2 * finite[-1] - finite[-2])  # stored as the pattern of infinity
    values = ties(dtype)
    sample = values[~np.signbit(values) & (values < np.inf)]
    found = rounded(sample, dtype).view(np.uint16)
    for value, pattern in zip(sample.tolist(), found.tolist(), strict=True):
        above = min(bisect_right(finite, exact(value)), len(finite) - 1)
        gap = (exact(value) - finite[above - 1]) - (finite[above] - exact(value))
        up = gap > 0 or (gap == 0 and above % 2 == 0)
        assert pattern == (above if up else above - 1), value.hex()


# ----- csrc/types.h -------------------------------------------------------------------------------

_SOURCE = """
#include "types.h"
using namespace pyupdate;
#define BOTH(type)                                                              \\
  extern "C" void load_##type(const uint16_t* from, float* to, int64_t n) {     \\
    for (int64_t i = 0; i < n; ++i) to[i] = load(type{from[i]});                \\
  }                                                                             \\
  extern "C" void store_##type(const float* from, uint16_t* to, int64_t n) {    \\
    for (int64_t i = 0; i < n; ++i) store(from[i], reinterpret_cast<type*>(to) + i); \\
  }
BOTH(bf16) BOTH(fp16)
"""

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@pytest.fixture(scope="module")
def types_h(tmp_path_factory):
    return shared_library(_SOURCE, tmp_path_factory.mktemp("types"))


def call(function: object, source: np.ndarray, kind: type) -> np.ndarray:
    out = np.empty(source.shape, kind)
    function(*(ctypes.c_void_p(a.ctypes.data) for a in (source, out)), ctypes.c_int64(out.size))
    return out


@halves
def test_compiled_loads_are_exact(dtype, types_h):
    found = call(getattr(types_h, f"load_{_NAMES[dtype]}"), PATTERNS, np.float32)
    assert_same_bits(found, every_value(dtype).float(), "load")
    assert_same_bits(oracle.load(array_of(every_value(dtype))), found, "the oracle's load")


def stores(dtype: torch.dtype, types_h: ctypes.CDLL) -> dict[str, object]:
    """Every way in which a back end rounds."""
    like = array_of(torch.empty(0, dtype=dtype))
    compiled = getattr(types_h, f"store_{_NAMES[dtype]}")
    return {
        "types.h": lambda values: call(compiled, values, np.uint16).view(like.dtype),
        "oracle": lambda values: oracle.store(values, np.empty(values.shape, like.dtype)),
        "reference": lambda values: array_of(torch.from_numpy(values).to(dtype)),
    }


@halves
@pytest.mark.parametrize("values", [ties, lambda _: random_patterns(1 << 20)], ids=["ties", "any"])
def test_stores_round_to_nearest_even(dtype, values, types_h):
    given = values(dtype)
    for name, store in stores(dtype, types_h).items():
        assert_same_bits(store(given), rounded(given, dtype), name)


@pytest.mark.slow
@halves
def test_stores_round_every_fp32_value_to_nearest_even(dtype, types_h):
    block = 1 << 26
    compiled = getattr(types_h, f"store_{_NAMES[dtype]}")
    for start in range(0, 1 << 32, block):
        given = np.arange(start, start + block, dtype=np.uint32).view(np.float32)
        truth = array_of(torch.from_numpy(given).to(dtype))  # numpy takes 6 minutes for fp16
        found = call(compiled, given, np.uint16).view(truth.dtype)
        assert_same_bits(found, truth, f"from pattern {start:#x}")


# ----- through a step of every back end -----------------------------------------------------------


def steps_of_sgd(param: torch.Tensor, *grads: torch.Tensor, **options: float) -> torch.Tensor:
    made = torch.nn.Parameter(param.clone())
    torch_steps(pyupdate.optim.SGD([made], **options), [made], [[grad] for grad in grads])
    return made


@halves
def test_every_pattern_survives_a_step_that_moves_nothing(dtype, backend):
    # p - 0 * 0 = p, -0 and subnormals included.
    values = every_value(dtype)
    found = steps_of_sgd(values, torch.zeros_like(values), lr=0.0)
    assert_same_bits(found, array_of(values), backend)


@halves
def test_every_pattern_survives_in_the_state(dtype, backend):
    # b <- g at first, then b * 1 + (-0) * 0 = b: every pattern is stored, loaded, stored.
    values = every_value(dtype)
    param = torch.nn.Parameter(torch.zeros_like(values))
    optimizer = pyupdate.optim.SGD([param], lr=1.0, momentum=1.0, dampening=1.0)
    torch_steps(optimizer, [param], [[values], [-torch.zeros_like(values)]])
    assert_same_bits(optimizer.state[param]["momentum_buffer"], array_of(values), backend)


@halves
def test_every_gradient_is_read_and_its_product_rounded_once(dtype, isas, compiled):
    # 0 - lr * g is -fl(lr * g): every pattern as a gradient, times learning rates of all sizes.
    values = every_value(dtype)
    wide = values.float().numpy()
    rng = np.random.default_rng(52)
    for lr in (1.0, *(float(np.float32(x)) for x in np.exp2(rng.uniform(-40, 40, 16)))):
        with np.errstate(over="ignore", invalid="ignore"):
            product = np.float32(0.0) - np.float32(lr) * wide
        truth = rounded(product, dtype)
        for isa in isas:
            compiled.use_isa(isa)
            found = steps_of_sgd(torch.zeros_like(values), values, lr=lr)
            assert_same_bits(found, truth, f"{isa}, lr {lr}")
        with pyupdate.use_backend("reference"):
            found = steps_of_sgd(torch.zeros_like(values), values, lr=lr)
            assert_same_bits(found, truth, f"reference, lr {lr}")


@halves
@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("values", [ties, lambda _: random_patterns(1 << 17)], ids=["ties", "any"])
def test_a_kernel_rounds_every_number_as_types_h_does(dtype, values, isa):
    # -0 - 1 * (b * 1 + -0) = -b, for a buffer b in fp32: whatever number is stored as a half. A
    # piece of a row that ends anywhere is converted by other code than a whole one.
    given = values(dtype)[:-3]
    zero = torch.full((given.size,), -0.0, dtype=dtype)
    param = torch.nn.Parameter(zero.clone())
    options = {"lr": 1.0, "momentum": 1.0, "state_dtype": torch.float32}
    optimizer = pyupdate.optim.SGD([param], **options)
    torch_steps(optimizer, [param], [[zero]])
    optimizer.state[param]["momentum_buffer"].copy_(torch.from_numpy(-given))
    with torch.no_grad():
        param.copy_(zero)
    torch_steps(optimizer, [param], [[zero]])
    assert_same_bits(param, rounded(given, dtype), isa)


@halves
def test_ties_of_a_step_round_to_even(dtype, backend):
    # p - lr * 1 with lr half of the last place of every normal p: a tie each, in both directions.
    values = every_value(dtype)
    wide = values.float()
    mantissa = -int(math.log2(torch.finfo(dtype).eps))
    for exponent in (-10, -1, 0, 5, 14):
        binade = (wide.abs() >= 2.0**exponent) & (wide.abs() < 2.0 ** (exponent + 1))
        start = values[binade]
        for sign in (1.0, -1.0):
            half_place = 2.0 ** (exponent - mantissa - 1)
            grad = torch.full_like(start, sign)
            found = steps_of_sgd(start, grad, lr=half_place)
            truth = rounded((start.float() - sign * half_place).numpy(), dtype)
            assert_same_bits(found, truth, f"{backend}, 2^{exponent}")
            # Even: the last bit of every result is 0.
            if exponent != 14:
                inside = (tensor_of(truth).float().abs() >= 2.0**exponent).numpy()
                assert not (truth.view(np.uint16)[inside] & 1).any()
