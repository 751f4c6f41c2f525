# SPDX-License-Identifier: Apache-2.0
"""The dynamic loss scale, in the variables of the user's own loss-scaling optimizer.

    all finite:     counter <- counter + 1;  at growth_steps:  scale <- 2 scale, counter <- 0
    one that isn't: scale <- scale / 2, counter <- 0

As Keras has it, and within bounds, which Keras has not: halved often enough, its scale is 0 and
every later gradient 0 / 0; doubled often enough, it is inf and stays it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from . import optimizers

SMALLEST, LARGEST = 2.0**-126, 2.0**100
"""The scale, one over it, and that times what a clip multiplies by (down to 2^-26) are normal
numbers: TensorFlow takes subnormal ones for zero."""


@dataclass(frozen=True)
class LossScale:
    """A loss scale and the variables that hold it.

    Attributes:
        scale: a float32 variable, or a number that stays.
        counter: finite steps since the last change; None where the scale stays.
        growth_steps: so many of them double the scale.
        counts_skipped: whether a skipped step counts in ``iterations``, as in tf-keras.
    """

    scale: Any
    counter: Any
    growth_steps: int
    counts_skipped: bool

    def value(self) -> Any:
        """The scale now, in its bounds whatever an earlier training has left."""
        return tf.clip_by_value(tf.convert_to_tensor(self.scale, tf.float32), SMALLEST, LARGEST)

    def move(self, finite: Any) -> None:
        """Grow or shrink after a step; `finite` is a bool tensor."""
        if self.counter is None:
            return
        scale = self.value()
        count = tf.convert_to_tensor(self.counter) + 1
        grown = count >= self.growth_steps
        good = tf.where(grown, scale * 2.0, scale)
        moved = tf.where(finite, good, scale * 0.5)
        self.scale.assign(tf.clip_by_value(moved, SMALLEST, LARGEST))
        restart = tf.logical_or(tf.logical_not(finite), grown)
        self.counter.assign(tf.where(restart, tf.zeros_like(count), count))


NONE = LossScale(1.0, None, 0, False)
"""Of an optimizer that scales nothing; where it gets gradients that another one has scaled."""


def of(optimizer: Any) -> LossScale | None:
    """The loss scale of an optimizer that has its state; None where it scales no loss."""
    if not optimizers.scales_loss(optimizer):
        factor = getattr(optimizer, "loss_scale_factor", None)
        return None if factor is None else LossScale(float(factor), None, 0, False)
    if optimizers.home(optimizer) == "keras":
        return LossScale(
            optimizer.dynamic_scale.value,
            optimizer.step_counter.value,
            optimizer.dynamic_growth_steps,
            False,
        )
    if not optimizer.dynamic:
        return LossScale(float(optimizer.initial_scale), None, 0, True)
    # The scale's own variable is behind a property that reads it.
    scale = optimizer._loss_scale.current_loss_scale
    return LossScale(scale, optimizer.dynamic_counter, optimizer.dynamic_growth_steps, True)
