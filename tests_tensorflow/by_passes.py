# SPDX-License-Identifier: Apache-2.0
"""What the tests of the compiled passes step."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from pyupdate.tensorflow import passes

PATH = passes.PATH
SIZES = [7, 130, 1, 0, 33]


def drawn(seed: int, sizes: list[int], dtype: Any = np.float32) -> list[Any]:
    given = np.random.default_rng(seed)
    return [given.normal(size=size).astype(dtype) for size in sizes]


def scaled(inner: Any, scale: float = 1024.0) -> Any:
    return keras.optimizers.LossScaleOptimizer(inner, initial_scale=scale, dynamic_growth_steps=2)


def state_of(optimizer: Any) -> list[np.ndarray[Any, Any]]:
    return [variable.numpy() for variable in optimizer.variables]
