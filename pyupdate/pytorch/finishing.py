# SPDX-License-Identifier: Apache-2.0
"""The step of a window of ``accumulation_steps`` that is not full: the rest of an epoch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pyupdate import amp
from pyupdate.names import name_of

from . import accumulation, apply, deferral, engines, gradients, step

Scaler = torch.amp.GradScaler


def of_model(model: nn.Module, scaler: Scaler | None) -> bool:
    """Do what `pyupdate.finish_window` says, with a model."""
    name = name_of(model)
    optimizer = apply.optimizer_of(model, name)
    if engines.has_rule(optimizer):
        engines.check_not_swapped(engines.engine_of(optimizer))
    window = accumulation.window_of(optimizer, list(model.parameters()))
    if window is None or window.position == 0:
        return False
    params = gradients.trainable(model)
    if all(param.grad is None for param in params):  # withdrawn by zero_grad(), or frozen since
        window.position = 0
        gradients.drop_frozen(model, apply.held(optimizer))
        return False
    if deferral.is_pending(model, params):
        deferral.check_scale(model, name, scaler)
    apply.ensure_named(model, optimizer, params)
    _check(window, optimizer, scaler, gives_up=False)
    deferral.Due(model, optimizer, params, scaler).make()
    return True


def of_optimizer(optimizer: Any, scaler: Scaler | None) -> bool:
    """Do what `pyupdate.finish_window` says, with the optimizer of a loop of the user's own."""
    window = accumulation.window_of(optimizer)
    if window is None or window.position == 0:
        return False
    counts = sorted({group.get(accumulation.POSITION, 0) for group in optimizer.param_groups} - {0})
    if len(counts) > 1:
        message = (
            f"the groups of this {type(optimizer).__name__} have windows of {counts} "
            "micro-batches, as those of several models have, and a step divides by one number: "
            "finish each model's window, pyupdate.finish_window(model)"
        )
        raise ValueError(message)
    _check(window, optimizer, scaler, gives_up=True)

    def make_step() -> None:
        if engines.has_own_step(optimizer):
            apply.step_by_own(optimizer, scaler)
        else:
            step.step(optimizer, grad_scaler=scaler)

    stepped = engines.Stepped(optimizer)
    try:
        window.mean(make_step)
        optimizer.zero_grad()
    except BaseException:
        if stepped:
            optimizer.zero_grad()
        raise
    return True


def _check(
    window: accumulation.Window, optimizer: Any, scaler: Scaler | None, *, gives_up: bool
) -> None:
    window.check_kept(gives_up=gives_up)
    window.check_scale(scaler)
    amp.check_can_step(scaler, optimizer)
