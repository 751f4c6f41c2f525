# SPDX-License-Identifier: Apache-2.0
"""The numpy oracle: one step of a rule on arrays, in fp64 or fp32, bit for bit what back ends do.

Storage narrower than fp32 (fp16; bf16 as uint16 bit patterns) is computed in fp32 and rounded once.
Used by the self-test of ``python -m pyupdate`` and by the tests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import rounding
from .bind import bind
from .language import Rule, named_results
from .reduction import largest_of_row, sum_of_row
from .rules import averaged, clipped, magnitude, squared

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


def load(stored: Array) -> Array:
    """The compute-type value of what is stored; uint16 is read as bf16."""
    import numpy as np

    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float64 if stored.dtype == np.float64 else np.float32)


def store(value: Array, like: Array, key: int | None = None) -> Array:
    """`value` rounded in the storage of `like`: to nearest even, or halves by chance with a key."""
    import numpy as np

    if key is not None and like.dtype.itemsize == 2:
        flat = np.ascontiguousarray(value, np.float32).reshape(-1)
        drawn = rounding.draws(key, np.arange(flat.size))
        convert = rounding.to_bf16 if like.dtype == np.uint16 else rounding.to_fp16
        patterns: Array = convert(flat.view(np.uint32).astype(np.int64), drawn).astype(np.uint16)
        return patterns.view(like.dtype).reshape(like.shape)
    if like.dtype != np.uint16:
        with np.errstate(over="ignore"):
            return value.astype(like.dtype)
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(value), quiet_nan, rounded).astype(np.uint16).reshape(like.shape)


def step(
    rule: Rule,
    param: Array,
    grad: Array,
    state: Mapping[str, Array],
    numbers: Sequence[float],
    *,
    count: int,
    multiplier: float = 1.0,
    clip_value: float = math.inf,
    chance: tuple[int, int] | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The parameter and state after step `count` (the first is 1), as new arrays.

    Args:
        rule: an entry of `rules.RULES`, or one of the user's.
        param: any shape; fp64, fp32, fp16, or uint16 that holds bf16.
        grad: same shape and dtype.
        state: by the rule's names, same shape, in whatever dtype each is stored; scalars are of no
            dimension.
        numbers: what the rule's prepare takes after the step count.
        count: the step that is made.
        multiplier: of the gradient: unscale x clip, negative where the group maximizes.
        clip_value: the bound of each element of the multiplied gradient.
        chance: the seed and the parameter's number of `rounding.key_of`, for stochastic rounding;
            elements are in the order of the arrays.
    """
    import numpy as np

    compute = np.float64 if param.dtype == np.float64 else np.float32
    scalars = {name: float(state[name]) for name in rule.scalars}
    hypers, counted = rule.prepared(count, numbers, scalars)
    scalars |= counted
    known: dict[str, Any] = {name: compute(value) for name, value in hypers.items()}
    known["param"] = load(param)
    known |= {name: load(state[name]) for name in rule.state}
    per_tensor: dict[str, float] = {"numel": float(param.size)}
    with np.errstate(all="ignore"):
        scaled = load(grad) * compute(multiplier)
        known["grad"] = bind(clipped, "numpy")(scaled, compute(clip_value))
        for turn, stage in enumerate(rule.stages):
            function = bind(stage.function.text, "numpy")
            out = function(*(known[name] for name in stage.function.arguments))
            for name, value in named_results(stage.function, out).items():
                if name in stage.sums:
                    per_tensor[name] = _sum(value)
                else:  # a later stage reads what was stored
                    key = None
                    if chance is not None:
                        seed, number = chance
                        role = rule.elements.index(name)
                        key = rounding.key_of(seed, count, number, turn, role)
                    like = param if name == "param" else state[name]
                    known[name] = load(store(value, like, key))
            if stage.turn is not None:
                places = hypers | scalars | per_tensor
                turned = stage.turn.text(*(places[name] for name in stage.turn.arguments))
                for name, left in named_results(stage.turn, turned).items():
                    (scalars if name in scalars else per_tensor)[name] = left
            known |= {name: compute(per_tensor[name]) for name in stage.leaves}
    made = {name: store(known[name], state[name]) for name in rule.state}
    made |= {name: np.asarray(scalars[name], state[name].dtype) for name in rule.scalars}
    return store(known["param"], param), made


def sum_of_squares(grad: Array, unscale: float = 1.0) -> float:
    """What the reduce pass finds for one row of unscaled gradient."""
    with _quiet():
        scaled = load(grad).reshape(-1)
        return _sum(bind(squared, "numpy")(scaled * scaled.dtype.type(unscale)))


def average(before: Array, param: Array, weight: float) -> Array:
    """The average of a parameter after a step that stored `param`; `before` is of compute type."""
    with _quiet():
        moved: Array = bind(averaged, "numpy")(before, load(param), before.dtype.type(weight))
        return moved


def largest_magnitude(grad: Array, unscale: float = 1.0) -> float:
    """What the reduce pass of the inf norm finds for one row of unscaled gradient."""
    with _quiet():
        scaled = load(grad).reshape(-1)
        return largest_of_row(bind(magnitude, "numpy")(scaled * scaled.dtype.type(unscale)))


def _sum(values: Array) -> float:
    import numpy as np

    flat = values.reshape(-1)
    return sum_of_row(flat, lambda n: np.zeros(n, flat.dtype), lambda x: x.astype(np.float64))


def _quiet() -> Any:
    import numpy as np

    return np.errstate(all="ignore")
