# SPDX-License-Identifier: Apache-2.0
"""``update_model`` for PyTorch: check, differentiate, add, step or defer, drop. Or undo."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyupdate import amp
from pyupdate.names import check_deferred, name_of

from . import accumulation, apply, deferral, engines, gradients, in_backward, reentrant, sharded


def update(
    model: nn.Module,
    loss: Tensor,
    retain_graph: bool,
    scaler: Any,
    defer: bool,
    deferred: deferral.Deferred | None,
) -> None:
    """Do what `pyupdate.update_model` says, with a module and a tensor."""
    name = name_of(model)
    check_deferred(name, defer, deferred)
    optimizer = apply.optimizer_of(model, name)
    if engines.has_rule(optimizer):
        engines.check_not_swapped(engines.engine_of(optimizer))
    else:
        apply.check_steps_alone(name, optimizer)
    scaler = enabled(scaler)
    during = in_backward.is_wanted(model)
    if during:
        in_backward.check_call(name, optimizer, scaler, retain_graph, defer)
    sharded.check_model(name, model)
    params = gradients.trainable(model)
    if not params:
        message = (
            f"'{name}' has no trainable parameters: every one is frozen (requires_grad=False), or "
            "it has none"
        )
        raise ValueError(message)
    was_pending = deferral.is_pending(model, params)
    if was_pending:
        deferral.check_scale(model, name, scaler)
    if scaler is not None:
        apply.check_not_unscaled(name, optimizer, scaler)
    if not defer:
        apply.check_holds(name, optimizer, params)
        if scaler is not None:
            amp.check_can_step(scaler, optimizer)
    if during:
        in_backward.update(model, name, optimizer, params, loss)
        deferral.settle(model, name, deferred)
        return

    window = accumulation.window_of(optimizer, params)
    before = 0
    if window is not None:
        if all(param.grad is None for param in params):  # withdrawn by zero_grad(), or frozen since
            if window.position:
                gradients.drop_frozen(model, apply.held(optimizer))
            window.position = 0
        else:
            apply.ensure_named(model, optimizer, params)
            window.check_kept(gives_up=False)
        before = window.position
    was_listed = deferral.is_listed(model, name, deferred)
    stepped: engines.Stepped | None = None
    aside = gradients.prepare(params)
    try:
        gradients.set_aside(params, aside)
        if window is not None:
            window.check_scale(scaler)
            before = window.position
        unreached = gradients.add_to(aside, name, loss, params, scaler, retain_graph)
        if unreached:
            gradients.check_reached(name, len(params) - len(unreached))
            reentrant.check_unreached(model, name, loss, params, unreached)
        if window is not None:
            window.position = before + 1
            if defer:
                window.note()
            elif not window.is_full:
                window.count(scaler)
        waits = defer or (window is not None and not window.is_full)
        if not waits:
            # Else what is in .grad is new, and put_back() has what was there before.
            kept = any(aside.grads[index] is not None for index in unreached)
            stepped = engines.Stepped(optimizer)
            apply.apply(model, optimizer, params, scaler, restore=kept)
            stepped.note()
            _drop(model, optimizer, params, window)
        if defer:
            assert deferred is not None  # check_deferred
            deferral.leave(model, name, scaler, deferred)
        else:
            deferral.settle(model, name, deferred)
    except BaseException:
        if stepped:  # a hook has raised behind the step, or an interrupt came there
            _drop(model, optimizer, params, window)
            deferral.settle(model, name, deferred)
            raise
        gradients.put_back(params, aside)
        if window is not None and window.position:  # 0: check_scale has given it up
            window.position = before
        if defer:
            deferral.withdraw(model, name, None if was_listed else deferred, waits=was_pending)
        raise


def _drop(
    model: nn.Module,
    optimizer: Any,
    params: list[nn.Parameter],
    window: accumulation.Window | None,
) -> None:
    """Drop gradients that were stepped; a second time changes nothing."""
    gradients.drop(params)
    if window is not None:
        gradients.drop_frozen(model, apply.held(optimizer))


def enabled(scaler: Any) -> torch.amp.GradScaler | None:
    """A scaler that scales, None where there is none.

    Raises:
        ValueError: it is something else.
    """
    if scaler is None:
        return None
    if not isinstance(scaler, torch.amp.GradScaler):
        message = f"scaler must be a torch.amp.GradScaler or None, but is a {type(scaler).__name__}"
        raise ValueError(message)
    return scaler if amp.is_enabled(scaler) else None
