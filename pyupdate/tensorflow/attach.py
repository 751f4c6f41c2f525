# SPDX-License-Identifier: Apache-2.0
"""The Keras half of ``pyupdate.build``: make the optimizer, check it, attach it."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from pyupdate import frameworks
from pyupdate.kernels.language import Rule
from pyupdate.names import new_name
from pyupdate.options import PARAMETERS, Options

from . import averages, optimizers, scopes
from .state import State

TORCH_ONLY = ("norm_type", "error_if_nonfinite", "state_dtype", "stochastic_rounding", "seed")
"""Options that a step in TensorFlow has not."""


def attach(
    model: Any,
    optimizer: Any,
    model_name: str | None,
    arguments: dict[str, Any],
    during_backward: bool,
) -> Any:
    """Do what `pyupdate.build` says with a Keras model; nothing is attached if it is refused."""
    if during_backward:
        message = "in_backward is PyTorch's: leave it out for a Keras model"
        raise ValueError(message)
    own = {parameter.name for parameter in PARAMETERS}
    options = Options(**{k: v for k, v in arguments.items() if k in own})
    numbers = {k: v for k, v in arguments.items() if k not in own}
    if wrong := [name for name in options.asked_for if name in TORCH_ONLY]:
        message = f"{wrong[0]} is PyTorch's: leave it out for a Keras model"
        raise ValueError(message)
    kept = getattr(model, "model_name", None)
    averages.check_not_swapped(model, kept if isinstance(kept, str) else type(model).__name__)
    owners = list(model.trainable_variables)
    variables = list(map(optimizers.tf_variable, owners))
    with scopes.scope_of(variables):
        made = _optimizer(model, optimizer, numbers)
    if model_name is None:
        model_name = kept if isinstance(kept, str) and kept else new_name(type(model).__name__)
    scopes.check_inside(made, variables, model_name)
    if owners:  # else at the first update: the model has not seen data yet
        scopes.make_state(made, owners, variables, model_name)
    if isinstance(getattr(model, "update_state", None), State):
        del model.update_state  # averages begin anew, and so does a window of micro-batches
    model.current_optimizer = made
    model.model_name = model_name
    model.update_options = options
    return model


def _named(package: Any) -> dict[str, Any]:
    """Keras's optimizers by their names in small letters, as Keras's own strings are."""
    kinds = [kind for kind in vars(package).values() if isinstance(kind, type)]
    return {
        kind.__name__.lower(): kind
        for kind in kinds
        if issubclass(kind, package.Optimizer)
        and kind is not package.Optimizer
        and not optimizers.scales_loss_by_type(kind)
    }


def _optimizer(model: Any, optimizer: Any, numbers: dict[str, Any]) -> Any:
    if isinstance(optimizer, str):
        known = _named(importlib.import_module(optimizers.home(model)).optimizers)
        if optimizer.lower() not in known:
            message = (
                f"optimizer {optimizer!r} is unknown: give one of "
                f"{', '.join(map(repr, sorted(known)))}, a Keras optimizer, or a callable that "
                "returns one"
            )
            raise ValueError(message)
        return _made(known[optimizer.lower()], numbers)
    if isinstance(optimizer, Rule):
        if optimizers.home(model) != "keras":
            message = (
                "a rule makes an optimizer of Keras 3, but the model is tf-keras's: give one of "
                "tf_keras.optimizers, or a model of Keras 3"
            )
            raise ValueError(message)
        from pyupdate import keras_optim

        return keras_optim.from_rule(optimizer, **numbers)
    if numbers:
        message = f"build got unexpected options {sorted(numbers)}: they go with a name or a rule"
        raise TypeError(message)
    made = optimizer
    if not optimizers.is_optimizer(made) and callable(made):
        made = _called(made)
    if not optimizers.is_optimizer(made):
        what = "optimizer is" if made is optimizer else "the callable given as optimizer returned"
        message = (
            f"{what} a {frameworks.type_name(made)}: give a name, a Keras optimizer, or a callable "
            "without arguments that returns one"
        )
        raise ValueError(message)
    optimizers.check_home(made, model, "optimizer")
    return made


def _made(kind: Any, numbers: dict[str, Any]) -> Any:
    try:
        return kind(**numbers)
    except (TypeError, ValueError) as error:
        plain = (p for p in inspect.signature(kind).parameters.values() if p.kind != p.VAR_KEYWORD)
        message = (
            f"{kind.__name__} refuses what build was given for it ({error}): it takes "
            f"{', '.join(p.name for p in plain)}"
        )
        raise type(error)(message) from error


def _called(make: Any) -> Any:
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        message = (
            f"the callable given as optimizer cannot be called without arguments ({error}): give "
            "one that can, such as lambda: keras.optimizers.Adam(1e-3)"
        )
        raise ValueError(message) from error
    except ValueError:  # it tells no one what it takes
        return make()
    return make()
