# SPDX-License-Identifier: Apache-2.0
"""pyupdate: the whole training update in one call, as fast as memory allows, right to the last bit.

    import pyupdate
    model = pyupdate.build(model, "adamw")
    pyupdate.update_model(model, loss)

Importing this package imports neither torch nor tensorflow; its names are loaded when first used.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from .build import build  # not lazily: the module of that name would take the function's place

if TYPE_CHECKING:
    from . import language, optim
    from .backends import use_backend
    from .draining import drain
    from .kernels.own import rule
    from .optim import accelerate
    from .traffic import bytes_per_parameter
    from .update import averaged_weights, finish_window, last_update, update_model

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "accelerate",
    "averaged_weights",
    "build",
    "bytes_per_parameter",
    "drain",
    "finish_window",
    "language",
    "last_update",
    "optim",
    "rule",
    "update_model",
    "use_backend",
]

_HOMES = {
    "accelerate": ".optim",
    "averaged_weights": ".update",
    "bytes_per_parameter": ".traffic",
    "drain": ".draining",
    "finish_window": ".update",
    "last_update": ".update",
    "rule": ".kernels.own",
    "update_model": ".update",
    "use_backend": ".backends",
}

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name in ("language", "optim"):
        return importlib.import_module(f".{name}", __name__)
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name], __name__), name)
        globals()[name] = value
        return value
    message = f"module 'pyupdate' has no attribute '{name}'"
    raise AttributeError(message)


def __dir__() -> list[str]:
    return sorted(__all__)
