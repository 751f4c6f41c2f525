# SPDX-License-Identifier: Apache-2.0
"""Who runs a plan: the registry of back ends, and the choice between them.

An explicit choice (``PYUPDATE_BACKEND`` or `use_backend`) that cannot run raises with the reason;
``auto`` takes the first of the registry that can, says once in the log what it could not take, and
gives parameters on other devices to ``reference``.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

_log = logging.getLogger("pyupdate")

AUTO = "auto"
VARIABLE = "PYUPDATE_BACKEND"


@dataclass(frozen=True)
class Backend:
    """A row of the registry.

    Attributes:
        name: the name that a user chooses it by.
        module: where it lives: ``why_not() -> str | None``; ``home(row, rule, chosen)``, what the
            rows of one part have in common, None for a row that it leaves to ``reference``; and
            ``part(rows, rules, home, averages)``, a `pytorch.plan.Part`.
        devices: the torch device types that it takes; () for all of them.
        summary: one line for ``python -m pyupdate``.
    """

    name: str
    module: str
    devices: tuple[str, ...]
    summary: str

    def load(self) -> Any:
        """Its module."""
        return importlib.import_module(self.module, __name__)

    def takes(self, device_type: str) -> bool:
        """Whether it can step a parameter on such a device."""
        return not self.devices or device_type in self.devices


REFERENCE = Backend("reference", ".reference", (), "pure Python on torch tensors, any device")

BACKENDS = (
    Backend("cuda", ".cuda", ("cuda",), "compiled CUDA passes"),
    Backend("triton", ".triton", ("cuda", "xpu"), "Triton kernels on a GPU"),
    Backend("cpu", ".cpu", ("cpu",), "compiled C++ passes"),
    REFERENCE,
)
"""In the order in which ``auto`` prefers them."""

_chosen: ContextVar[str | None] = ContextVar("pyupdate_backend", default=None)


def available() -> list[tuple[str, str | None]]:
    """Every back end, with the reason why it cannot run here, or None if it can."""
    return [(backend.name, _why_not(backend)) for backend in BACKENDS]


def choice() -> str:
    """The name in force: `use_backend`'s, else the environment's, else "auto"."""
    return _chosen.get() or os.environ.get(VARIABLE, "").strip().lower() or AUTO


def known_choice() -> str:
    """The same, where it is the name of a back end.

    Raises:
        ValueError: no back end has this name.
    """
    name = choice()
    _check_name(name, VARIABLE if _chosen.get() is None else "use_backend")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Step on one back end inside a ``with`` block.

    Args:
        name: "cuda", "triton", "cpu", "reference" or "auto".

    Raises:
        ValueError: no back end has this name.
        RuntimeError: the back end cannot run on this machine; says why.

    Example:
        >>> import pyupdate
        >>> with pyupdate.use_backend("reference"):
        ...     pass  # updates in here run in pure Python
    """
    _check(name, "use_backend")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def backend_for(device_type: str) -> Backend:
    """The back end that steps parameters on such a device, by the choice in force.

    Raises:
        ValueError, RuntimeError: the explicit choice is unknown or cannot run.
    """
    name = choice()
    if name != AUTO:
        _check(name, VARIABLE if _chosen.get() is None else "use_backend")
    for backend in BACKENDS:
        if name not in (AUTO, backend.name) or not backend.takes(device_type):
            continue
        reason = _why_not(backend)
        if reason is None:
            return backend
        say_once(backend.name, reason)
    return REFERENCE


def _check(name: str, source: str) -> None:
    _check_name(name, source)
    for backend in BACKENDS:
        reason = _why_not(backend) if backend.name == name else None
        if reason is not None:
            message = f"{source}: back end {name!r} cannot run here: {reason}"
            raise RuntimeError(message)


def _check_name(name: str, source: str) -> None:
    names = [AUTO, *(backend.name for backend in BACKENDS)]
    if name not in names:
        message = f"{source}: no back end is named {name!r}; there are: {', '.join(names)}"
        raise ValueError(message)


@cache
def _why_not(backend: Backend) -> str | None:
    try:
        reason: str | None = backend.load().why_not()
    except ImportError as error:
        return str(error)
    return reason


@cache
def say_once(name: str, reason: str) -> None:
    """Log why a back end is passed over; each reason once a process."""
    _log.warning("back end %r cannot run here, falling back: %s", name, reason)
