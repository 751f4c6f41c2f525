# SPDX-License-Identifier: Apache-2.0
"""A step under ``tf.distribute``: the gradients are added over the replicas before all else.

    sum over the replicas             tf.distribute            `summed`
    micro-batches are added up        replica by replica       state.py
    norm, finite check, multiplier    on the first replica     measure.py
    one decision for all              outside of the replicas
      the optimizer's step            XLA, replica by replica  `Replicated`
    the loss scale                    replica by replica

Keras clips and checks each replica's own gradients first, so an inf on any replica but the first
reaches the weights, and the norm that is clipped is that of no gradient that is applied. Here every
replica moves by the same sum, the same multiplier and the same decision, so that they stay equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import tensorflow as tf

from pyupdate.options import Options

from . import halves, measure, optimizers
from .alone import NotMirrored, Replica, replicas_of
from .loss_scale import LossScale
from .one_by_one import OneByOne, first_of
from .plan import Plan
from .state import State


def count() -> int:
    """How many replicas compute gradients of their own here."""
    context = tf.distribute.get_replica_context()
    return 1 if context is None else int(context.num_replicas_in_sync)


def are_here(variables: Sequence[Any]) -> bool:
    """Whether variables are stepped replica by replica: of a mirrored strategy of one, too."""
    if count() > 1:
        return True
    inside = tf.distribute.has_strategy() and tf.distribute.get_replica_context() is not None
    return inside and isinstance(variables[0], tf.distribute.DistributedValues)


def check_place(variables: Sequence[Any], name: str) -> None:
    """Refuse an update where TensorFlow has none for a model on several replicas.

    Raises:
        ValueError: says where it belongs.
    """
    if not optimizers.is_mirrored(variables[0]):
        return
    if tf.distribute.get_replica_context() is None:
        message = (
            f"'{name}' is on several replicas, and this is inside of strategy.scope() but outside "
            "of strategy.run: call update_model in the function that strategy.run runs"
        )
        raise ValueError(message)
    if (
        count() > 1
        and not tf.executing_eagerly()
        and _is_compiled(tf.compat.v1.get_default_graph())
    ):
        message = (
            f"update_model of '{name}' in a tf.function(jit_compile=True) on one replica of "
            "several: TensorFlow compiles for one device. Leave jit_compile out, or let a plain "
            "tf.function call strategy.run: the step is compiled for each replica all the same"
        )
        raise ValueError(message)


def _is_compiled(graph: Any) -> bool:
    """Whether a ``tf.function(jit_compile=True)`` traces this graph, or one around it."""
    while graph is not None:
        context = graph._get_control_flow_context()
        while context is not None:
            if context.IsXLAContext():
                return True
            context = context.outer_context
        graph = getattr(graph, "outer_graph", None)
    return False


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
        keep(found, first_of(strategy, scale))

    context.merge_call(together, args=(summed, scale))


def plan(
    strategy: Any,
    optimizer: Any,
    name: str,
    owners: Sequence[Any],
    variables: Sequence[Any],
    options: Options,
    scaling: LossScale | None,
    state: State | None,
    missed: Sequence[int],
) -> Replicated | OneByOne:
    """How the replicas of a strategy are stepped."""
    inner = optimizers.stepped(optimizer)
    copies, targets = halves.of(optimizer, owners, variables, name)
    why = ""
    if tf.config.functions_run_eagerly():
        why = "tf.config.run_functions_eagerly is on: nothing is compiled"
    else:
        try:
            found = replicas_of(strategy, inner, targets)
            kept = [None if state is None else state.part(replica.own) for replica in found]
        except NotMirrored as error:
            why = f"{type(strategy).__name__}: {error}"
    if why:
        return OneByOne(inner, variables, targets, options, scaling, state, copies, missed, why)
    said: list[str] = []
    plans = []
    for replica, own_state in zip(found, kept, strict=True):
        made = PlanOfReplica(
            inner,
            [replica.own(variable) for variable in variables],
            [t if optimizers.home(t) == "keras" else replica.own(t) for t in targets],
            options,
            _own_scale(scaling, replica),
            own_state,
            halves.Halves([(replica.own(half), replica.own(copy)) for half, copy in copies.pairs]),
            missed,
        )
        made.begin(replica, said)
        plans.append(made)
    return Replicated(plans)


def _own_scale(scaling: LossScale | None, replica: Replica) -> LossScale | None:
    if scaling is None or scaling.counter is None:
        return scaling
    return replace(scaling, scale=replica.own(scaling.scale), counter=replica.own(scaling.counter))


class PlanOfReplica(Plan):
    """The parts of a plan, for the variables of one replica, on its device."""

    def begin(self, replica: Replica, said: list[str]) -> None:
        """Say whose it is, and what was said already of the others."""
        self.replica = replica
        self._said = said

    def add(self, grads: Sequence[Any], scale: Any) -> Any:
        """Add a micro-batch to the sums; whether it was the last one of a step."""
        return self._call("add", self._add, [*grads, *([] if scale is None else [scale])])

    def means(self) -> list[Any]:
        """The means of the micro-batches."""
        found: list[Any] = self._call("means", self._means, [])
        return found

    def end(self, found: Sequence[Any]) -> None:
        """Begin new sums; and keep what the step on the old ones found."""
        self._call("clear", self._clear, [])
        if found:
            with tf.device(self.replica.device):
                self.state.keep(found)

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

    def _means(self) -> list[Any]:
        return self.state.means(self.variables)

    def _clear(self) -> None:
        self.state.clear()

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
            Norm, skipped and multiplier, as scalar tensors; the empty tuple where nobody asked.
        """
        parts = [strategy.experimental_local_results(grad) for grad in summed]
        grads = [[part[plan.replica.number] for part in parts] for plan in self.plans]
        first = self.plans[0]
        scale = first_of(strategy, scale)
        if not first.accumulates:
            return self._whole(grads, scale)
        # All replicas count alike, so the first one's answer is everybody's.
        ready, *_ = [plan.add(own, scale) for plan, own in zip(self.plans, grads, strict=True)]
        unscaled = None if scale is None else tf.constant(1.0)
        if not first.measures:
            tf.cond(ready, lambda: self._flush(unscaled), lambda: None)
            return ()
        return tuple(tf.cond(ready, lambda: self._flush(unscaled), first.state.latest))

    def _flush(self, scale: Any) -> Any:
        """The step on the means of the micro-batches."""
        first = self.plans[0]
        found = self._whole([plan.means() for plan in self.plans], scale)
        for plan in self.plans:
            plan.end(found)
        return first.state.latest() if found else None

    def _whole(self, grads: Sequence[list[Any]], scale: Any) -> tuple[Any, ...]:
        first = self.plans[0]
        if not first.measures:
            kind = measure.precision([grad.dtype for grad in grads[0]])
            self._move(grads, None if scale is None else 1.0 / tf.cast(scale, kind))
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
