# SPDX-License-Identifier: Apache-2.0
"""Optimizers trained by the Triton back end and by the one of the CPU, for their comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from bits import assert_same_bits, random_values
from cases import FULL, FULL_OTHERS
from device.triton_backend import triton_backend

import pyupdate
from pyupdate.pytorch.engines import last_step

SIZES = (0, 1, 5, 70, 1025, 16_383, 16_384, 16_385)
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    **{case.name: (case.torch_class.__name__, case.options) for case in (*FULL, *FULL_OTHERS)},
    "schedulefree_adamw": ("ScheduleFreeAdamW", {"lr": 0.003}),
    "adafactor": ("Adafactor", {"lr": 0.01}),
    "lars": ("LARS", {"lr": 0.1}),
    "lars_momentum": ("LARS", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "lamb": ("LAMB", {"lr": 0.01, "weight_decay": 0.1}),
    "novograd": ("NovoGrad", {"lr": 0.01}),
    "stable_adamw": ("StableAdamW", {"lr": 0.01, "weight_decay": 0.1}),
}
OTHER_CAPABILITIES = (80, 100, 120)

ALL_OPTIONS = {"max_norm": 1.0, "clip_value": 0.01, "ema_decay": 0.75, "stochastic_rounding": True}
OPTIONS: dict[str, tuple[tuple[torch.dtype, ...], dict[str, Any]]] = {
    "max_norm": ((torch.float32, torch.float64), {"max_norm": 1.0}),
    "inf norm": ((torch.bfloat16,), {"max_norm": 0.5, "norm_type": math.inf}),
    "clip_value": ((torch.float32,), {"clip_value": 0.1}),
    "average": ((torch.bfloat16, torch.float64), {"ema_decay": 0.75}),
    "by chance": (
        (torch.bfloat16, torch.float16),
        {"stochastic_rounding": True, "seed": 2**62 + 5},
    ),
    "all": ((torch.float16,), ALL_OPTIONS | {"maximize": True}),
}

Made = tuple[list[torch.Tensor], list[dict[str, Any]], list[Any]]


readers = pytest.mark.parametrize("by_compiled", [True, False], ids=["by C++", "by Python"])
"""Who reads the tensors anew at every step."""


def gradients(
    sizes: Sequence[int], dtypes: Sequence[torch.dtype], steps: int
) -> list[list[torch.Tensor]]:
    rng = np.random.default_rng(7)
    return [[random_values(rng, n, kind) for kind in dtypes for n in sizes] for _ in range(steps)]


def trained(
    rule: str,
    dtypes: Sequence[torch.dtype],
    grads: Sequence[Sequence[torch.Tensor | None]],
    sizes: Sequence[int] = SIZES,
    **options: Any,
) -> Made:
    """Parameters, state and what was said of each step."""
    rng = np.random.default_rng(3)
    params = [torch.nn.Parameter(random_values(rng, n, kind)) for kind in dtypes for n in sizes]
    kind, own = RULES[rule]
    optimizer = getattr(pyupdate.optim, kind)(params, **{**own, **options})
    said = []
    for row in grads:
        for param, grad in zip(params, row, strict=True):
            param.grad = None if grad is None else grad.clone()
        optimizer.step()
        last = last_step(optimizer)
        assert last is not None
        said.append((last.norm, last.skipped, last.multiplier))
    return [p.detach() for p in params], [optimizer.state[p] for p in params], said


def assert_alike(found: Made, expected: Made, what: str) -> None:
    assert found[2] == expected[2], what
    for i, (x, y) in enumerate(zip(found[0], expected[0], strict=True)):
        assert_same_bits(x, y, f"{what}, parameter {i}")
    for mine, theirs in zip(found[1], expected[1], strict=True):
        assert set(mine) == set(theirs), what
        for key, value in theirs.items():
            assert_same_bits(torch.as_tensor(mine[key]), torch.as_tensor(value), f"{what}, {key}")


def check(
    rule: str, dtypes: Sequence[torch.dtype], *, capability: int = 90, order: int = 0, **more: Any
) -> None:
    grads = gradients(more.get("sizes", SIZES), dtypes, 3)
    with triton_backend(capability) as machine:
        machine.order_seed = order
        found = trained(rule, dtypes, grads, **more)
    assert machine.launches
    with pyupdate.use_backend("cpu"):
        expected = trained(rule, dtypes, grads, **more)
    assert_alike(found, expected, f"{rule}, sm_{capability}")
