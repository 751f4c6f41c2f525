# SPDX-License-Identifier: Apache-2.0
"""Threads and garbage collection, the same for every benchmark."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from workloads import THREADS


@pytest.fixture(autouse=True)
def settled() -> Iterator[None]:
    """The benchmark's thread count, and no collection while the clock runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    torch.set_num_threads(before)
