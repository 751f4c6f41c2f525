# SPDX-License-Identifier: Apache-2.0
"""A step under ``tf.distribute``: the gradients are added over the replicas before all else.

    sum over the replicas             tf.distribute            `summed`
    norm, finite check, multiplier    on the first replica     measure.py
    one decision for all              outside of the replicas
      the optimizer's step            XLA, replica by replica  `Replicated`
    the loss scale                    replica by replica

Keras clips and checks each replica's own gradients first, so an inf on any replica but the first
reaches the weights, and the norm that is clipped is that of no gradient that is applied. Here every
replica moves by the same sum, the same multiplier and the same decision, so that they stay equal.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import tensorflow as tf

from pyupdate.options import Options

from . import halves, measure, optimizers
from .alone import NotMirrored, Replica, replicas_of
from .loss_scale import LossScale
from .plan import Plan

_log = logging.getLogger("pyupdate")


def count() -> int:
    """How many replicas compute gradients of their own here."""
    context = tf.distribute.get_replica_context()
    return 1 if context is None else int(context.num_replicas_in_sync)


def check_options(name: str, options: Options) -> None:
    """Refuse what is not kept on several replicas.

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


def step(
    grads: Sequence[Any],
    scale: Any,
    plan_of: Callable[[Any], Replicated | OneByOne],
    keep: Callable[[Any, Any], None],
) -> None:
    """Add the gradients over all replicas and step each one by the sum; every replica calls it.

    Args:
        grads: this replica's, dense.
        scale: what they are scaled by; None where they are not.
        plan_of: the plan under a strategy; called once for all replicas.
        keep: gets what a step found, and the scale.
    """
    context = tf.distribute.get_replica_context()
    summed = context.all_reduce(tf.distribute.ReduceOp.SUM, list(grads))

    def together(strategy: Any, summed: Any, scale: Any) -> None:
        found = plan_of(strategy)(strategy, summed, scale)
        keep(found, _first(strategy, scale))

    context.merge_call(together, args=(summed, scale))


def plan(
    strategy: Any,
    optimizer: Any,
    owners: Sequence[Any],
    variables: Sequence[Any],
    options: Options,
    scaling: LossScale | None,
) -> Replicated | OneByOne:
    """How the replicas of a strategy are stepped."""
    inner = optimizers.stepped(optimizer)
    copies, stand_ins = halves.of(optimizer, variables)
    targets = [stand_ins.get(id(v), o) for v, o in zip(variables, owners, strict=True)]
    why = ""
    if tf.config.functions_run_eagerly():
        why = "tf.config.run_functions_eagerly is on: nothing is compiled"
    else:
        try:
            found = replicas_of(strategy, inner, targets)
        except NotMirrored as error:
            why = f"{type(strategy).__name__}: {error}"
    if why:
        return OneByOne(inner, targets, options, scaling, copies, why)
    said: list[str] = []
    plans = []
    for replica in found:
        made = PlanOfReplica(
            inner,
            [replica.own(variable) for variable in variables],
            [t if optimizers.home(t) == "keras" else replica.own(t) for t in targets],
            options,
            _own_scale(scaling, replica),
            None,
            halves.Halves([(replica.own(half), replica.own(copy)) for half, copy in copies.pairs]),
        )
        made.begin(replica, said)
        plans.append(made)
    return Replicated(plans)


def _own_scale(scaling: LossScale | None, replica: Replica) -> LossScale | None:
    if scaling is None or scaling.counter is None:
        return scaling
    return replace(scaling, scale=replica.own(scaling.scale), counter=replica.own(scaling.counter))


def _first(strategy: Any, value: Any) -> Any:
    """The first replica's of what every replica has."""
    return None if value is None else strategy.experimental_local_results(value)[0]


class PlanOfReplica(Plan):
    """The parts of a plan, for the variables of one replica, on its device."""

    def begin(self, replica: Replica, said: list[str]) -> None:
        """Say whose it is, and what was said already of the others."""
        self.replica = replica
        self._said = said

    def measure(self, grads: Sequence[Any], scale: Any) -> Any:
        """Norm, multiplier, the smallest of it, and whether all is finite."""
        return self._call("measure", self._measure, [*grads, *([] if scale is None else [scale])])

    def trace(self, grads: Sequence[Any], multiplier: Any) -> None:
        """Trace the step, so that `compiled` says whether XLA takes it, as far as is known."""
        self._function(*self._text(multiplier), self._inputs(grads, multiplier), jit=True)

    def move(self, grads: Sequence[Any], multiplier: Any) -> None:
        """Make the step, and move the loss scale."""
        inputs = self._inputs(grads, multiplier)
        self._or_without_xla(lambda: self._call(*self._text(multiplier), inputs, jit=True))

    def skip(self) -> None:
        """What comes in the place of a step."""
        self._call("skip", self._skip, [])

    def _text(self, multiplier: Any) -> tuple[str, Callable[..., Any]]:
        return ("apply", self._only_apply) if multiplier is None else ("move", self._move)

    def _inputs(self, grads: Sequence[Any], multiplier: Any) -> list[Any]:
        return [*grads] if multiplier is None else [*grads, multiplier]

    def _call(
        self, name: str, text: Callable[..., Any], inputs: list[Any], *, jit: bool = False
    ) -> Any:
        with tf.device(self.replica.device):
            return self._function(name, text, inputs, jit=jit)(inputs)

    def _made(self, make: Callable[[], Any]) -> Any:
        def alone() -> Any:
            with self.replica.alone(self._alive(), self.targets):
                return make()

        return self.replica.made(alone)

    def _refused(self, found: Any) -> str:
        elsewhere = {
            str(captured.device)
            for captured in found.captured
            if captured.dtype == tf.resource and captured.device != self.replica.device
        }
        if elsewhere:
            where = ", ".join(sorted(elsewhere))
            return f"it uses a variable on {where} that none of its attributes holds"
        return super()._refused(found)


