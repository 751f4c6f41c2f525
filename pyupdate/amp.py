# SPDX-License-Identifier: Apache-2.0
"""The protocol of ``torch.amp.GradScaler``, without its extra pass over the gradients.

A step that knows its scaler reads the scale, looks for inf and nan in its own reduce pass, and
tells the scaler what it found in the place where ``scaler.update()`` reads it. A scaler whose class
looks for them in a way of its own is asked to, by its `unscale_`: one pass more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler, OptState

from .options import LastUpdate
from .pytorch.request import Scaling

_CHECKS = ("unscale_", "_unscale_grads_", "_maybe_opt_step")
"""What a subclass overrides to find inf and nan, or to agree on them, in a way of its own."""

_COUNTED = "pyupdate_counted"  # in a scaler's record of an optimizer: `count` was called


def is_enabled(scaler: GradScaler | None) -> bool:
    """Whether there is a scaler and it scales."""
    return scaler is not None and scaler.is_enabled()


def has_own_check(scaler: GradScaler | None) -> bool:
    """Whether a scaler's class decides in a way of its own what is skipped.

    ``ShardedGradScaler`` does: its `unscale_` sums what was found over the ranks, without which one
    rank would skip and the others step.
    """
    if scaler is None or not scaler.is_enabled():
        return False
    kind = type(scaler)
    if kind is GradScaler:
        return False
    return any(getattr(kind, name) is not getattr(GradScaler, name) for name in _CHECKS)


def unscale_by_own(scaler: GradScaler, optimizer: torch.optim.Optimizer) -> None:
    """Let a scaler that `has_own_check` unscale the gradients in place, unless it has.

    Raises:
        RuntimeError: the optimizer stepped already, or the scaler has scaled nothing yet.
        ValueError: torch's own, of float16 gradients.
    """
    check_can_step(scaler, optimizer)
    if _state_of(scaler, optimizer)["stage"] is not OptState.READY:
        return
    scaler.unscale_(optimizer)
    state = _state_of(scaler, optimizer)
    if not state["found_inf_per_device"]:  # no gradients: update() wants something to look at
        scale, _ = scaler._check_scale_growth_tracker("step")
        found = torch.zeros((), dtype=torch.float32, device=scale.device)
        state["found_inf_per_device"] = {scale.device: found}


def check_closure(closure: Callable[[], Any] | None, scaler: GradScaler | None) -> None:
    """Refuse a closure beside an enabled scaler.

    Raises:
        RuntimeError: torch's own words.
    """
    if closure is not None and is_enabled(scaler):
        message = "Closure use is not currently supported if GradScaler is enabled."
        raise RuntimeError(message)


def check_can_step(scaler: GradScaler | None, optimizer: torch.optim.Optimizer) -> None:
    """Refuse a second step before ``scaler.update()``.

    Raises:
        RuntimeError: torch's own words.
    """
    if scaler is None or not scaler.is_enabled():
        return
    if _state_of(scaler, optimizer)["stage"] is OptState.STEPPED:
        message = "step() has already been called since the last update()."
        raise RuntimeError(message)


def scaling_of(scaler: GradScaler | None, optimizer: torch.optim.Optimizer) -> Scaling:
    """How the gradients that an optimizer is about to step are scaled.

    Without a scaler, the attributes ``grad_scale`` and ``found_inf`` that torch sets on optimizers
    with ``_step_supports_amp_scaling`` are honoured. With one, a ``grad_scale`` that the user has
    set divides the gradients too, as in ``scaler.step`` around torch's fused optimizers. One that
    `has_own_check` unscales them here and now.

    Raises:
        RuntimeError: the optimizer stepped already, or the scaler has scaled nothing yet.
    """
    if scaler is None or not scaler.is_enabled():
        return _scaling_of_attributes(optimizer)
    check_can_step(scaler, optimizer)
    if has_own_check(scaler):
        unscale_by_own(scaler, optimizer)
    state = _state_of(scaler, optimizer)
    users = getattr(optimizer, "grad_scale", None)
    if state["stage"] is OptState.UNSCALED:
        flags = tuple(state["found_inf_per_device"].values())
        return Scaling(scale=_tensor_of(users), flags=flags)
    # Raises torch's error if nothing was scaled yet.
    scale, _ = scaler._check_scale_growth_tracker("step")
    if users is not None:
        scale = scale * users
    return Scaling(scale=scale, check=True)


def unscale(scaler: GradScaler | None, optimizer: torch.optim.Optimizer) -> bool:
    """Have torch unscale the gradients in place, for a step that is torch's own.

    Returns:
        Whether an inf or nan was found, so that there must be no step.

    Raises:
        RuntimeError: the optimizer stepped already, or the scaler has scaled nothing yet.
    """
    if scaler is None or not scaler.is_enabled():
        return False
    check_can_step(scaler, optimizer)
    if _state_of(scaler, optimizer)["stage"] is OptState.READY:
        scaler.unscale_(optimizer)
    return scaling_of(scaler, optimizer).read().found


def tell(scaler: GradScaler | None, optimizer: torch.optim.Optimizer, update: LastUpdate) -> None:
    """Record a step for ``scaler.update()``."""
    if scaler is None or not scaler.is_enabled():
        return
    state = _state_of(scaler, optimizer)
    if state["stage"] is OptState.STEPPED:
        return  # who was interrupted tells it again
    if state.pop(_COUNTED, False) and not any(
        _COUNTED in each for each in scaler._per_optimizer_states.values()
    ):  # micro-batches were counted since the last update(), which will now count a step
        assert scaler._growth_tracker is not None
        scaler._growth_tracker.add_(1)
    if state["stage"] is OptState.READY:
        scale = scaler._scale
        assert scale is not None
        if update.flag is None:
            found = torch.full((), float(update.skipped), dtype=torch.float32, device=scale.device)
        else:
            found = update.flag.to(scale.device, torch.float32)
        state["found_inf_per_device"] = {scale.device: found}
    state["stage"] = OptState.STEPPED


def tell_what_is_found(scaler: GradScaler | None, optimizer: torch.optim.Optimizer) -> None:
    """Record inf and nan of gradients whose step was refused, as torch's ``unscale_`` would have.

    ``scaler.update()`` then lowers the scale, or the refusal would come again at every step.
    """
    if scaler is None or not scaler.is_enabled():
        return
    state = _state_of(scaler, optimizer)
    if state["stage"] is not OptState.READY or scaler._scale is None:
        return
    grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
    finite = all(grad is None or bool(torch.isfinite(grad).all()) for grad in grads)
    device = scaler._scale.device
    found = torch.full((), float(not finite), dtype=torch.float32, device=device)
    state["found_inf_per_device"] = {device: found}


def count(scaler: GradScaler | None, optimizer: torch.optim.Optimizer) -> None:
    """Record that gradients of this scale were added up and not stepped yet.

    ``scaler.update()`` then has something to look at, and neither counts a good step nor changes
    the scale: the growth counter is put back by the one that it will add.

    Raises:
        RuntimeError: the optimizer stepped already, or ``unscale_`` was called.
    """
    if scaler is None or not scaler.is_enabled():
        return
    check_can_step(scaler, optimizer)
    state = _state_of(scaler, optimizer)
    if state["stage"] is OptState.UNSCALED:
        message = (
            "unscale_() was called before the last micro-batch of accumulation_steps: what comes "
            "would be added scaled. Call it for the last one only, or leave it to the step"
        )
        raise RuntimeError(message)
    scale, growth = scaler._check_scale_growth_tracker("step")
    states = scaler._per_optimizer_states.values()
    if not any(_COUNTED in each for each in states):
        growth.sub_(1)
    state[_COUNTED] = True
    found = torch.zeros((), dtype=torch.float32, device=scale.device)
    state["found_inf_per_device"] = {scale.device: found}


_UNSCALED = Scaling()


def _scaling_of_attributes(optimizer: torch.optim.Optimizer) -> Scaling:
    grad_scale = getattr(optimizer, "grad_scale", None)
    found_inf = getattr(optimizer, "found_inf", None)
    if grad_scale is None and found_inf is None:
        return _UNSCALED
    return Scaling(
        scale=_tensor_of(grad_scale),
        flags=() if found_inf is None else (_tensor_of(found_inf),),
    )


def _tensor_of(value: Any) -> Any:
    """A number as a tensor, wherever others are made by default; a tensor where it is, or None."""
    if value is None or isinstance(value, torch.Tensor):
        return value
    return torch.as_tensor(value, device="cpu")


def _state_of(scaler: GradScaler, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state: dict[str, Any] = scaler._per_optimizer_states[id(optimizer)]
    return state
