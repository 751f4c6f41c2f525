# SPDX-License-Identifier: Apache-2.0
"""An optimizer's variables belong to the ``tf.distribute`` strategy that the model's belong to.

One that is made outside of it has plain variables, of which the replicas of a mirrored model share
one: each of them counts its steps and adds to its moments, and the weights drift apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import tensorflow as tf

from . import halves, optimizers
from .alone import without_strategy


def scope_of(variables: Sequence[Any]) -> AbstractContextManager[Any]:
    """The scope of the strategy of these ``tf.Variable``, where it is not in force already."""
    strategy = _strategy(variables)
    if strategy is None or tf.distribute.get_strategy() is strategy:
        return nullcontext()
    scope: AbstractContextManager[Any] = strategy.scope()
    return scope


def make_state(
    optimizer: Any, model_variables: Sequence[Any], variables: Sequence[Any], name: str
) -> None:
    """Give an optimizer its state, `halves.make_state`, beside the model's variables.

    Raises:
        ValueError: it holds variables elsewhere.
    """
    if halves.is_settled(optimizer):
        return

    def make() -> None:
        with scope_of(variables):
            halves.make_state(optimizer, model_variables, variables, name)

    if optimizers.is_built(optimizer):
        without_strategy(make)  # at once: every replica asks for it
        return
    check_inside(optimizer, variables, name)
    make()


def check_inside(optimizer: Any, variables: Sequence[Any], name: str) -> None:
    """Refuse an optimizer that was made outside of the strategy of the model's variables.

    Raises:
        ValueError: says how to make it.
    """
    strategy = _strategy(variables)
    if strategy is None:
        return
    held = optimizer.variables
    for variable in held() if callable(held) else held:
        if getattr(optimizers.tf_variable(variable), "distribute_strategy", None) is not strategy:
            message = (
                f"the optimizer of '{name}' was made outside of the {type(strategy).__name__} of "
                f"the model's variables ({variable.name}): make it inside of `with "
                "strategy.scope():`, or give pyupdate.build a name or a callable"
            )
            raise ValueError(message)


def _strategy(variables: Sequence[Any]) -> Any:
    """The strategy with several replicas that variables belong to; None for none."""
    found = getattr(variables[0], "distribute_strategy", None) if variables else None
    return found if found is not None and found.num_replicas_in_sync > 1 else None