class Replicated:
    """A plan of each replica; the first one measures for all."""

    def __init__(self, plans: Sequence[PlanOfReplica]) -> None:
        self.plans = list(plans)

    @property
    def path(self) -> str:
        """What runs the step, in words."""
        return self.plans[0].path

    def __call__(self, strategy: Any, summed: Sequence[Any], scale: Any) -> Any:
        """Step every replica.

        Returns:
            Norm, skipped and multiplier, as float32 tensors; the empty tuple where nobody asked.
        """
        parts = [strategy.experimental_local_results(grad) for grad in summed]
        grads = [[part[plan.replica.number] for part in parts] for plan in self.plans]
        first = self.plans[0]
        scale = _first(strategy, scale)
        if not first.measures:
            self._move(grads, None if scale is None else 1.0 / scale)
            return ()
        norm, multiplier, smallest, finite = first.measure(grads[0], scale)

        def skip() -> Any:
            for plan in self.plans:
                plan.skip()
            return tf.constant(1.0)

        def move() -> Any:
            self._move(grads, multiplier)
            return tf.constant(0.0)

        skipped = tf.cond(finite, move, skip) if first.checks else move()
        return norm, skipped, smallest

    def _move(self, grads: Sequence[list[Any]], multiplier: Any) -> None:
        each = list(zip(self.plans, grads, strict=True))
        for plan, own in each:
            plan.trace(own, multiplier)
        for plan, own in each:
            # Compiled or not, the same for all: XLA contracts, and replicas must stay equal.
            if not all(other.compiled for other in self.plans):
                plan.leave_xla()
            plan.move(own, multiplier)


class OneByOne:
    """Steps by the optimizer's own way to its replicas, without XLA.

    One decision is taken for all, outside of the replicas: TensorFlow lets nothing in a cond inside
    of them leave them, which an optimizer's step does.
    """

    def __init__(
        self,
        optimizer: Any,
        targets: Sequence[Any],
        options: Options,
        scaling: LossScale | None,
        copies: halves.Halves,
        why: str,
    ) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.targets = list(targets)
        self.options = options
        self.scaling = scaling
        self.halves = copies
        self.clips = measure.clips_of(optimizer)
        self.path = f"TensorFlow without XLA: {why}"
        _log.warning("%s is stepped without XLA: %s", type(optimizer).__name__, why)

    def __call__(self, strategy: Any, summed: Sequence[Any], scale: Any) -> Any:
        """Step every replica; what is returned is a plan's."""
        scaling, each = self.scaling, strategy.extended.call_for_each_replica
        checks = self.options.skip_nonfinite or (
            scaling is not None and scaling.counter is not None
        )
        asked = checks or self.options.max_norm is not None or bool(self.clips.replaced)
        inner = self._optimizer()
        assert inner is not None  # who calls us holds it
        found: list[Any] = []

        def measured(grads: Any, unscale: Any) -> tuple[Any, ...]:
            made = measure.measured(grads, unscale, self.options, self.clips, check=checks)
            finite = tf.constant(True) if made.finite is None else made.finite
            return made.norm, made.multiplier, measure.smallest(made.multiplier), finite

        multiplier = None if scale is None else each(lambda given: 1.0 / given, args=(scale,))
        if asked:
            unscale = tf.constant(1.0) if multiplier is None else multiplier
            norm, multiplier, smallest, finite = each(measured, args=(summed, unscale))
            found = [_first(strategy, value) for value in (norm, smallest, finite)]

        def apply(grads: Any, multiplier: Any) -> None:
            grads = measure.multiplied(grads, multiplier, self.options.clip_value)
            self.halves.widen()
            optimizers.apply(inner, grads, self.targets, reduced=True)
            self.halves.narrow()

        def move() -> Any:
            hidden = {**self.clips.replaced, **optimizers.not_reducing(inner)}
            if getattr(inner, "loss_scale_factor", None) is not None:
                hidden["loss_scale_factor"] = None
            with optimizers.replaced(inner, **hidden):  # here: replicas are threads
                each(apply, args=(summed, multiplier))
            return tf.constant(0.0)

        def skip() -> Any:
            if scaling is not None and scaling.counts_skipped:
                inner.iterations.assign_add(1)
            return tf.constant(1.0)

        if not found:
            move()
            return ()
        skipped = tf.cond(found[2], move, skip) if checks else move()
        if scaling is not None:
            scaling.move(found[2])
        return found[0], skipped, found[1]
