# SPDX-License-Identifier: Apache-2.0
"""``torch.compile`` around a training loop leaves the update alone.

A step reads addresses, makes state and binds rules: nothing that Dynamo, which would follow it line
by line, could put into a graph. So a compiled function is split around it (a graph break), and the
step, with all that it calls, runs as it does without: with the same bits.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

_F = TypeVar("_F", bound=Callable[..., Any])


def eagerly(function: _F) -> _F:
    """Let a function run as it does without ``torch.compile``, wherever it is called.

    Torch is not imported for it: before Dynamo was, nothing is compiled. Costs 0.7 us a call.
    """
    apart: Callable[..., Any] | None = None  # functools.cache is nothing that Dynamo likes

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal apart
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if apart is None:
            apart = _made_apart(function)
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
