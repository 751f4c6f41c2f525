# SPDX-License-Identifier: Apache-2.0
"""Gradients of a loss's mean, taken behind the tape's back and made dense."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tensorflow as tf

_log = logging.getLogger("pyupdate")


@contextmanager
def not_recorded(tape: Any) -> Iterator[None]:
    """Nothing that is done inside is recorded by the tape."""
    if not tape._recording:
        yield
        return
    with tape.stop_recording():
        yield


def taken(
    name: str, tape: Any, loss: Any, variables: Sequence[Any], scale: Any, count: int
) -> list[Any]:
    """The gradients of ``scale * mean(loss) / count``; None where it does not reach a variable.

    Neither the mean nor the scale can be recorded, so both are the gradient that comes in.

    Raises:
        RuntimeError: the tape of the model of that name has given gradients before.
    """
    kind = tf.float64 if loss.dtype == tf.float64 else tf.float32
    factor = tf.constant(1.0, kind) if scale is None else tf.cast(scale, kind)
    elements = tf.cast(tf.size(loss), kind)
    seed = tf.fill(tf.shape(loss), tf.cast(factor / (count * elements), loss.dtype))
    try:
        found: list[Any] = tape.gradient(loss, list(variables), output_gradients=seed)
    except RuntimeError as error:
        if "non-persistent" not in str(error):
            raise
        message = (
            f"the tape was used before the update of '{name}': give each call a tape of its own, "
            "or make one for several by tf.GradientTape(persistent=True)"
        )
        raise RuntimeError(message) from error
    return found


def dense(grad: Any, variable: Any) -> Any:
    """A gradient as a dense tensor: rows that an embedding used twice are added; none is zeros.

    Keras's optimizers take the rows one by one, so that Adam moves a row twice as often as it
    should, and the norm of a sum is not that of its parts.
    """
    if grad is None:
        return tf.zeros(variable.shape, variable.dtype)
    if not isinstance(grad, tf.IndexedSlices):
        return grad
    rows = tf.cast(variable.shape[0], grad.indices.dtype)
    return tf.math.unsorted_segment_sum(grad.values, grad.indices, rows)


def reached(
    name: str, grads: Sequence[Any], variables: Sequence[Any], warned: set[str]
) -> list[int]:
    """The positions of the gradients that there are; the others are warned about, once a model.

    Raises:
        ValueError: there are none.
    """
    there = [i for i, grad in enumerate(grads) if grad is not None]
    if not there:
        message = (
            f"the loss reaches no trainable variable of '{name}': it does not depend on the model, "
            "was computed outside of the tape, or the tape (not persistent) was used before. "
            "Compute it from the model's outputs inside `with tf.GradientTape() as tape:`, one "
            "tape for each call"
        )
        raise ValueError(message)
    if len(there) < len(grads) and name not in warned:
        warned.add(name)
        missing = [_path(variables[i]) for i, grad in enumerate(grads) if grad is None]
        _log.warning(
            "'%s': the loss does not reach %s; such variables are not stepped",
            name,
            ", ".join(missing),
        )
    return there


def _path(variable: Any) -> str:
    return str(getattr(variable, "path", variable.name))
