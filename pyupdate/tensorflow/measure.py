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

SMALL = 2.0**-60
"""A sum below it may lack squares: below 2^-126 they are zero, and 2^40 of them 2^-26 of it."""


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
        """What the optimizer must not do again, nor in its place: it clips in one way."""
        if self.global_clipnorm is None and self.clipnorm is None:
            return {}
        return {"global_clipnorm": None, "clipnorm": None, "clipvalue": None}


def clips_of(optimizer: Any) -> Clips:
    """What can be taken over of an optimizer: not where it clips after its own accumulation."""
    if optimizers.is_legacy(optimizer) or getattr(optimizer, "gradient_accumulation_steps", None):
        return Clips(None, None)
    found = getattr(type(optimizer), "_clip_gradients", None)
    if not getattr(found, "__module__", "").endswith(("base_optimizer", "optimizers.optimizer")):
        return Clips(None, None)  # the user's own way of clipping
    # As in Keras a bound of 0 is none, and a clip gradient by gradient comes in the other's place.
    if optimizer.clipnorm and optimizer.clipnorm > 0:
        return Clips(None, optimizer.clipnorm)
    if optimizer.global_clipnorm and optimizer.global_clipnorm > 0:
        return Clips(optimizer.global_clipnorm, None)
    return Clips(None, None)


def precision(kinds: Sequence[Any]) -> Any:
    """In what the norms and multipliers of gradients of these dtypes are taken."""
    return tf.float64 if tf.float64 in kinds else tf.float32


@dataclass(frozen=True)
class Measured:
    """What the reduce pass finds, as tensors.

    Attributes:
        norm: of the unscaled gradients.
        finite: whether every element is; None where nobody asks.
        multiplier: one number, or one per gradient.
    """

    norm: Any
    finite: Any
    multiplier: Any


def measured(
    grads: Sequence[Any], unscale: Any, options: Options, clips: Clips, *, check: bool, scaled: bool
) -> Measured:
    """Norm, check and multiplier of dense gradients that carry one over `unscale`.

    Where nothing scales them (not `scaled`), `unscale` is 1.
    """
    found = measured_fast(grads, unscale, options, clips, scaled=scaled)
    if scaled:

        def again() -> tuple[Any, ...]:
            slow = measured_slowly(grads, unscale, options, clips)
            finite = all_finite(grads) if check else tf.constant(True)
            return slow.norm, slow.multiplier, finite

        norm, multiplier, finite = tf.cond(
            found.finite, lambda: (found.norm, found.multiplier, tf.constant(True)), again
        )
        return Measured(norm, finite if check else None, multiplier)
    finite = None
    if check:
        finite = tf.cond(found.finite, lambda: tf.constant(True), lambda: all_finite(grads))
    return Measured(found.norm, finite, found.multiplier)


def measured_fast(
    grads: Sequence[Any], unscale: Any, options: Options, clips: Clips, *, scaled: bool
) -> Measured:
    """The same of the gradients as they came; `finite` is whether the sums of squares can be right.

    Where it is false, elements may be finite nevertheless: their squares can overflow, by a loss
    scale of 2^64 and gradients of 1, and underflow, by one of 2^-70.
    """
    halved = _halved(grads)
    total = 2.0 * tf.add_n(halved)
    sound = tf.math.is_finite(total)
    if scaled:
        least = total if clips.clipnorm is None else 2.0 * tf.reduce_min(halved)
        sound = tf.logical_and(sound, tf.logical_or(least >= SMALL, unscale <= 1.0))
    norm, each = tf.sqrt(total) * unscale, tf.sqrt(2.0 * tf.stack(halved)) * unscale
    return Measured(norm, sound, unscale * clip_factor(norm, each, options, clips))


def measured_slowly(grads: Sequence[Any], unscale: Any, options: Options, clips: Clips) -> Measured:
    """The same of the unscaled gradients, as Keras takes it, one more pass over them."""
    halved = _halved(multiplied(grads, unscale, None))
    norm, each = tf.sqrt(2.0 * tf.add_n(halved)), tf.sqrt(2.0 * tf.stack(halved))
    return Measured(norm, None, unscale * clip_factor(norm, each, options, clips))


def _halved(grads: Sequence[Any]) -> list[Any]:
    kind = precision([grad.dtype for grad in grads])
    return [tf.cast(tf.nn.l2_loss(_wide(grad)), kind) for grad in grads]


def clip_factor(norm: Any, each: Any, options: Options, clips: Clips) -> Any:
    """What the clips multiply unscaled gradients by, of their norm and those of each."""
    factor = tf.ones_like(norm)
    if options.max_norm is not None:  # torch's, guard included
        factor = tf.minimum(options.max_norm / (norm + 1e-6), 1.0)
    if clips.global_clipnorm is not None:
        now = norm * factor
        clipped = factor * tf.minimum(clips.global_clipnorm / now, 1.0)
        factor = tf.where(tf.math.is_finite(now), clipped, float("nan"))  # on purpose, as Keras
    if clips.clipnorm is not None:
        factor = factor * tf.minimum(clips.clipnorm / (each * factor), 1.0)
    return factor


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
            bound = tf.constant(clip_value, grad.dtype)
            grad = tf.where(grad > bound, bound, tf.where(grad < -bound, -bound, grad))
        made.append(grad)
    return made


def _wide(grad: Any) -> Any:
    return tf.cast(grad, tf.float32) if grad.dtype.size < 4 else grad
