# SPDX-License-Identifier: Apache-2.0
"""Steps under ``tf.distribute`` without XLA, where a replica has no plain variables of its own.

What the options keep is read and written from outside of the replicas, in which TensorFlow writes
to all parts of a mirrored variable at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from pyupdate.options import Options

from . import measure, optimizers, told
from .halves import Halves
from .loss_scale import LossScale
from .state import State


def first_of(strategy: Any, value: Any) -> Any:
    """The first replica's of what every replica has."""
    return None if value is None else strategy.experimental_local_results(value)[0]


class OneByOne:
    """Steps by the optimizer's own way to its replicas, without XLA.

    One decision is taken for all, outside of the replicas: TensorFlow lets nothing in a cond inside
    of them leave them, which an optimizer's step does.
    """

    def __init__(
        self,
        optimizer: Any,
        variables: Sequence[Any],
        targets: Sequence[Any],
        options: Options,
        scaling: LossScale | None,
        state: State | None,
        copies: Halves,
        missed: Sequence[int],
        why: str,
    ) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.variables = list(variables)
        self.targets = list(targets)
        self.options = options
        self.scaling = scaling
        self.state = state
        self.halves = copies
        self.missed = missed
        self.clips = measure.clips_of(optimizer)
        scales = scaling is not None and scaling.counter is not None
        self.checks = options.skip_nonfinite or scales
        self.measures = self.checks or options.max_norm is not None or bool(self.clips.replaced)
        self.path = f"TensorFlow without XLA: {why}"
        told.without_xla(optimizer, why)

    def __call__(self, strategy: Any, summed: Sequence[Any], scale: Any) -> Any:
        """Step every replica; what is returned is a plan's."""
        kind = measure.precision([first_of(strategy, grad).dtype for grad in summed])
        unscale = None if scale is None else 1.0 / tf.cast(first_of(strategy, scale), kind)
        steps = self.options.accumulation_steps
        if steps == 1:
            return self._whole(strategy, summed, unscale)
        state = self._kept()
        part = tf.constant(1.0, kind) if unscale is None else unscale
        firsts = [first_of(strategy, grad) for grad in summed]
        ready = state.add(self.variables, firsts, part, steps, self.missed)

        def flush() -> Any:
            found = self._whole(strategy, state.means(self.variables), None)
            state.clear()
            if not found:
                return None
            state.keep(found)
            return state.latest()

        if not self.measures:
            tf.cond(ready, flush, lambda: None)
            return ()
        return tuple(tf.cond(ready, flush, state.latest))

    def _kept(self) -> State:
        assert self.state is not None  # the options ask for it
        return self.state

    def _whole(self, strategy: Any, summed: Sequence[Any], unscale: Any) -> tuple[Any, ...]:
        scaling, each = self.scaling, strategy.extended.call_for_each_replica
        inner = self._optimizer()
        assert inner is not None  # who calls us holds it
        found: list[Any] = []
        scaled = unscale is not None

        def measured(grads: Any, unscale: Any) -> tuple[Any, ...]:
            made = measure.measured(
                grads, unscale, self.options, self.clips, check=self.checks, scaled=scaled
            )
            finite = tf.constant(True) if made.finite is None else made.finite
            return made.norm, made.multiplier, measure.smallest(made.multiplier), finite

        multiplier = unscale
        if self.measures:
            kind = measure.precision([first_of(strategy, grad).dtype for grad in summed])
            given = tf.constant(1.0, kind) if unscale is None else unscale
            norm, multiplier, smallest, finite = each(measured, args=(summed, given))
            found = [first_of(strategy, value) for value in (norm, smallest, finite)]

        def apply(grads: Any, multiplier: Any) -> None:
            grads = measure.multiplied(grads, multiplier, self.options.clip_value)
            self.halves.widen()
            optimizers.apply(inner, grads, self.targets, reduced=True)
            self.halves.narrow()

        def move() -> Any:
            if self.missed:
                parts = (self.variables, self.targets, self.missed)
                back = self._kept().put_back(inner, *parts)
            given = optimizers.as_given(inner, self.clips.replaced, reduced=True)
            with given, self.halves.as_excluded(inner):  # here: replicas are threads
                each(apply, args=(summed, multiplier))
            if self.options.ema_decay is not None:
                self._kept().average(self.variables, 1.0 - self.options.ema_decay)
            if self.missed:
                back()
            return tf.constant(0.0)

        def skip() -> Any:
            if scaling is not None and scaling.counts_skipped:
                inner.iterations.assign_add(1)
            return tf.constant(1.0)

        if not found:
            move()
            return ()
        skipped = tf.cond(found[2], move, skip) if self.checks else move()
        if scaling is not None:
            scaling.move(found[2])
        return found[0], skipped, found[1]
