# SPDX-License-Identifier: Apache-2.0
"""The one order of addition: an element-by-element statement of it against every implementation."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from bits import array_of, compute_type, random_values
from cases import DTYPES, name_of
from hypothesis import given, settings
from hypothesis import strategies as st

import pyupdate
from pyupdate.kernels import oracle
from pyupdate.kernels.reduction import CHUNK, LANES, halving_tree, sum_of_row
from pyupdate.kernels.rules import multiplier
from pyupdate.pytorch.engines import last_step

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)

# Around a lane's first reuse, a chunk's end, and odd numbers of chunks.
SIZES = (0, 1, 2, 7, 2_047, 2_048, 2_049, 4_096, 16_383, 16_384, 16_385, 40_001, 100_003)


# ----- the order, said once more, one element at a time ------------------------------------------


def tree(values: list[float]) -> float:
    """Pad with zeros to a power of two; the first half adds the second, until one is left."""
    if not values:
        return 0.0
    width = 1
    while width < len(values):
        width *= 2
    padded = values + [0.0] * (width - len(values))
    while len(padded) > 1:
        half = len(padded) // 2
        padded = [padded[i] + padded[half + i] for i in range(half)]
    return padded[0]


def sum_by_element(values: np.ndarray) -> float:
    """Chunks of 16,384, 2,048 lanes in the values' own type, then trees in fp64."""
    chunks = []
    for start in range(0, len(values), 16_384):
        lanes = [values.dtype.type(0)] * 2_048
        for i, value in enumerate(values[start : start + 16_384]):
            lanes[i % 2_048] = lanes[i % 2_048] + value
        chunks.append(tree([float(lane) for lane in lanes]))
    return tree(chunks)


def squares(grad: torch.Tensor) -> np.ndarray:
    values = grad.to(compute_type(grad.dtype)).numpy()
    return values * values


def test_the_constants_are_those_of_the_contract():
    assert (CHUNK, LANES) == (16_384, 2_048)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", SIZES)
def test_sum_of_row_adds_in_the_order_of_the_contract(size, dtype):
    values = np.random.default_rng(size).standard_normal(size).astype(dtype)
    found = sum_of_row(values, lambda n: np.zeros(n, dtype), lambda x: x.astype(np.float64))
    assert found == sum_by_element(values)
    in_torch = torch.from_numpy(values)
    assert sum_of_row(in_torch, in_torch.new_zeros, torch.Tensor.double) == found
    exact = float(sum(map(Fraction, values.tolist()), Fraction(0)))
    # A lane adds up to 8 values: 7 roundings; the trees add 11 and few more in fp64.
    slack = 8 * np.finfo(dtype).eps * float(np.abs(values).sum(dtype=np.float64))
    assert abs(found - exact) <= slack


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(width=64), max_size=70))
def test_the_halving_tree_pads_with_zeros(values):
    found, expected = halving_tree(values), tree(list(values))
    assert found == expected or (math.isnan(found) and math.isnan(expected))


def test_the_order_shows_in_the_bits():
    """Other orders give other bits for this data, so the tests below would notice them."""
    values = np.random.default_rng(3).standard_normal(100_003).astype(np.float32) ** 2
    found = sum_by_element(values)
    assert found != float(np.cumsum(values, dtype=np.float32)[-1])
    assert found != math.fsum(values.tolist())
    assert found != sum_by_element(values[::-1].copy())
    assert found != sum_by_element(np.roll(values, 1))


# ----- every back end takes it -------------------------------------------------------------------


def norm_of(grads: list[torch.Tensor], params: list[torch.Tensor] | None = None) -> float | None:
    """What a step of these gradients finds."""
    values = [torch.zeros_like(grad) for grad in grads] if params is None else params
    made = [torch.nn.Parameter(value) for value in values]
    optimizer = pyupdate.optim.SGD(made, lr=0.0, max_norm=1.0)
    for param, grad in zip(made, grads, strict=True):
        param.grad = grad
    optimizer.step()
    last = last_step(optimizer)
    assert last is not None
    return last.norm


@every_dtype
def test_a_row_of_every_size_has_the_norm_of_the_contract(dtype, isas, threads, compiled):
    rng = np.random.default_rng(31)
    for size in SIZES:
        grad = random_values(rng, size, dtype)
        expected = math.sqrt(sum_by_element(squares(grad)))
        assert math.sqrt(oracle.sum_of_squares(array_of(grad))) == expected
        with pyupdate.use_backend("reference"):
            assert norm_of([grad]) == expected, size
        for isa, n in product(isas, threads):
            compiled.use_isa(isa)
            torch.set_num_threads(n)
            assert norm_of([grad]) == expected, (size, isa, n)


