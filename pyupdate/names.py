# SPDX-License-Identifier: Apache-2.0
"""How a model is named where its update waits, and what it may wait in; for every framework."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import MutableMapping
from typing import Any

from .remembered import Remembered

_names: Remembered[str] = Remembered()
_numbers = itertools.count(1)
_names_given: Counter[str] = Counter()


def new_name(kind: str) -> str:
    """A name for a model that is attached: its type's, numbered after the first of them."""
    _names_given[kind] += 1
    count = _names_given[kind]
    return kind if count == 1 else f"{kind}_{count}"


def name_of(model: Any) -> str:
    """``model.model_name``, else a name that no other model has."""
    name: Any = getattr(model, "model_name", None)
    if isinstance(name, str) and name:
        return name
    if model not in _names:
        _names[model] = f"{type(model).__name__} #{next(_numbers)}"
    return _names[model]


def check_deferred(name: str, defer: bool, deferred: Any) -> None:
    """Refuse a dict that a deferred update could not be left in, or found in.

    Raises:
        ValueError: names the model.
    """
    if deferred is None:
        if not defer:
            return
        message = (
            f"defer=True for '{name}' needs a dict to leave the update in: give deferred={{}} and "
            "call what it holds when all losses are differentiated"
        )
        raise ValueError(message)
    if not isinstance(deferred, MutableMapping):
        message = f"deferred must be a dict or None, but is a {type(deferred).__name__}"
        raise ValueError(message)
    entry = deferred.get(name)
    if entry is not None and not isinstance(entry, list):
        message = f"deferred['{name}'] must be a list of callables, but is a {type(entry).__name__}"
        raise ValueError(message)
