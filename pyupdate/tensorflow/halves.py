# SPDX-License-Identifier: Apache-2.0
"""Float32 copies of variables in half precision, on which the optimizer's step is made.

Keras makes the state of a bfloat16 variable in bfloat16 and computes in it: Adam's beta of 0.999 is
1 there, the second moment stays 0 and so does the step. And a weight of 1 that moves by 0.001 is
rounded back to 1. So the optimizer is built on copies in float32, whose sums of small moves are
what the variable is rounded from.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf

from ..remembered import Remembered
from . import optimizers

_log = logging.getLogger("pyupdate")
_copies: Remembered[list[tuple[Any, Any]]] = Remembered()
"""Of an optimizer that has its state, the ``tf.Variable`` in half precision, each with its copy."""


@dataclass(frozen=True)
class Halves:
    """Variables in half precision, each with its float32 copy."""

    pairs: list[tuple[Any, Any]] = field(default_factory=list)

    def widen(self) -> None:
        """Take over what somebody else has written into a variable since it was rounded."""
        for variable, copy in self.pairs:
            same = tf.cast(copy, variable.dtype) == tf.convert_to_tensor(variable)
            copy.assign(tf.where(same, copy, tf.cast(variable, tf.float32)))

    def narrow(self) -> None:
        """Round the copies into the variables, to nearest even."""
        for variable, copy in self.pairs:
            variable.assign(tf.cast(copy, variable.dtype))

    @contextmanager
    def as_excluded(self, optimizer: Any) -> Iterator[None]:
        """No weight decay for copies of what the user excluded from it as a variable.

        Keras keeps such variables by keys, and may be told of them at any time.
        """
        with ExitStack() as stack:
            for one in optimizers.parts(optimizer):
                kept = getattr(one, "_exclude_from_weight_decay", ())
                if kept:  # a legacy optimizer knows no keys
                    keys = [one._var_key(copy) for v, copy in self.pairs if one._var_key(v) in kept]
                    more = {"_exclude_from_weight_decay": [*kept, *keys]}
                    stack.enter_context(optimizers.replaced(one, **more))
            yield


def is_settled(optimizer: Any) -> bool:
    """Whether `make_state` has nothing more to do for an optimizer."""
    return optimizer in _copies


def make_state(
    optimizer: Any, model_variables: Sequence[Any], variables: Sequence[Any], name: str
) -> None:
    """Give an optimizer its state, in float32 for variables in half precision.

    Args:
        optimizer: one that has it or not.
        model_variables: the model's.
        variables: the ``tf.Variable`` of each: Keras asks 2 us for one.
        name: the model's.
    """
    each = zip(model_variables, variables, strict=True)
    halves = [v for v, variable in each if variable.dtype.size == 2]
    if optimizers.is_built(optimizer):
        if optimizers.home(optimizer) == "keras":  # of another model too, whose turn comes later
            stepped = [v for one in _lists(optimizer) for v in one._trainable_variables]
            held = {id(optimizers.tf_variable(v)): v for v in stepped if _is_half(v)}
            halves = list(held.values())
        _copies[optimizer] = _taken_over(optimizer, halves, name) if halves else []
        return
    with tf.init_scope():
        copies = [_copy(v) for v in halves]
    by_id = {id(half): copy for half, copy in zip(halves, copies, strict=True)}
    waiting = [(one, one._trainable_variables) for one in _lists(optimizer)]
    optimizers.make_state(optimizer, [by_id.get(id(v), v) for v in model_variables])
    if copies:
        _restore(optimizer, waiting, copies)
    _copies[optimizer] = _pairs(halves, copies)


def _is_half(variable: Any) -> bool:
    return optimizers.tf_variable(variable).dtype in (tf.bfloat16, tf.float16)


def _pairs(halves: Sequence[Any], copies: Sequence[Any]) -> list[tuple[Any, Any]]:
    return list(zip(map(optimizers.tf_variable, halves), copies, strict=True))


def _lists(optimizer: Any) -> list[Any]:
    """The optimizers of Keras 3 in one that list the variables they step."""
    each = (optimizer, optimizers.stepped(optimizer))
    several = [inner for one in each for inner in optimizers.parts(one)]
    return [one for one in several if hasattr(one, "_trainable_variables")]


def _restore(optimizer: Any, waiting: Sequence[tuple[Any, Any]], copies: Sequence[Any]) -> None:
    """Let a ``tf.train.Checkpoint`` have the copies, and one that was restored before fill them.

    In Keras 3 it has them as the variables that the optimizer steps, but what it read is kept for
    the list of them that was there then, and building makes another. tf-keras has no such list.
    """
    for one, earlier in waiting:
        earlier.extend(one._trainable_variables)
    if not waiting:
        kept = tf.Module()
        kept.copies = list(copies)
        optimizers.stepped(optimizer)._track_trackable(kept, name="float32_copies")


def _taken_over(optimizer: Any, halves: Sequence[Any], name: str) -> list[tuple[Any, Any]]:
    """The copies for an optimizer that Keras has built on the variables, as of a ``.keras`` file.

    Its state goes on in float32. Keras's variables of it stay, whatever holds them: what they hold
    is made anew.
    """
    kind = optimizers.tf_variable(halves[0]).dtype.name
    if optimizers.home(optimizer) != "keras":
        _log.warning(
            "the optimizer of '%s' has state in %s, in which small moves are lost: attach it "
            "by pyupdate.build before it is built",
            name,
            kind,
        )
        return []
    lists = _lists(optimizer)
    with tf.init_scope():
        copies = [_copy(v) for v in halves]
        for state in optimizer.variables:
            if _is_half(state):
                wide = _copy(state)
                state._value, state._dtype = wide.value, wide.dtype
    by_id = {id(optimizers.tf_variable(v)): c for v, c in zip(halves, copies, strict=True)}
    for one in lists:
        for half, copy in zip(halves, copies, strict=True):
            for places in (one._trainable_variables_indices, *_chosen(one)):
                if (place := places.pop(one._var_key(half), None)) is not None:
                    places[one._var_key(copy)] = place
        each = one._trainable_variables
        one._trainable_variables = [by_id.get(id(optimizers.tf_variable(v)), v) for v in each]
    _log.warning(
        "the optimizer of '%s' was built by Keras, with state in %s: it goes on in float32 from "
        "what was rounded so; to keep every bit, let pyupdate.build make it, and a "
        "tf.train.Checkpoint of model and optimizer carry it",
        name,
        kind,
    )
    return _pairs(halves, copies)


def _chosen(one: Any) -> tuple[dict[Any, int], ...]:
    """Which of several optimizers steps a variable, where it is one of several."""
    found = getattr(one, "_var_to_optimizer_idx", None)
    return () if found is None else (found,)


def of(
    optimizer: Any, owners: Sequence[Any], variables: Sequence[Any], name: str
) -> tuple[Halves, list[Any]]:
    """The copies of a model's variables; what the optimizer steps: these, or a copy.

    Args:
        optimizer: that has its state.
        owners: the model's variables.
        variables: the ``tf.Variable`` of each.
        name: the model's.

    Raises:
        ValueError: the optimizer does not know one of them.
    """
    known = {id(variable): (variable, copy) for variable, copy in _copies.get(optimizer) or []}
    found = [known[id(v)] for v in variables if id(v) in known]
    pairs = [(variable, optimizers.tf_variable(copy)) for variable, copy in found]
    stand_ins = {id(variable): copy for variable, copy in found}
    targets = [stand_ins.get(id(v), o) for v, o in zip(variables, owners, strict=True)]
    optimizers.check_known(optimizer, targets, name)
    return Halves(pairs), targets


def _copy(variable: Any) -> Any:
    """A variable in float32 with all that an optimizer asks of the one it stands for.

    Its path and name choose by patterns: what is excluded from weight decay, Muon's layers, the
    optimizer of several. Its constraint is applied after the step.
    """
    held = optimizers.tf_variable(variable)
    scope, _, name = held.name.partition(":")[0].rpartition("/")
    value = tf.cast(held, tf.float32)
    with tf.name_scope(f"{scope}/" if scope else ""):  # not below the caller's
        if optimizers.home(variable) != "keras":
            return tf.Variable(value, name=name, constraint=held.constraint)
        import keras

        made = keras.Variable(value, dtype="float32", name=variable.name)
    made._path = variable.path
    made.constraint = variable.constraint
    made.overwrite_with_gradient = variable.overwrite_with_gradient
    return made
