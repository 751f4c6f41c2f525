# SPDX-License-Identifier: Apache-2.0
"""The reduce pass: the global norm, whether all is finite, and the one multiplier.

By ``tf.nn.l2_loss``, outside of XLA: 4.9 million float32 numbers in 60 tensors take it 4.4 ms, and
XLA's own sums on a CPU 8.7; a step whose norm is inside XLA takes twice as long as a plain one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from pyupdate.options import Options

from . import optimizers


@dataclass(frozen=True)
class Clips:
    """The clips of the user's optimizer that are taken over, so that they come at the right place.

    Keras takes the global norm gradient by gradient in the step, which is slow, and before
    the gradients of several replicas are added, which is another norm.
    """

    global_clipnorm: float | None
    clipnorm: float | None

    @property
    def replaced(self) -> dict[str, None]:
        """What the optimizer must not do again."""
        return {name: None for name, bound in vars(self).items() if bound is not None}


def clips_of(optimizer: Any) -> Clips:
    """What can be taken over of an optimizer: not where it clips after its own accumulation."""
    if optimizers.is_legacy(optimizer) or getattr(optimizer, "gradient_accumulation_steps", None):
        return Clips(None, None)
    found = getattr(type(optimizer), "_clip_gradients", None)
    if not getattr(found, "__module__", "").endswith(("base_optimizer", "optimizers.optimizer")):
        return Clips(None, None)  # the user's own way of clipping
    return Clips(optimizer.global_clipnorm, optimizer.clipnorm)


@dataclass(frozen=True)
class Measured:
    """What the reduce pass finds, as tensors.

    Attributes:
        total: the sum of the squares of the gradients as they came.
        norm: of the unscaled gradients.
        finite: whether every element is; None where nobody asks.
        multiplier: one number, or one per gradient.
    """

    total: Any
    norm: Any
    finite: Any
    multiplier: Any


def measured(
    grads: Sequence[Any], unscale: Any, options: Options, clips: Clips, *, check: bool
) -> Measured:
    """Norm, check and multiplier of dense gradients that carry one over `unscale`."""
    halved = [tf.cast(tf.nn.l2_loss(_wide(grad)), tf.float32) for grad in grads]
    total = 2.0 * tf.add_n(halved)
    norm = tf.sqrt(total) * unscale
    finite = None
    if check:  # squares of finite numbers can overflow, so where the sum did, look again
        finite = tf.cond(
            tf.math.is_finite(total),
            lambda: tf.constant(True),
            lambda: all_finite(grads),
        )
    factor = tf.constant(1.0)
    if options.max_norm is not None:  # torch's, guard included
        factor = tf.minimum(options.max_norm / (norm + 1e-6), 1.0)
    if clips.global_clipnorm is not None:
        now = norm * factor
        clipped = factor * tf.minimum(clips.global_clipnorm / now, 1.0)
        factor = tf.where(tf.math.is_finite(now), clipped, float("nan"))  # on purpose, as Keras
    multiplier = unscale * factor
    if clips.clipnorm is not None:
        norms = tf.sqrt(2.0 * tf.stack(halved)) * multiplier
        multiplier = multiplier * tf.minimum(clips.clipnorm / norms, 1.0)
    return Measured(total, norm, finite, multiplier)


def all_finite(grads: Sequence[Any]) -> Any:
    """Whether every element is finite."""
    return tf.reduce_all([tf.reduce_all(tf.math.is_finite(grad)) for grad in grads])


def smallest(multiplier: Any) -> Any:
    """The one that clips most, of one number or one per gradient."""
    return tf.reduce_min(multiplier) if multiplier.shape.rank == 1 else multiplier


def multiplied(grads: Sequence[Any], multiplier: Any, clip_value: float | None) -> list[Any]:
    """Gradients times what was measured, halves in float32; then in the bounds of `clip_value`."""
    several = multiplier is not None and multiplier.shape.rank == 1
    made = []
    for position, grad in enumerate(grads):
        grad = _wide(grad)
        if multiplier is not None:
            grad = grad * tf.cast(multiplier[position] if several else multiplier, grad.dtype)
        if clip_value is not None:  # a nan stays one
            bound = tf.cast(clip_value, grad.dtype)
            grad = tf.where(grad > bound, bound, tf.where(grad < -bound, -bound, grad))
        made.append(grad)
    return made


def _wide(grad: Any) -> Any:
    return tf.cast(grad, tf.float32) if grad.dtype.size < 4 else grad
