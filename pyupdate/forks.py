# SPDX-License-Identifier: Apache-2.0
"""Torch's tensor operations in a forked child, where they may not use threads.

GNU OpenMP hangs in a child whose parent has used it, and so does any operation of torch on some
33,000 elements or more (`torch.zeros_like`, a matrix product). The compiled passes look after
themselves (csrc/cpu/parallel.h); whatever else a public function does runs on one thread there.

A parent of one thread has no pool that a child could wait for: its child is not held back.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_before = threading.local()
"""Inside of the block: `threads`, torch's number outside of it."""

hangs = False
"""Whether torch's threads may hang in this process; only ever set to True, by a fork."""

_parent_has_threads = False  # when it forked last


def _look_before() -> None:
    global _parent_has_threads
    try:
        _parent_has_threads = len([*Path("/proc/self/task").iterdir()]) > 1
    except OSError:  # not Linux
        _parent_has_threads = True


def _look_in_child() -> None:
    global hangs
    hangs = hangs or _parent_has_threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_look_before, after_in_child=_look_in_child)


@contextmanager
def one_thread_in_forked_child() -> Iterator[None]:
    """Keep torch from its threads, where they may hang only."""
    if not hangs or hasattr(_before, "threads") or "torch" not in sys.modules:
        yield
        return
    import torch

    _before.threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(_before.threads)
        del _before.threads


def threads() -> int:
    """How many threads the compiled passes may use: torch's number, outside of that block."""
    import torch

    outside: int | None = getattr(_before, "threads", None) if hangs else None
    return torch.get_num_threads() if outside is None else outside
