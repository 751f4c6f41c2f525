# SPDX-License-Identifier: Apache-2.0
"""What a model keeps for its options: sums of micro-batches, averages of its variables.

A ``tf.Module`` on the model (``model.update_state``), so that a ``tf.train.Checkpoint`` of the
model carries it; nothing is added to the user's optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from pyupdate.options import Options


class State(tf.Module):  # type: ignore[misc]
    """Sums, averages and what the last step found, for variables in the model's order."""

    def __init__(self, variables: Sequence[Any], options: Options) -> None:
        super().__init__(name="update_state")
        self.sums: list[Any] = []
        self.averages: list[Any] = []
        self._of = tuple(variables)
        with tf.init_scope():
            if options.accumulation_steps > 1:
                self.sums = [_variable(tf.zeros(v.shape, _wide(v.dtype))) for v in variables]
                self.position = _variable(tf.zeros([], tf.int64))
                self.found = [_variable(tf.zeros([])) for _ in range(3)]
            if options.ema_decay is not None:
                self.averages = [_variable(tf.cast(v, _wide(v.dtype))) for v in variables]

    def holds(self, variables: Sequence[Any]) -> bool:
        """Whether it was made for these variables."""
        return len(variables) == len(self._of) and all(
            a is b for a, b in zip(self._of, variables, strict=True)
        )

    def add(self, grads: Sequence[Any], unscale: Any, steps: int) -> Any:
        """Add a micro-batch to the sums; whether it was the last one of `steps`."""
        part = unscale / float(steps)
        for total, grad in zip(self.sums, grads, strict=True):
            total.assign_add(tf.cast(grad, total.dtype) * tf.cast(part, total.dtype))
        return self.position.assign_add(1, read_value=True) >= steps

    def means(self) -> list[Any]:
        """The means of the micro-batches."""
        return [tf.identity(total) for total in self.sums]

    def clear(self) -> None:
        """Begin anew."""
        for total in self.sums:
            total.assign(tf.zeros_like(total))
        self.position.assign(0)

    def keep(self, found: Sequence[Any]) -> None:
        """Remember what a step found, which calls that only add up report."""
        for variable, value in zip(self.found, found, strict=True):
            variable.assign(value)

    def latest(self) -> tuple[Any, ...]:
        """What the last step found."""
        return tuple(tf.identity(variable) for variable in self.found)

    def average(self, weight: float) -> None:
        """Move every average towards its variable."""
        for average, variable in zip(self.averages, self._of, strict=True):
            now = tf.cast(variable, average.dtype)
            average.assign_add((now - average) * tf.cast(weight, average.dtype))


def _variable(value: Any) -> Any:
    return tf.Variable(value, trainable=False)


def _wide(dtype: Any) -> Any:
    return tf.float32 if dtype.size < 4 else dtype
