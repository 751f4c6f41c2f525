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
_warned: Remembered[bool] = Remembered()


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
            for one in (optimizer, *getattr(optimizer, "_inner_optimizers", ())):
                kept = getattr(one, "_exclude_from_weight_decay", ())
                known = [copy for variable, copy in self.pairs if one._var_key(variable) in kept]
                if known:
                    keys = [*kept, *map(one._var_key, known)]
                    more = optimizers.replaced(one, _exclude_from_weight_decay=keys)
                    stack.enter_context(more)
            yield


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
        if halves and optimizer not in _copies and optimizer not in _warned:
            _warned[optimizer] = True
            _log.warning(
                "the optimizer of '%s' has state in %s, in which small moves are lost: attach it "
                "by pyupdate.build before it is built",
                name,
                optimizers.tf_variable(halves[0]).dtype.name,
            )
        return
    if not halves:
        optimizers.make_state(optimizer, model_variables)
        return
    with tf.init_scope():
        copies = [_copy(v) for v in halves]
    pairs = list(zip(halves, copies, strict=True))
    by_id = {id(half): copy for half, copy in pairs}
    optimizers.make_state(optimizer, [by_id.get(id(v), v) for v in model_variables])
    _copies[optimizer] = [(optimizers.tf_variable(half), copy) for half, copy in pairs]


def of(optimizer: Any, variables: Sequence[Any]) -> tuple[Halves, dict[int, Any]]:
    """The copies of these ``tf.Variable``; what the optimizer steps in the place of each, by id."""
    known = {id(variable): (variable, copy) for variable, copy in _copies.get(optimizer) or []}
    found = [known[id(v)] for v in variables if id(v) in known]
    pairs = [(variable, optimizers.tf_variable(copy)) for variable, copy in found]
    return Halves(pairs), {id(variable): copy for variable, copy in found}


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