@every_dtype
def test_rows_are_added_by_the_tree_in_their_order(dtype, backend):
    rng = np.random.default_rng(32)
    for count in (1, 2, 3, 5, 37):
        grads = [random_values(rng, 5 + k, dtype) for k in range(count)]
        expected = math.sqrt(tree([sum_by_element(squares(grad)) for grad in grads]))
        assert norm_of(grads) == expected, count


@every_dtype
def test_a_row_without_a_gradient_takes_no_part(dtype, backend):
    rng = np.random.default_rng(33)
    grads = [random_values(rng, 100, dtype) for _ in range(5)]
    made = [torch.nn.Parameter(torch.zeros(100, dtype=dtype)) for _ in range(7)]
    optimizer = pyupdate.optim.SGD(made, lr=0.0, max_norm=1.0)
    for k, grad in zip((0, 1, 3, 4, 6), grads, strict=True):
        made[k].grad = grad
    optimizer.step()
    expected = math.sqrt(tree([sum_by_element(squares(grad)) for grad in grads]))
    last = last_step(optimizer)
    assert last is not None
    assert last.norm == expected


@every_dtype
def test_elements_count_in_the_order_of_the_parameters_memory(dtype, backend):
    # Whatever the strides of the gradient: a sum is invariant to how it is laid out.
    rng = np.random.default_rng(34)
    grad = random_values(rng, 130 * 140, dtype).reshape(130, 140)
    expected = math.sqrt(sum_by_element(squares(grad.reshape(-1))))
    assert norm_of([grad.t().contiguous().t()], [torch.zeros(130, 140, dtype=dtype)]) == expected
    turned = torch.zeros(140, 130, dtype=dtype).t()
    of_turned = math.sqrt(sum_by_element(squares(grad.t().reshape(-1))))
    assert norm_of([grad], [turned]) == of_turned
    assert expected != of_turned or dtype is torch.float64


@every_dtype
def test_the_norm_is_torchs(dtype, backend):
    rng = np.random.default_rng(35)
    grads = [random_values(rng, size, dtype) for size in SIZES]
    truth = torch.cat([grad.double() for grad in grads]).norm().item()
    eps = torch.finfo(compute_type(dtype)).eps
    assert norm_of(grads) == pytest.approx(truth, rel=8 * eps, abs=0.0)


# ----- the multiplier and the finite check --------------------------------------------------------


@pytest.mark.parametrize("norm", [0.0, 1e-30, 0.5, 1.0, 1.0 - 1e-6, 3.0, 1e30, math.inf, math.nan])
@pytest.mark.parametrize("max_norm", [0.0, 0.25, 1.0, 1e10, math.inf])
def test_the_multiplier_is_that_of_clip_grad_norm(norm, max_norm):
    unscale = 0.125
    clip = (max_norm / (torch.tensor(norm, dtype=torch.float64) + 1e-6)).clamp(max=1.0)
    torch.testing.assert_close(
        torch.tensor(multiplier(norm, unscale, max_norm), dtype=torch.float64),
        unscale * clip,
        rtol=1e-15,
        atol=0.0,
        equal_nan=True,
    )
    assert multiplier(norm, unscale, -1.0) == unscale


@every_dtype
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_nonfinite_element_anywhere_is_found(dtype, bad, backend):
    size = 2 * 16_384 + 5
    edges = (0, 1, 2_047, 2_048, 16_383, 16_384, 18_431, 18_432, 32_767, 32_768, size - 1)
    grad = torch.ones(size, dtype=dtype)
    params = [torch.nn.Parameter(torch.ones(n, dtype=dtype)) for n in (3, size, 3)]
    optimizer = pyupdate.optim.AdamW(params)
    for edge in edges:
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.zeros(()))
        broken = grad.clone()
        broken[edge] = bad
        for param, values in zip(params, (grad[:3], broken, grad[:3]), strict=True):
            param.grad = values
        optimizer.step(grad_scaler=scaler)
        last = last_step(optimizer)
        assert last is not None
        assert last.skipped, edge
        assert not optimizer.state
        assert all((param == 1.0).all() for param in params), edge


@every_dtype
def test_finite_gradients_whose_squares_overflow_are_not_called_nonfinite(dtype, backend):
    big = torch.finfo(dtype).max / 2.0
    param = torch.nn.Parameter(torch.ones(20_000, dtype=dtype))
    optimizer = pyupdate.optim.AdamW([param])
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.zeros(()))
    param.grad = torch.full_like(param, big)
    optimizer.step(grad_scaler=scaler)
    last = last_step(optimizer)
    assert last is not None
    assert not last.skipped
    assert math.isinf(last.norm) == (dtype is not torch.float16)
    assert optimizer.state
