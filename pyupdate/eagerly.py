# SPDX-License-Identifier: Apache-2.0
"""How public functions are called: outside of ``torch.compile``, and safely in a forked child.

A step reads addresses, makes state and binds rules: nothing that Dynamo, which would follow it line
by line, could put into a graph. So a compiled function is split around it (a graph break), and the
step, with all that it calls, runs as it does without: with the same bits. In a forked child it runs
without torch's threads (forks.py).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

from . import forks

_F = TypeVar("_F", bound=Callable[..., Any])


def eagerly(function: _F) -> _F:
    """Let a function run as it does without ``torch.compile``, wherever it is called.

    And in a forked child, where torch's threads may hang, let it do without them.
    Torch is not imported for it: before Dynamo was, nothing is compiled. Costs 0.7 us a call.
    """
    apart: Callable[..., Any] | None = None  # functools.cache is nothing that Dynamo likes
    made_of: Callable[..., Any] | None = None

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        with forks.one_thread_in_forked_child():
            return function(*args, **kwargs)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal apart, made_of
        inner = guarded if forks.hangs else function
        if "torch._dynamo" not in sys.modules:
            return inner(*args, **kwargs)
        if apart is None or made_of is not inner:
            apart, made_of = _made_apart(inner), inner
        return apart(*args, **kwargs)

    return cast("_F", run)


def _made_apart(function: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    disable: Callable[..., Callable[..., Any]] = torch.compiler.disable
    reason = "pyupdate makes its updates outside of graphs: compile with fullgraph=False"
    return disable(function, reason=reason)


def level_of_caller() -> int:
    """The ``stacklevel`` of a warning that is meant for whoever called pyupdate.

    How many frames lie between depends on whether Dynamo was imported.
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and _is_between(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    return level


def _is_between(module: str) -> bool:
    return module.partition(".")[0] == "pyupdate" or module.startswith("torch._dynamo.")
