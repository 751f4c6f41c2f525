# SPDX-License-Identifier: Apache-2.0
"""The order in which XLA computes a step on a CPU: a variable's moments, and soon the variable.

XLA makes a loop for each thing that is written, and of an optimizer that keeps moments it runs
those of all moments before those of the variables, so that every moment comes from memory a second
time. Only data holds a loop back. So a gradient waits for a variable that was stepped shortly
before: its bits are or-ed with a zero that is computed of it, which XLA does not know to be one.
Of a scaled and clipped Adam step of 60 variables of 4.94 million numbers that saves 5 %.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import tensorflow as tf

from . import optimizers

AHEAD = 3
"""So many variables are in work at a time: with 2 the cores wait for each other, and 5 are as 3."""

LARGE = 2**14
"""Numbers of a variable that is worth it: smaller ones stay in the cache."""


@contextmanager
def kept(optimizer: Any, compiled: bool) -> Iterator[None]:
    """An optimizer of Keras 3 is traced so inside; what it computes keeps every bit.

    Args:
        optimizer: that makes the step.
        compiled: whether the trace is for XLA on a CPU; else nothing is done.
    """
    stepped: list[Any] = []
    with ExitStack() as stack:
        for one in optimizers.parts(optimizer):
            asked = compiled and not tf.executing_eagerly() and hasattr(one, "update_step")
            if asked and optimizers.home(one) == "keras":
                waiting = _waiting(one.update_step, stepped)
                stack.enter_context(optimizers.replaced(one, update_step=waiting))
        yield


def _waiting(step: Any, stepped: list[Any]) -> Any:
    def waits(grad: Any, variable: Any, *rest: Any) -> None:
        large = grad.dtype == tf.float32 and variable.shape.num_elements() >= LARGE
        if large and len(stepped) >= AHEAD:
            grad = _after(grad, stepped[-AHEAD])
        step(grad, variable, *rest)
        if large and variable.dtype == tf.float32:
            stepped.append(tf.convert_to_tensor(variable))

    return waits


def _after(grad: Any, value: Any) -> Any:
    """The gradient, but not before that value."""
    bits = tf.bitcast(tf.reshape(value, [-1])[0], tf.uint32)
    sign = tf.bitwise.right_shift(bits, tf.constant(31, tf.uint32))
    zero = tf.bitwise.right_shift(sign, tf.constant(1, tf.uint32))
    return tf.bitcast(tf.bitwise.bitwise_or(tf.bitcast(grad, tf.uint32), zero), tf.float32)
