# SPDX-License-Identifier: Apache-2.0
"""Variables that no micro-batch of a step has reached: they and their state keep their bits.

An optimizer steps all that it is given, and on a gradient of zero Adam moves by its moments, AdamW
by its weight decay. Which variables the micro-batches of a step reach is known when it is made, not
when it is traced, so those that the last of them does not reach are put back where no other did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from . import optimizers

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
    """The state that an optimizer has for one variable: where Keras's own have it."""
    if optimizers.is_legacy(optimizer):
        yield from (optimizer.get_slot(target, name) for name in optimizer.get_slot_names())
        return
    if optimizers.home(optimizer) == "keras":
        count, place = len(optimizer._trainable_variables), optimizer._get_variable_index(target)
    else:
        places = optimizer._index_dict
        count, place = len(places), places[optimizer._var_key(target)]
    for name, value in vars(optimizer).items():
        if name in NOT_SLOTS:
            continue
        for several in value.values() if isinstance(value, dict) else (value,):
            if isinstance(several, list | tuple) and len(several) == count:
                found = optimizers.tf_variable(several[place])
                if isinstance(found, tf.Variable | tf.distribute.DistributedValues):
                    yield found
