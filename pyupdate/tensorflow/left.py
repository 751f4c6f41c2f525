# SPDX-License-Identifier: Apache-2.0
"""Variables that no micro-batch of a step has reached: they and their state keep their bits.

An optimizer steps all that it is given, and on a gradient of zero Adam moves by its moments, AdamW
by its weight decay. Which variables the micro-batches of a step reach is known when it is made, not
when it is traced, so those that the last of them does not reach are put back where no other did.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from ..remembered import Remembered
from . import optimizers

_log = logging.getLogger("pyupdate")
_warned: Remembered[bool] = Remembered()

NOT_SLOTS = ("_variables", "_trainable_variables")
"""Lists of an optimizer whose places are not those of its variables, or are these themselves."""


def put_back(reached: Sequence[Any], held: Sequence[Sequence[Any]]) -> Callable[[], None]:
    """What is to be called after the step.

    Args:
        reached: bool tensors, whether a micro-batch has reached a variable.
        held: the ``tf.Variable`` of each that must keep their bits where none has.
    """
    every = [(flag, v) for flag, several in zip(reached, held, strict=True) for v in several]
    before = [tf.identity(variable) for _, variable in every]

    def back() -> None:
        for (flag, variable), value in zip(every, before, strict=True):
            variable.assign(tf.where(flag, tf.convert_to_tensor(variable), value))

    return back


def slots(optimizer: Any, target: Any) -> Iterator[Any]:
    """The state that an optimizer has for one variable, wherever it is said which variable's it is.

    In a list with an entry for each variable, or a dict by variables, each entry a variable or
    several; in lists and dicts of such; and likewise in the optimizers that it hands variables to.
    """
    if optimizers.is_legacy(optimizer):
        yield from (optimizer.get_slot(target, name) for name in optimizer.get_slot_names())
        return
    for one in _with_inner(optimizer):
        place = _place(one, target)
        if place is not None:
            names = _names(one, target)
            for name, value in vars(one).items():
                if name not in NOT_SLOTS and not name.startswith("_self_"):  # of TensorFlow's own
                    yield from _entries(value, place, _count(one), names)


def warn_of_unplaced(optimizer: Any, targets: Sequence[Any]) -> None:
    """Say once which state of an optimizer is not put back, as nothing tells whose it is."""
    if optimizer in _warned or optimizers.is_legacy(optimizer):
        return
    _warned[optimizer] = True
    if optimizers.home(optimizer) == "keras":
        targets = [v for one in _with_inner(optimizer) for v in one._trainable_variables]
    elif len(targets) < _count(optimizer):  # those of tf-keras do not list what they step
        return
    placed = {id(state) for target in targets for state in slots(optimizer, target)}
    held = map(optimizers.tf_variable, optimizer.variables)
    unplaced = [v.name for v in held if v.shape.rank and id(v) not in placed]
    if unplaced:
        _log.warning(
            "%s keeps %s where nothing tells of which variable it is, so it moves, by a gradient "
            "of zero, in steps that do not reach that variable: keep such state in lists with an "
            "entry for each variable, or in dicts by their paths",
            type(optimizer).__name__,
            ", ".join(unplaced),
        )


def _with_inner(optimizer: Any) -> Iterator[Any]:
    """It, and the optimizers among its attributes."""
    yield from optimizers.parts(optimizer)
    yield from (held for held in vars(optimizer).values() if optimizers.is_optimizer(held))


def _count(optimizer: Any) -> int:
    """How many variables it steps."""
    keras = optimizers.home(optimizer) == "keras"
    return len(optimizer._trainable_variables if keras else optimizer._index_dict)


def _place(optimizer: Any, target: Any) -> int | None:
    """Where a variable is among those; None where it is not."""
    keras = optimizers.home(optimizer) == "keras"
    places = optimizer._trainable_variables_indices if keras else optimizer._index_dict
    found: int | None = places.get(optimizer._var_key(target))
    return found


def _names(optimizer: Any, target: Any) -> tuple[Any, ...]:
    """What a variable may be called in a dict."""
    held = optimizers.tf_variable(target)
    path = getattr(target, "path", target.name)
    return (optimizer._var_key(target), id(target), id(held), path, target.name, held.name)


def _entries(value: Any, place: int, count: int, names: tuple[Any, ...]) -> Iterator[Any]:
    """The variables at a variable's place in a list or dict."""
    if isinstance(value, list | tuple):
        several = [len(v) == count for v in value if isinstance(v, list | tuple)]
        if len(value) == count and not (count > 1 and any(several)):
            yield from _variables(value[place])
        elif len(value) != count:
            for part in value:
                yield from _entries(part, place, count, names)
    elif isinstance(value, dict):
        known = [name for name in names if name in value]
        for part in [value[known[0]]] if known else value.values():
            yield from _variables(part) if known else _entries(part, place, count, names)


def _variables(value: Any) -> Iterator[Any]:
    """A variable, or all in a list or dict."""
    if isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _variables(part)
        return
    found = getattr(value, "value", None) if optimizers.home(value) == "keras" else value
    if isinstance(found, tf.Variable | tf.distribute.DistributedValues):
        yield found
