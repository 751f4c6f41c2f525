# SPDX-License-Identifier: Apache-2.0
"""One replica of ``tf.distribute`` by itself: its device, and its own part of every variable.

A compiled function runs on one device, but an optimizer under a strategy writes to all of them,
from outside of the replicas. So while it is traced it holds the plain variables of one replica in
place of the mirrored ones, and no strategy is in force: its text is then what it is on one device.
The trace is made in a thread that has entered no strategy, as no public call leaves one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import tensorflow as tf

from . import optimizers

T = TypeVar("T")


class NotMirrored(Exception):
    """A variable of which not every replica has its own part; says which."""


class Replica:
    """One of the replicas that this process runs.

    Args:
        strategy: whose.
        number: among those of this process.
        variable: any mirrored variable: its part says where the replica is.
    """

    def __init__(self, strategy: Any, number: int, variable: Any) -> None:
        self._strategy = strategy
        self.number = number
        self.device = self.own(variable).device

    def own(self, variable: Any) -> Any:
        """The replica's part of a mirrored variable, or of one of Keras's.

        Raises:
            NotMirrored: it has none.
        """
        held = optimizers.tf_variable(variable)
        parts = self._strategy.experimental_local_results(held)
        several = isinstance(held, tf.distribute.DistributedValues)
        if not several or len(parts) != len(self._strategy.extended.worker_devices):
            message = f"{getattr(held, 'name', held)} is not mirrored on every replica"
            raise NotMirrored(message)
        return parts[self.number]

    @contextmanager
    def alone(self, optimizer: Any, targets: Sequence[Any]) -> Iterator[None]:
        """The optimizer and what it steps hold this replica's parts, and know of no strategy.

        Raises:
            NotMirrored: they hold a variable that has none.
        """
        with ExitStack() as stack:
            for holder, attributes in _swaps([optimizer, *targets], self.own):
                stack.enter_context(optimizers.replaced(holder, **attributes))
            yield

    def made(self, make: Callable[[], T]) -> T:
        """What a function makes on the replica's device, with no strategy in force."""

        def here() -> T:
            with tf.device(self.device):
                return make()

        return without_strategy(here)


def without_strategy(make: Callable[[], T]) -> T:
    """What a function makes where no strategy is in force, whichever is in force here."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(make).result()


def replicas_of(strategy: Any, optimizer: Any, targets: Sequence[Any]) -> list[Replica]:
    """This process's replicas.

    Raises:
        NotMirrored: the optimizer or the model holds a variable that not every replica has.
    """
    places = range(len(strategy.extended.worker_devices))
    found = [Replica(strategy, number, targets[0]) for number in places]
    for replica in found:
        _swaps([optimizer, *targets], replica.own)
    if any("TPU" in replica.device for replica in found):
        message = "a TPU compiles all that its replicas run"
        raise NotMirrored(message)
    return found


def _swaps(roots: Sequence[Any], own: Callable[[Any], Any]) -> list[tuple[Any, dict[str, Any]]]:
    """Every object that holds a variable, with those of its attributes that must be others."""
    found: list[tuple[Any, dict[str, Any]]] = []
    seen: set[int] = set()
    waiting = list(roots)

    def localised(value: Any) -> Any:
        """The value with parts for variables; itself where it holds none, or is its own holder."""
        if isinstance(value, tf.Variable | tf.distribute.DistributedValues):
            return own(value)
        if isinstance(value, tf.distribute.Strategy):
            return default
        if isinstance(value, dict):
            parts = {key: localised(part) for key, part in value.items()}
            return parts if any(parts[key] is not value[key] for key in parts) else value
        if type(value) is tuple or isinstance(value, list):
            several = [localised(part) for part in value]
            if all(a is b for a, b in zip(several, value, strict=True)):
                return value
            return tuple(several) if isinstance(value, tuple) else several
        if optimizers.home(value) and hasattr(value, "__dict__") and not isinstance(value, type):
            waiting.append(value)
        return value

    default = without_strategy(tf.distribute.get_strategy)
    while waiting:
        holder = waiting.pop()
        if id(holder) in seen or isinstance(holder, tf.Variable):
            continue
        seen.add(id(holder))
        held = dict(vars(holder))
        now = {name: localised(value) for name, value in held.items()}
        changed = {name: value for name, value in now.items() if value is not held[name]}
        if changed:
            found.append((holder, changed))
    return found
