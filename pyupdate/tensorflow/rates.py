# SPDX-License-Identifier: Apache-2.0
"""Learning rates that a function of the user's says: asked once a step, and never a trace's.

A trace would hold what the function said when it was made. So an eager step asks it and writes the
answer to a variable, which the trace reads in the function's place. One that gives a tensor
computed from variables, as ``optimizer.iterations``, is traced with them instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import tensorflow as tf

from ..remembered import Remembered
from . import optimizers

Rates = dict[int, tf.Variable]
"""By the optimizer's `id`."""

_reads_variables: Remembered[bool] = Remembered()
_kept: Remembered[tuple[Any, Any]] = Remembered()
"""Of an optimizer, the variable and what it holds."""


def is_function(rate: Any) -> bool:
    """Whether a learning rate is a plain function, no schedule and no variable."""
    return callable(rate) and not optimizers.home(rate) and not isinstance(rate, tf.Variable)


def asked(function: Any) -> Any:
    """What a learning-rate function says now; None where it is to be traced."""
    value = function()
    if isinstance(value, tf.Variable) or optimizers.home(value):
        return None
    if not tf.is_tensor(value):
        return value
    if not hasattr(value, "numpy"):  # somebody traces
        return None
    reads = _reads_variables.get(function)
    if reads is None:
        traced = tf.function(function, autograph=False).get_concrete_function()
        reads = any(given.dtype == tf.resource for given in traced.captured_inputs)
        _reads_variables[function] = reads
    return None if reads else value.numpy()


def fed(optimizer: Any) -> Rates:
    """Ask the learning-rate functions of an optimizer; what each said is in its variable."""
    found: Rates = {}
    for one in optimizers.parts(optimizer):
        function = getattr(one, "_learning_rate", None)
        if optimizers.home(one) == "keras" and is_function(function):
            value = asked(function)
            if value is not None and np.asarray(value).dtype.kind in "fiu" and not np.shape(value):
                found[id(one)] = _written(one, value)
    return found


def _written(optimizer: Any, value: Any) -> Any:
    # Of a number in Python what TensorFlow makes of it, by which a gradient can be multiplied.
    array = np.asarray(value, None if isinstance(value, np.generic | np.ndarray) else np.float32)
    kept = _kept.get(optimizer)
    if kept is None or kept[1].dtype != array.dtype:
        with tf.init_scope():
            kept = (tf.Variable(array, trainable=False), array)
    elif kept[1].tobytes() != array.tobytes():
        kept[0].assign(array)
    _kept[optimizer] = (kept[0], array)
    return kept[0]


@contextmanager
def read(optimizer: Any, variables: list[Any]) -> Iterator[None]:
    """The optimizer reads these variables where it would ask its functions.

    Args:
        optimizer: that makes the step.
        variables: of it and its parts, in their order; None where nothing is asked.
    """
    with ExitStack() as stack:
        for one, variable in zip(optimizers.parts(optimizer), variables, strict=False):
            if variable is not None:
                rate = optimizers.replaced(one, _learning_rate=variable.read_value)
                stack.enter_context(rate)
        yield
