# SPDX-License-Identifier: Apache-2.0
"""What a trace of an optimizer holds of its Python attributes, to be compared."""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np

from ..remembered import Remembered
from . import rates
from .optimizers import home, is_optimizer
from .rates import Rates

_SCALARS = (bool, int, float, str, bytes, complex, type(None))
_ARRAYS = (np.ndarray, np.generic)
_LISTS = (list, tuple, dict, set, frozenset)  # made once: a union takes 1 us
_OF_VARIABLES = frozenset(
    (
        *("_trainable_variables_indices", "_index_dict", "_tracker"),
        "_exclude_from_weight_decay_cache",
        "_self_unconditional_checkpoint_dependencies",
        "_self_unconditional_dependency_names",
    )
)
"""What says of variables where they stand; a trace may add to it."""
_serials: Remembered[int] = Remembered()
_serial = count()


def fingerprint(optimizer: Any, fed: Rates) -> tuple[Any, ...]:
    """What a trace takes from Python: an optimizer's attributes, and those of its parts, by value.

    A trace holds them as constants, so another value must be another trace: a beta, a clip, a
    schedule, an entry of a list. It keeps nothing alive. Not ``get_config``: that would wait for
    the learning rate.

    Args:
        optimizer: that makes the step.
        fed: the learning rates that its trace reads from variables.
    """
    return _attributes(optimizer, {id(optimizer)}, fed)


def _attributes(owner: Any, seen: set[int], fed: Rates) -> tuple[Any, ...]:
    found: list[Any] = []
    for name, part in vars(owner).items():
        if isinstance(part, _SCALARS):
            found.append((name, type(part), part))
        elif name in _OF_VARIABLES:
            continue
        elif name == "_learning_rate" and rates.is_function(part):
            rate = fed.get(id(owner))
            if rate is None:  # read at the trace
                value = rates.asked(part)
                found.append(
                    (name, _number(part), None if value is None else _value(value, seen, fed))
                )
            else:
                found.append((name, rate.dtype))
        elif (value := _value(part, seen, fed)) is not None:
            found.append((name, value))
    return tuple(found)


def _value(part: Any, seen: set[int], fed: Rates) -> Any:
    """What is compared of a value; None where a trace does not hold it."""
    if isinstance(part, _SCALARS):
        return type(part), part
    if isinstance(part, _ARRAYS):
        if part.dtype.hasobject:
            return "array", _number(part)
        return part.dtype.str, part.shape, part.tobytes()
    if hasattr(part, "assign"):  # a variable is read at each step
        return None
    if isinstance(part, _LISTS):
        return _entries(part, seen, fed)
    if (callable(part) and home(part)) or is_optimizer(part):
        if hasattr(part, "trainable_variables") and not is_optimizer(part):
            return None  # a model or a layer
        if id(part) in seen:
            return "again"
        seen.add(id(part))
        return type(part), _attributes(part, seen, fed)
    return None


def _entries(part: Any, seen: set[int], fed: Rates) -> Any:
    if id(part) in seen:
        return "again"
    items = part.values() if isinstance(part, dict) else part
    if hasattr(next(iter(items), None), "assign"):  # of variables: state, by the hundred
        return None
    seen.add(id(part))
    if isinstance(part, dict):
        keys = [_value(key, seen, fed) for key in part]
        return "dict", tuple(zip(keys, [_value(v, seen, fed) for v in items], strict=True))
    values = [_value(value, seen, fed) for value in items]
    if isinstance(part, set | frozenset):
        return "set", frozenset(values)
    return type(part), tuple(values)


def _number(value: Any) -> int:
    """A number that no other object ever has: an `id` is given again."""
    try:
        found = _serials.get(value)
        if found is None:
            _serials[value] = found = next(_serial)
    except TypeError:  # no weak reference can be had of it
        return id(value)
    return found
