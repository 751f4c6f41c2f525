# SPDX-License-Identifier: Apache-2.0
"""Step an attached optimizer on a model's gradients: by its plan, or as it is without a rule."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import OptState

from pyupdate import amp
from pyupdate.options import LastUpdate

from ..remembered import Remembered
from . import accumulation, engines, step

Scaler = torch.amp.GradScaler

_named: Remembered[list[_Names]] = Remembered()
_plain: Remembered[_Plain] = Remembered()


@dataclass(frozen=True)
class _Names:
    """How a model calls its parameters, by their ids."""

    model: weakref.ref[nn.Module]
    of: dict[int, str]


@dataclass(frozen=True)
class _Plain:
    """What a step by torch's own path left, on the device until somebody reads it."""

    found_inf: tuple[Tensor, ...]
    scale: Tensor | None


def is_optimizer(value: object) -> bool:
    """Whether this can be stepped: torch's, or one that looks like it."""
    if isinstance(value, type):
        return False
    return callable(getattr(value, "step", None)) and hasattr(value, "param_groups")


def held(optimizer: Any) -> Iterator[Tensor]:
    """The parameters that an optimizer holds."""
    for group in optimizer.param_groups:
        yield from group["params"]


def check_steps_alone(name: str, optimizer: Any) -> None:
    """Refuse an optimizer whose step evaluates the loss by itself.

    Raises:
        TypeError: it needs a closure.
    """
    if needs_closure(optimizer):
        kind = type(optimizer).__name__
        message = (
            f"the optimizer of '{name}' is a {kind}, whose step needs a closure that evaluates the "
            "loss again, and an update has only one loss: step it yourself with its closure, "
            "optimizer.step(closure), or take one that steps on gradients"
        )
        raise TypeError(message)


def needs_closure(optimizer: Any) -> bool:
    """Whether its step cannot be called without one."""
    try:
        wanted = inspect.signature(optimizer.step).parameters.get("closure")
    except (TypeError, ValueError):  # of a builtin: nobody knows
        return False
    return wanted is not None and wanted.default is inspect.Parameter.empty


def check_holds(name: str, optimizer: Any, params: Sequence[Tensor]) -> None:
    """Refuse an optimizer that would step nothing of a model.

    Raises:
        ValueError: it holds none of these parameters.
    """
    if not holds_any(optimizer, params):
        message = (
            f"the optimizer attached to '{name}' ({type(optimizer).__name__}) holds none of its "
            "trainable parameters: they were frozen, or replaced after it was made (a copy of the "
            "model?). Attach one made from them with pyupdate.build"
        )
        raise ValueError(message)


def check_not_unscaled(name: str, optimizer: Any, scaler: Scaler) -> None:
    """Refuse to add scaled gradients to ones that were unscaled already.

    Raises:
        RuntimeError: ``scaler.unscale_(optimizer)`` was called since the last ``scaler.update()``.
    """
    state = scaler._per_optimizer_states.get(id(optimizer))
    if state is not None and state["stage"] is OptState.UNSCALED:
        message = (
            f"unscale_() has already been called on the optimizer of '{name}' since the last "
            "update(): the gradients of this loss would be added scaled and never unscaled. Leave "
            "unscale_() out (update_model unscales, max_norm clips)"
        )
        raise RuntimeError(message)


def holds_any(optimizer: Any, params: Sequence[Tensor]) -> bool:
    """Whether an optimizer holds one of these parameters."""
    if params and next(held(optimizer), None) is params[0]:
        return True  # the usual case, without 1,000 ids
    ids = {id(param) for param in params}
    return any(id(param) in ids for param in held(optimizer))


def optimizer_of(model: nn.Module, name: str) -> Any:
    """The optimizer attached to a model.

    Raises:
        ValueError: none is, or it is none.
    """
    optimizer = getattr(model, "current_optimizer", None)
    if is_optimizer(optimizer):
        return optimizer
    found = "no optimizer" if optimizer is None else f"a {type(optimizer).__name__}"
    message = (
        f"'{name}' has {found} attached as current_optimizer: attach one with "
        'pyupdate.build(model, "adamw"), or set model.current_optimizer to a torch.optim.Optimizer '
        "on its parameters"
    )
    raise ValueError(message)


def name_parameters(model: nn.Module, optimizer: Any) -> None:
    """Tell the plan how the model calls its parameters, so that errors can.

    An optimizer may serve several models; the names of all of them are kept.
    """
    if not engines.has_rule(optimizer):
        return
    of = {id(param): name for name, param in model.named_parameters()}
    alive = [names for names in _named.get(optimizer) or () if names.model() not in (None, model)]
    alive.append(_Names(weakref.ref(model), of))
    _named[optimizer] = alive
    engines.set_names(optimizer, {key: name for names in alive for key, name in names.of.items()})


def ensure_named(model: nn.Module, optimizer: Any, params: Sequence[Tensor]) -> None:
    """Call `name_parameters` if the plan does not know these yet."""
    if not _has_names(model, optimizer, params):
        name_parameters(model, optimizer)


