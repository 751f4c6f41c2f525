# SPDX-License-Identifier: Apache-2.0
"""Stored bits: between torch and numpy, compared exactly; and the numpy oracle step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from cases import Case

from pyupdate.kernels import oracle

Array = np.ndarray[Any, Any]

_BITS = {8: np.uint64, 4: np.uint32, 2: np.uint16}


def array_of(tensor: torch.Tensor) -> Array:
    """The stored values as numpy holds them, bf16 as uint16; shares the memory."""
    plain = tensor.detach()
    return (plain.view(torch.uint16) if plain.dtype is torch.bfloat16 else plain).numpy()


def tensor_of(array: Array) -> torch.Tensor:
    """The other way; a uint16 array is bf16. Shares the memory."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype is torch.uint16 else tensor


def compute_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def assert_same_bits(actual: Any, expected: Any, what: str) -> None:
    """Equal to the bit, but that a nan may be any nan."""
    a, b = (array_of(x) if isinstance(x, torch.Tensor) else x for x in (actual, expected))
    assert (a.shape, a.dtype) == (b.shape, b.dtype), what
    bits = _BITS[a.dtype.itemsize]
    if np.array_equal(a.view(bits), b.view(bits)):
        return
    x, y = oracle.load(a), oracle.load(b)
    wrong = np.flatnonzero(((a.view(bits) != b.view(bits)) & ~(np.isnan(x) & np.isnan(y))).ravel())
    if wrong.size:
        i = wrong[0]
        found = f"{float(x.ravel()[i]).hex()} instead of {float(y.ravel()[i]).hex()}"
        raise AssertionError(f"{what}: {wrong.size} of {a.size} differ, first at {i}: {found}")


def initial_state(
    case: Case, param: Array, state_dtype: torch.dtype | None = None
) -> dict[str, Array]:
    """State before the first step, scalars in the type that torch gives them."""
    like = oracle.load(param)
    stored = like if state_dtype is not None and param.itemsize == 2 else param
    numbers = dict(zip(case.rule.numbers, case.numbers()[1], strict=True))
    numbers["param"] = like

    def begin(initial: float | str) -> Any:
        return numbers[initial] if isinstance(initial, str) else initial

    state = {
        name: oracle.store(np.zeros_like(like) + begin(value), stored)
        for name, value in case.rule.state.items()
    }
    wide = torch.get_default_dtype() is torch.float64
    scalar = np.float64 if wide else np.float32
    return state | {n: np.asarray(begin(v), scalar) for n, v in case.rule.scalars.items()}


def oracle_steps(
    case: Case,
    param: Array,
    grads: Sequence[Array],
    multipliers: Sequence[float] | None = None,
    state_dtype: torch.dtype | None = None,
    **more: float,
) -> tuple[Array, dict[str, Array]]:
    """Parameter and state after a step on each gradient."""
    sign, numbers = case.numbers()
    state = initial_state(case, param, state_dtype)
    for i, grad in enumerate(grads):
        multiplier = sign * (1.0 if multipliers is None else multipliers[i])
        param, state = oracle.step(
            case.rule, param, grad, state, numbers, count=i + 1, multiplier=multiplier, **more
        )
    return param, state


def random_values(rng: np.random.Generator, n: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal values of quite different sizes, one in sixteen a zero of either sign."""
    values = rng.standard_normal(n) * np.exp2(rng.integers(-6, 3, n))
    values *= np.where(rng.random(n) < 1 / 16, 0.0, 1.0)
    return torch.from_numpy(values).to(dtype)


def torch_steps(
    optimizer: torch.optim.Optimizer,
    params: Sequence[torch.Tensor],
    grads: Sequence[Sequence[torch.Tensor]],
) -> None:
    """A step on each row of gradients."""
    for row in grads:
        for param, grad in zip(params, row, strict=True):
            param.grad = grad
        optimizer.step()


def joined(tensors: Sequence[torch.Tensor]) -> Array:
    return array_of(torch.cat([tensor.detach().reshape(-1) for tensor in tensors]))
