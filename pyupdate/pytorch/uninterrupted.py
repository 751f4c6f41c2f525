# SPDX-License-Identifier: Apache-2.0
"""Calls between which no interrupt comes: Ctrl-C must find a step made and noted, or neither.

Python looks for one where a function of its own begins and behind every call that it makes itself.
What is called by C alone, as by ``list.extend(map(...))``, has no such place between its parts.
"""

from __future__ import annotations

import operator
import threading
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

_acquire = operator.methodcaller("acquire", False)
_release = operator.methodcaller("release")
exhaust: Callable[[Iterable[object]], object] = partial(deque, maxlen=0)
"""Runs through something, of which nothing is kept."""


def append_result(results: list[Any], function: Callable[..., Any], *args: object) -> None:
    """Call a function of C's and append what it returns: behind the call, the answer is there."""
    results.extend(map(function, *zip(args)))


def take(held: list[threading.Lock], lock: threading.Lock) -> bool:
    """Acquire a lock that is free, and list it in `held`; whether it was."""
    count = len(held)
    held.extend(filter(_acquire, (lock,)))
    return len(held) > count


def releases(held: list[threading.Lock]) -> Iterable[object]:
    """To be made before a lock is taken: `exhaust` it, and all that were taken are free again."""
    return map(_release, held)
