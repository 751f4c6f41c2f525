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
    return _is_a(value, "Tensor", "torch")


def is_torch_module(value: object) -> bool:
    """Whether this is a ``torch.nn.Module``."""
    return _is_a(value, "Module", "torch.nn")


def is_torch_optimizer(value: object) -> bool:
    """Whether this is a ``torch.optim.Optimizer``."""
    return _is_a(value, "Optimizer", "torch.optim")


def is_tensorflow_tensor(value: object) -> bool:
    """Whether this is a ``tf.Tensor``, eager or symbolic."""
    return _is_a(value, "Tensor", "tensorflow")


def is_tensorflow(value: object) -> bool:
    """Whether this is TensorFlow's or Keras's: a tensor, a variable, a model, a tape."""
    return any(base.__module__.partition(".")[0] in _TENSORFLOW for base in type(value).__mro__)


def is_keras_model(value: object) -> bool:
    """Whether this is a model of Keras's or tf-keras's, on whatever back end of Keras."""
    return any(
        base.__name__ == "Model" and base.__module__.partition(".")[0] in _TENSORFLOW
        for base in type(value).__mro__
    )


def check_model(model: object, name: str = "model") -> None:
    """Refuse what is neither a ``torch.nn.Module`` nor a Keras model.

    Raises:
        ValueError: names its type.
    """
    if is_torch_module(model) or is_keras_model(model):
        return
    found = (
        f"the class {model.__qualname__}" if isinstance(model, type) else f"a {type_name(model)}"
    )
    message = (
        f"{name} must be a torch.nn.Module or a Keras model, but is {found}: give an instance of "
        "one"
    )
    raise ValueError(message)


def type_name(value: object) -> str:
    """The type of a value as error messages write it."""
    kind = type(value)
    if kind.__module__ == "builtins":
        return kind.__qualname__
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_a(value: object, kind: str, home: str) -> bool:
    found: Any = getattr(sys.modules.get(home), kind, None)
    return isinstance(found, type) and isinstance(value, found)
