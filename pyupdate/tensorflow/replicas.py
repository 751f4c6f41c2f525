# SPDX-License-Identifier: Apache-2.0
"""A step under ``tf.distribute``: the gradients are added over the replicas before all else.

Keras clips and checks each replica's own gradients first, so an inf on any replica but the first
reaches the weights, and the norm that is clipped is that of no gradient that is applied. Here every
replica sees the same sum, and one decision is taken for all, outside of the replicas: TensorFlow
lets nothing in a cond inside of them leave them, which an optimizer's step does.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from pyupdate.options import Options

from . import measure, optimizers
from .loss_scale import LossScale

_log = logging.getLogger("pyupdate")
_said: set[str] = set()


def count() -> int:
    """How many replicas compute gradients of their own here."""
    context = tf.distribute.get_replica_context()
    return 1 if context is None else int(context.num_replicas_in_sync)


def step(
    name: str,
    optimizer: Any,
    owners: Sequence[Any],
    grads: Sequence[Any],
    options: Options,
    scaling: LossScale | None,
    scale: Any,
) -> None:
    """Add the gradients over all replicas, check and clip their sum, and step every replica.

    Raises:
        ValueError: an option that keeps variables of its own.
    """
    kept = [name for name in ("ema_decay", "accumulation_steps") if name in options.asked_for]
    if kept:
        message = (
            f"{kept[0]} of '{name}' is not kept on several replicas: use the optimizer's own "
            "use_ema and gradient_accumulation_steps"
        )
        raise ValueError(message)
    if name not in _said:
        _said.add(name)
        _log.warning(
            "'%s' is stepped without XLA: tf.distribute updates its variables from outside of the "
            "replicas, which a compiled function cannot",
            name,
        )
    context = tf.distribute.get_replica_context()
    reduced = context.all_reduce(tf.distribute.ReduceOp.SUM, list(grads))
    inner = optimizers.stepped(optimizer)
    clips = measure.clips_of(inner)
    checks = options.skip_nonfinite or (scaling is not None and scaling.counter is not None)
    unscale = tf.constant(1.0) if scale is None else 1.0 / scale
    measures = checks or options.max_norm is not None or bool(clips.replaced)
    multiplier = finite = None
    if measures:
        found = measure.measured(reduced, unscale, options, clips, check=checks)
        multiplier, finite = found.multiplier, found.finite
    elif scale is not None:
        multiplier = unscale
    if multiplier is not None or options.clip_value is not None:
        reduced = measure.multiplied(reduced, multiplier, options.clip_value)

    hidden = {**clips.replaced, **optimizers.not_reducing(inner)}
    if getattr(inner, "loss_scale_factor", None) is not None:
        hidden["loss_scale_factor"] = None

    def apply(values: Any) -> None:
        optimizers.apply(inner, values, owners, reduced=True)

    def skip() -> None:
        if scaling is not None and scaling.counts_skipped:
            inner.iterations.assign_add(1)

    def decide(strategy: Any, values: Any, finite: Any) -> None:
        def step_all() -> None:
            with optimizers.replaced(inner, **hidden):  # here: replicas are threads
                strategy.extended.call_for_each_replica(apply, args=(values,))

        if finite is None:
            step_all()
            return
        decision = strategy.experimental_local_results(finite)[0]  # the same on every replica
        tf.cond(decision, step_all, skip)
        if scaling is not None:
            scaling.move(decision)

    context.merge_call(decide, args=(reduced, finite))
