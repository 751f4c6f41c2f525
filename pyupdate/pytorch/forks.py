# SPDX-License-Identifier: Apache-2.0
"""Torch's tensor operations in a forked child, where they may not use threads.

GNU OpenMP hangs in a child whose parent has used it, and so does any operation of torch on some
33,000 elements or more (`torch.zeros_like`). The compiled passes look after themselves
(csrc/cpu/parallel.h); what a step does with torch's operations runs on one thread there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_forked: list[int] = []  # not empty in a forked child

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _forked.append(os.getpid()))


@contextmanager
def one_thread_in_forked_child() -> Iterator[None]:
    """Keep torch from its threads, in a forked child only."""
    if not _forked:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
