# SPDX-License-Identifier: Apache-2.0
"""What the tests of Adafactor step, and how near a mean's rounding lets it come to torch's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

SHAPES = ((), (1,), (7,), (8, 3), (33, 2), (2, 3, 4), (1025,), (8, 3), (7,), (), (1, 1))


def values(seed: int, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.tensor(rng.standard_normal(shape)).to(dtype) for shape in shapes]


def params_of(dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    return [nn.Parameter(value) for value in values(1, dtype, shapes)]


def give(params: Sequence[nn.Parameter], grads: Sequence[torch.Tensor]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, scale: torch.Tensor, what: str) -> None:
    """Within 8 roundings of `scale`, for a mean is some off, and each side takes its own."""
    bound = 8 * torch.finfo(ours.dtype).eps * scale.double()
    error = (ours.double() - theirs.double()).abs()
    assert (error <= bound).all(), f"{what}: {(error / bound).max()} of the bound"
