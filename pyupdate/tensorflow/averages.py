# SPDX-License-Identifier: Apache-2.0
"""Averaged weights in a Keras model for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tensorflow as tf

from pyupdate.names import name_of

from . import replicas
from .state import State


@contextmanager
def swapped_in(model: Any) -> Iterator[None]:
    """Do what `pyupdate.averaged_weights` says with a Keras model.

    Raises:
        ValueError: no averages are kept.
        RuntimeError: they are in the model already, or this is one replica of several.
    """
    name = name_of(model)
    state = getattr(model, "update_state", None)
    if not isinstance(state, State) or not state.averages:
        message = (
            f"'{name}' keeps no averages: give pyupdate.build an ema_decay, and update the model"
        )
        raise ValueError(message)
    if replicas.count() > 1:
        message = (
            f"averaged_weights of '{name}' on one replica of several: enter it outside of "
            "strategy.run"
        )
        raise RuntimeError(message)
    check_not_swapped(model, name)
    own = [tf.identity(variable) for variable in state.stepped]
    for variable, average in zip(state.stepped, state.averages, strict=True):
        variable.assign(tf.cast(average, variable.dtype))
    state.swapped = True
    try:
        yield
    finally:
        state.swapped = False
        for variable, value in zip(state.stepped, own, strict=True):
            variable.assign(value)


def check_not_swapped(model: Any, name: str) -> None:
    """Refuse a step on averages.

    Raises:
        RuntimeError: the model has its averages in the place of its weights.
    """
    state = getattr(model, "update_state", None)
    if isinstance(state, State) and state.swapped:
        message = (
            f"'{name}' has its averages in the place of its weights: leave averaged_weights first"
        )
        raise RuntimeError(message)
