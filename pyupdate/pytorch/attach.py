# SPDX-License-Identifier: Apache-2.0
"""The PyTorch half of ``pyupdate.build``: make the optimizer, check it, attach it."""

from __future__ import annotations

from typing import Any

from torch import nn

from pyupdate import frameworks
from pyupdate.kernels.language import Rule
from pyupdate.names import new_name
from pyupdate.options import Options

from . import apply, in_backward


def attach(
    model: nn.Module,
    optimizer: Any,
    model_name: str | None,
    arguments: dict[str, Any],
    during_backward: bool,
) -> Any:
    """Do what `pyupdate.build` says with a module; nothing is attached if anything is refused."""
    params = list(model.parameters())
    kind = type(model).__name__
    if not params:
        message = f"the model ({kind}) has no parameters, so there is nothing to optimize"
        raise ValueError(message)
    optimizer = _optimizer(params, optimizer, arguments)
    if not apply.holds_any(optimizer, params):
        message = (
            f"the optimizer ({type(optimizer).__name__}) holds none of the parameters of the model "
            f"({kind}): make it from model.parameters() of this very model, after any .to() or "
            "copy that replaces them"
        )
        raise ValueError(message)
    kept = getattr(model, "model_name", None)
    if during_backward:
        in_backward.check_model(model_name or kept or kind, model, optimizer)
    apply.check_steps_alone(model_name or kept or kind, optimizer)
    if model_name is None:
        model_name = kept if isinstance(kept, str) and kept else new_name(kind)
    model.current_optimizer = optimizer
    model.model_name = model_name  # type: ignore[assignment]
    if during_backward or in_backward.is_wanted(model):
        model.update_in_backward = during_backward  # type: ignore[assignment]
    apply.name_parameters(model, optimizer)
    return model


def _optimizer(params: list[nn.Parameter], optimizer: Any, arguments: dict[str, Any]) -> Any:
    from pyupdate import optim
    from pyupdate.optim.planned import Planned

    if isinstance(optimizer, str):
        named = {name.lower(): kind for name, kind in optim.CLASSES.items()}
        kind = named.get(optimizer.lower())
        if kind is None:
            known = ", ".join(map(repr, sorted(named)))
            message = (
                f"optimizer {optimizer!r} is unknown: give one of {known}, a pyupdate.rule, a "
                "callable on the parameters such as torch.optim.AdamW, or an optimizer"
            )
            raise ValueError(message)
        return kind(params, **arguments)
    if isinstance(optimizer, Rule):
        return optim.from_rule(optimizer)(params, **arguments)
    made = optimizer
    if not apply.is_optimizer(made) and callable(made):
        made = made(params)
    if not apply.is_optimizer(made):
        found = frameworks.type_name(made)
        what = "optimizer is" if made is optimizer else "the callable given as optimizer returned"
        message = (
            f"{what} a {found}: give a name, a torch.optim.Optimizer, or a callable that takes the "
            "model's parameters and returns one"
        )
        raise ValueError(message)
    # Where it has options already, a default that is given is one too: max_norm=None clips no more.
    had = arguments and isinstance(made, Planned)
    if not Options(**arguments).asked_for and not had:
        return made
    return optim.accelerate(made, **arguments)
