# SPDX-License-Identifier: Apache-2.0
"""Models on several replicas, each with gradients of its own that are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from training import Known

import pyupdate


def run(strategy: Any, model: Any, per_replica: Any, graph: bool) -> None:
    """One update on every replica, by gradients of its own."""
    repeated(strategy, model, graph)(per_replica)


def repeated(strategy: Any, model: Any, graph: bool) -> Callable[[Any], None]:
    """Updates by gradients that are given, one array of both replicas' for each variable."""

    def each(grads: Any) -> None:
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        with tf.GradientTape() as tape:
            loss = model([tf.gather(grad, replica) for grad in grads])
            pyupdate.update_model(model, loss, tape=tape)

    def step(grads: Any) -> None:
        strategy.run(each, args=(grads,))

    called = tf.function(step) if graph else step
    return lambda grads: called([tf.constant(np.float32(g)) for g in grads])


def held(strategy: Any, model: Any) -> list[list[Any]]:
    """Every replica's values of every variable."""
    return [on_each(strategy, v.value) for v in model.held]


def on_each(strategy: Any, variable: Any) -> list[Any]:
    """Every replica's value of a variable."""
    return [local.numpy() for local in strategy.experimental_local_results(variable)]


def first(strategy: Any, variable: Any) -> float:
    """The first replica's value of one of the optimizer's variables."""
    return float(strategy.experimental_local_results(variable.value)[0])


def made(strategy: Any, values: Any, optimizer: Any, **options: Any) -> Any:
    with strategy.scope():
        return pyupdate.build(Known(values), optimizer, **options)
