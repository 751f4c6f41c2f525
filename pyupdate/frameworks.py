# SPDX-License-Identifier: Apache-2.0
"""Whose an object is, found without importing a framework.

An object of torch's can only exist where torch is in ``sys.modules``; one of TensorFlow's or
Keras's shows it in the modules of its type's bases. Nothing here imports either.
"""

from __future__ import annotations

import sys
from typing import Any

_TENSORFLOW = frozenset({"tensorflow", "keras", "tf_keras"})


def is_torch_tensor(value: object) -> bool:
    """Whether this is a ``torch.Tensor``."""
    return _is_torch(value, "Tensor", "torch")


def is_torch_module(value: object) -> bool:
    """Whether this is a ``torch.nn.Module``."""
    return _is_torch(value, "Module", "torch.nn")


def is_tensorflow(value: object) -> bool:
    """Whether this is TensorFlow's or Keras's: a tensor, a variable, a model, a tape."""
    return any(base.__module__.partition(".")[0] in _TENSORFLOW for base in type(value).__mro__)


def check_model(model: object, name: str = "model") -> None:
    """Refuse a model that is no ``torch.nn.Module``.

    Raises:
        ValueError: names its type; a Keras model (on any backend of Keras) is told apart.
    """
    kind = type_name(model)
    if is_tensorflow(model):
        message = (
            f"{name} is a {kind}: TensorFlow and Keras are not in this version of pyupdate; "
            "give a torch.nn.Module"
        )
        raise ValueError(message)
    if not is_torch_module(model):
        found = f"the class {model.__qualname__}" if isinstance(model, type) else f"a {kind}"
        message = f"{name} must be a torch.nn.Module, but is {found}: give an instance of one"
        raise ValueError(message)


def type_name(value: object) -> str:
    """The type of a value as error messages write it."""
    kind = type(value)
    if kind.__module__ == "builtins":
        return kind.__qualname__
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_torch(value: object, kind: str, home: str) -> bool:
    found: Any = getattr(sys.modules.get(home), kind, None)
    return isinstance(found, type) and isinstance(value, found)
