# SPDX-License-Identifier: Apache-2.0
"""The back end ``cuda`` over a module of tests/device, with the CPU as its device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from unittest import mock

from pyupdate import backends
from pyupdate.backends import cuda
from pyupdate.pytorch import plan

BACKEND = backends.Backend("cuda", ".cuda", ("cpu",), "the CUDA sources on a CPU")


@contextmanager
def cuda_on_cpu(module: ModuleType) -> Iterator[None]:
    """Step parameters on the CPU by such a module inside the block."""
    token = backends._chosen.set(BACKEND.name)
    try:
        with (
            mock.patch.object(cuda, "_module", lambda: module),
            mock.patch.object(plan, "backend_for", lambda device_type: BACKEND),
        ):
            yield
    finally:
        backends._chosen.reset(token)
