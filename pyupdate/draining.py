# SPDX-License-Identifier: Apache-2.0
"""``drain``: make every update that waits in a deferred dict, several in one go where that can be.

Thin, like the rest of the front end: what can go together is known by the framework's own half.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from itertools import groupby
from typing import Any, Self

from .eagerly import eagerly


class Waiting(ABC):
    """An update that waits: called, it is made. A class knows how to make several."""

    __slots__ = ()

    @abstractmethod
    def __call__(self) -> None:
        """Make it."""

    @classmethod
    def make_all(cls, updates: Sequence[Self]) -> Iterator[Self]:
        """Make them with the result of one after the other, and yield each when it was made."""
        for update in updates:
            update()
            yield update


@eagerly
def drain(deferred: MutableMapping[str, list[Callable[[], None]]]) -> None:
    """Make every update that waits in a deferred dict, and take it out.

    The same as calling every callable in the dict's order, to the bit. Updates of different models
    that nothing stands between are made in one parallel region (back end ``cpu``) or by the
    launches of one (``cuda``, ``triton``), each with its own norm, multiplier, scaler and skip:
    faster where models are small. Those with step hooks or ``error_if_nonfinite``, among others,
    are made alone. Callables of your own are called in their place.

    Args:
        deferred: what ``update_model(..., defer=True, deferred=...)`` has filled. Callables that
            are put into it meanwhile stay.

    Raises:
        ValueError: it is no mapping of lists of callables; nothing was made.
        RuntimeError: one of its callables drains it again.
        What the callable raises that fails. It and what comes after it stay in the dict and wait;
        what came before was made and is gone.

    Example:
        >>> import torch, pyupdate
        >>> models = [pyupdate.build(torch.nn.Linear(4, 1), "adamw") for _ in range(3)]
        >>> deferred = {}
        >>> for model in models:
        ...     pyupdate.update_model(model, model(torch.ones(8, 4)), defer=True, deferred=deferred)
        >>> pyupdate.drain(deferred)
        >>> deferred, models[0].weight.grad
        ({}, None)
    """
    _check(deferred)
    if id(deferred) in _drained:
        message = (
            "drain was called for a dict that is being drained: by one of its own callables, which "
            "would be called again, or by another thread; leave that call out"
        )
        raise RuntimeError(message)
    try:
        _drained.add(id(deferred))
        _make_all(deferred)
    finally:
        _drained.discard(id(deferred))


_drained: set[int] = set()
"""The ids of the dicts that are being drained."""


def _make_all(deferred: MutableMapping[str, list[Callable[[], None]]]) -> None:
    order = [(name, update) for name, updates in deferred.items() for update in updates]
    for kind, run in groupby(order, key=lambda entry: type(entry[1])):
        entries = list(run)
        if issubclass(kind, Waiting):
            updates: list[Any] = [update for _, update in entries]
            for (name, _), made in zip(entries, kind.make_all(updates), strict=True):
                _take_out(deferred, name, made)
        else:
            for name, update in entries:
                update()
                _take_out(deferred, name, update)
    for name in [name for name, updates in deferred.items() if not updates]:
        del deferred[name]


def _check(deferred: Any) -> None:
    if not isinstance(deferred, MutableMapping):
        message = f"deferred must be a dict, but is a {type(deferred).__name__}"
        raise ValueError(message)
    for name, updates in deferred.items():
        if not isinstance(updates, list):
            found = type(updates).__name__
            message = f"deferred[{name!r}] must be a list of callables, but is a {found}"
            raise ValueError(message)
        for update in updates:
            if not callable(update):
                message = (
                    f"deferred[{name!r}] holds a {type(update).__name__}, which is no callable"
                )
                raise ValueError(message)


def _take_out(
    deferred: MutableMapping[str, list[Callable[[], None]]],
    name: str,
    update: Callable[[], None],
) -> None:
    """Take a callable out of the dict, if it is still there."""
    updates = deferred.get(name, [])
    for index, other in enumerate(updates):
        if other is update:
            del updates[index]
            break
    if name in deferred and not updates:
        del deferred[name]
