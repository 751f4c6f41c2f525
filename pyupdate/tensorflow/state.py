# SPDX-License-Identifier: Apache-2.0
"""What a model keeps for its options: sums of micro-batches, averages of its variables.

A ``tf.Module`` on the model (``model.update_state``), so that a ``tf.train.Checkpoint`` of the
model carries it; nothing is added to the user's optimizer. Where the model's variables are mirrored
by a ``tf.distribute`` strategy, so are these, and every replica has a part of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from pyupdate.options import Options

from . import left, measure, optimizers


class Kept:
    """Sums, averages and what the last step found.

    Attributes:
        stepped: the variables that they are of.
        sums: of the micro-batches so far, one of each variable; empty where none are kept.
        averages: likewise.
        position: how many micro-batches there were since the last step.
        reached: whether one of them has reached a variable, at its place in `places`.
        found: norm, skipped and multiplier of the last step.
    """

    stepped: list[Any]
    sums: list[Any]
    averages: list[Any]
    position: Any
    reached: Any
    places: tuple[int, ...]
    found: list[Any]

    def add(
        self,
        variables: Sequence[Any],
        grads: Sequence[Any],
        unscale: Any,
        steps: int,
        missed: Sequence[int],
    ) -> Any:
        """Add a micro-batch to the sums; whether it was the last one of `steps`.

        It does not reach the variables at the positions `missed`.
        """
        part = unscale / steps
        for total, grad in zip(self._of(self.sums, variables), grads, strict=True):
            total.assign_add(tf.cast(grad, total.dtype) * tf.cast(part, total.dtype))
        there = [v for position, v in enumerate(variables) if position not in missed]
        mask = np.zeros(self.reached.shape[0], bool)
        mask[self._of(self.places, there)] = True
        self.reached.assign(tf.logical_or(self.reached, mask))
        self.position.assign_add(1)
        return tf.convert_to_tensor(self.position) >= steps

    def means(self, variables: Sequence[Any]) -> list[Any]:
        """The means of the micro-batches."""
        return [tf.identity(total) for total in self._of(self.sums, variables)]

    def clear(self) -> None:
        """Begin anew."""
        for total in self.sums:
            total.assign(tf.zeros_like(total))
        self.reached.assign(tf.zeros_like(self.reached))
        self.position.assign(0)

    def put_back(
        self,
        optimizer: Any,
        variables: Sequence[Any],
        targets: Sequence[Any],
        missed: Sequence[int],
    ) -> Callable[[], None]:
        """What is to be called after a step: `left.put_back` of those of `missed` and their state.

        Args:
            optimizer: that makes it.
            variables: of the model, that it is given.
            targets: what it steps of each: the same, what Keras wraps them in, or a copy.
            missed: the positions of those that the last micro-batch does not reach.
        """
        left.warn_of_unplaced(optimizer, targets)
        held = []
        for position in missed:
            variable, target = variables[position], targets[position]
            own = {id(v): v for v in (variable, optimizers.tf_variable(target))}
            averages = self._of(self.averages, [variable]) if self.averages else []
            held.append([*own.values(), *averages, *left.slots(optimizer, target)])
        places = self._of(self.places, [variables[position] for position in missed])
        return left.put_back([self.reached[place] for place in places], held)

    def keep(self, found: Sequence[Any]) -> None:
        """Remember what a step found, which calls that only add up report."""
        for variable, value in zip(self.found, found, strict=True):
            variable.assign(tf.cast(value, variable.dtype))

    def latest(self) -> tuple[Any, ...]:
        """What the last step found."""
        return tuple(tf.identity(variable) for variable in self.found)

    def average(self, variables: Sequence[Any], weight: float) -> None:
        """Move the averages of these variables towards them."""
        averages = self._of(self.averages, variables)
        for variable, average in zip(variables, averages, strict=True):
            now = tf.cast(variable, average.dtype)
            average.assign_add((now - average) * tf.constant(weight, average.dtype))

    def _of(self, kept: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        """What is kept of these variables: not of those that are frozen now."""
        by_id = {id(v): one for v, one in zip(self.stepped, kept, strict=True)}
        return [by_id[id(variable)] for variable in variables]


class State(Kept, tf.Module):  # type: ignore[misc]
    """What is kept for a model's trainable variables.

    Args:
        variables: the model's, all that are trainable now or were once: what was kept of a layer
            stays while it is frozen.
        every: all that the model has.
        options: which of them are kept.
        before: kept so far, for fewer variables of the same model, or by other options.
    """

    def __init__(
        self,
        variables: Sequence[Any],
        every: Sequence[Any],
        options: Options,
        before: State | None,
    ) -> None:
        super().__init__(name="update_state")
        self.swapped = False
        self._known = frozenset(map(id, variables))
        self.stepped = list(variables)
        self.sums: list[Any] = []
        self.averages: list[Any] = []
        known = [] if before is None else before.stepped
        places = {id(variable): place for place, variable in enumerate(known)}

        def kept(name: str, variable: Any, value: Callable[[], Any]) -> Any:
            place = places.get(id(variable))
            earlier = [] if before is None else getattr(before, name)
            return _variable(value(), variable) if place is None or not earlier else earlier[place]

        with tf.init_scope():
            if options.accumulation_steps > 1:
                self.sums = [
                    kept("sums", v, partial(tf.zeros, v.shape, _wide(v.dtype))) for v in variables
                ]
                if before is not None and before.sums:
                    self.position, self.found = before.position, before.found
                else:
                    self.position = _variable(tf.zeros([], tf.int64), variables[0])
                    kind = measure.precision([variable.dtype for variable in variables])
                    self.found = [_variable(tf.zeros([], kind), variables[0]) for _ in range(3)]
                self._find_places(every, before)
            if options.ema_decay is not None:
                self.averages = [
                    kept("averages", v, partial(tf.cast, v, _wide(v.dtype))) for v in variables
                ]

    def _find_places(self, every: Sequence[Any], before: State | None) -> None:
        """Say where in `reached` each variable is: where it was, else where the model has it."""
        size = len(every)
        taken: dict[int, int] = {}
        if before is not None and before.sums:
            taken = dict(zip(map(id, before.stepped), before.places, strict=True))
            size = max(size, before.reached.shape[0])
        for variable in self.stepped:
            wanted = (i for i, other in enumerate(every) if other is variable)
            free = (i for i in (*wanted, *range(size)) if i not in taken.values())
            if id(variable) not in taken:
                taken[id(variable)] = next(free)
        self.places = tuple(taken[id(variable)] for variable in self.stepped)
        if before is not None and before.sums and size == before.reached.shape[0]:
            self.reached = before.reached  # a function that was traced earlier writes to it
            return
        self.reached = _variable(tf.zeros([size], tf.bool), self.stepped[0])
        if before is not None and before.sums:
            more = size - before.reached.shape[0]
            self.reached.assign(tf.pad(tf.convert_to_tensor(before.reached), [[0, more]]))

    def serves(self, variables: Sequence[Any], options: Options) -> bool:
        """Whether it keeps what these options ask for, for all these variables."""
        asked = (options.accumulation_steps > 1, options.ema_decay is not None)
        kept = (bool(self.sums), bool(self.averages))
        return asked == kept and self._known.issuperset(map(id, variables))

    def part(self, own: Callable[[Any], Any]) -> Kept:
        """One replica's of it; `own` gives that replica's part of a mirrored variable."""
        made = Kept()
        for name in ("stepped", "sums", "averages"):
            setattr(made, name, [own(variable) for variable in getattr(self, name)])
        if self.sums:
            made.position, made.reached = own(self.position), own(self.reached)
            made.places = self.places
            made.found = [own(variable) for variable in self.found]
        return made


def _variable(value: Any, beside: Any) -> Any:
    """A variable on every replica that has a part of another one."""
    strategy = getattr(beside, "distribute_strategy", None)
    if strategy is None or tf.distribute.get_strategy() is strategy:
        return tf.Variable(value, trainable=False)
    with strategy.scope():
        return tf.Variable(value, trainable=False)


def _wide(dtype: Any) -> Any:
    return tf.float32 if dtype.size < 4 else dtype