def _has_names(model: nn.Module, optimizer: Any, params: Sequence[Tensor]) -> bool:
    """Whether the plan knows them; two lookups, not a traversal, at every step."""
    for names in _named.get(optimizer) or ():
        if names.model() is model:
            return id(params[0]) in names.of and id(params[-1]) in names.of
    return False


def apply(
    model: nn.Module,
    optimizer: Any,
    params: Sequence[Tensor],
    scaler: Scaler | None,
    *,
    restore: bool,
) -> None:
    """Make one step on the gradients of `params`; the optimizer's other parameters are not touched.

    Args:
        model: whose parameters these are.
        optimizer: the one attached to it.
        params: the trainable parameters of the model.
        scaler: an enabled scaler, or None.
        restore: whether `.grad` must be as it was after a step that raised. Only where torch's own
            unscaling would write into it this costs a copy.
    """
    if engines.has_rule(optimizer):
        ensure_named(model, optimizer, params)
        window = accumulation.window_of(optimizer, params)

        def make_step() -> None:
            if engines.has_own_step(optimizer):
                with _others_set_aside(optimizer, params):
                    step_by_own(optimizer, scaler)
            else:
                step.step(optimizer, grad_scaler=scaler, only=params)

        with _unscaled_by_own(optimizer, params, scaler, restore=restore):
            if window is None:
                make_step()
            else:
                window.mean(make_step)
        return
    with _others_set_aside(optimizer, params):
        if scaler is None:
            optimizer.step()
            _plain[optimizer] = _Plain((), None)
        else:
            _step_scaled(optimizer, scaler, restore=restore)


def step_by_own(optimizer: Any, scaler: Scaler | None) -> None:
    """The whole step of a user's subclass of ours, which calls ours."""
    engine = engines.engine_of(optimizer)
    given = {} if scaler is None else {"grad_scaler": scaler}
    engine.whole = True
    try:
        optimizer.step(**given)
    finally:
        engine.whole = False


def last_update(optimizer: Any) -> LastUpdate | None:
    """What the last step of an optimizer left; a device is waited for when a value is asked for."""
    last = engines.last_step(optimizer)
    plain = _plain.get(optimizer)
    if last is not None or plain is None:
        return last
    found_inf, scale = plain.found_inf, plain.scale
    return LastUpdate(
        norm=None,
        skipped=lambda: any(float(found) != 0.0 for found in found_inf),
        multiplier=1.0 if scale is None else lambda: 1.0 / float(scale),
    )


def _step_scaled(optimizer: Any, scaler: Scaler, *, restore: bool) -> None:
    """``scaler.step(optimizer)``, undone in the scaler and in `.grad` if it raises."""
    with_grad = [param for param in held(optimizer) if param.grad is not None]
    if not with_grad:  # torch fails an assertion where there is nothing to check
        return
    grads = [param.grad for param in with_grad]
    if restore:
        for param, grad in zip(with_grad, grads, strict=True):
            param.grad = None if grad is None else grad.clone()
    states = scaler._per_optimizer_states
    state = dict(states[id(optimizer)])
    try:
        scaler.step(optimizer)
    except BaseException:
        states[id(optimizer)] = state
        if restore:
            for param, grad in zip(with_grad, grads, strict=True):
                param.grad = grad
        raise
    found = states[id(optimizer)]["found_inf_per_device"].values()
    scale = scaler._get_scale_async()
    _plain[optimizer] = _Plain(tuple(found), None if scale is None else scale.clone())


@contextmanager
def _unscaled_by_own(
    optimizer: Any, params: Sequence[Tensor], scaler: Scaler | None, *, restore: bool
) -> Iterator[None]:
    """Inside, a scaler with a check of its own has unscaled the gradients of these parameters.

    If no step was made, the scaler is as it was afterwards, and with `restore` `.grad` is too.
    """
    if scaler is None or not amp.has_own_check(scaler):
        yield
        return
    amp.check_can_step(scaler, optimizer)
    grads = [param.grad for param in params]
    states, before = scaler._per_optimizer_states, engines.last_step(optimizer)
    state = dict(states[id(optimizer)])
    try:
        for param, grad in zip(params, grads, strict=True) if restore else ():
            param.grad = None if grad is None else grad.clone()
        with _others_set_aside(optimizer, params):
            amp.unscale_by_own(scaler, optimizer)
        yield
    except BaseException:
        if engines.last_step(optimizer) is before:  # else a hook has raised behind the step
            states[id(optimizer)] = state
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
        raise


@contextmanager
def _others_set_aside(optimizer: Any, params: Sequence[Tensor]) -> Iterator[None]:
    """Hide the gradients of what an optimizer holds beside these parameters from its step."""
    ours = {id(param) for param in params}
    others = [
        (param, param.grad)
        for param in held(optimizer)
        if id(param) not in ours and param.grad is not None
    ]
    for param, _ in others:
        param.grad = None
    try:
        yield
    finally:
        for param, grad in others:
            param.grad = grad
