# SPDX-License-Identifier: Apache-2.0
"""``accumulation_steps``: windows of micro-batches whose mean makes one step.

The gradients of a window add up in `.grad`, where autograd puts them; how many micro-batches are in
them stands in the optimizer's groups, so that a ``state_dict`` carries it. The step divides by that
number in its one multiplier. Between two steps nothing of the optimizer is written but that count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from pyupdate import amp

from . import step

POSITION = "accumulated"
"""In each group of an open window: the micro-batches that are in its parameters' `.grad`."""


class Window:
    """The micro-batches of some groups; open while their number is not 0."""

    def __init__(self, optimizer: Any, groups: Sequence[dict[str, Any]]) -> None:
        self._optimizer = optimizer
        self._groups = groups
        self.length = step.options_of(optimizer).accumulation_steps

    @property
    def position(self) -> int:
        """How many micro-batches are in the gradients."""
        return max((group.get(POSITION, 0) for group in self._groups), default=0)

    @position.setter
    def position(self, count: int) -> None:
        for group in self._groups:
            if count:
                group[POSITION] = count
            else:
                group.pop(POSITION, None)

    @property
    def is_full(self) -> bool:
        """Whether it is time for the step."""
        return self.position >= self.length

    def check_scale(self, scaler: torch.amp.GradScaler | None) -> None:
        """Refuse a scale that is not that of the micro-batches before; the window is given up.

        Raises:
            ValueError: the gradients of the window are of different scales.
        """
        engine = step.engine_of(self._optimizer)
        now = None if scaler is None else scaler.get_scale()
        if self.position == 0 or engine.window_scale is ...:
            engine.window_scale = now
        if engine.window_scale == now:
            return
        before, engine.window_scale = engine.window_scale, now
        self.position = 0
        message = (
            f"the scale of the gradients changed from {before} to {now} inside a window of "
            f"accumulation_steps={self.length}: micro-batches of different scales cannot be added. "
            "The window was given up: drop its gradients with zero_grad() and begin anew; call "
            "scaler.update(new_scale) between windows, and give other optimizers their own scaler"
        )
        raise ValueError(message)

    def count(self, scaler: torch.amp.GradScaler | None) -> None:
        """Make no step yet."""
        step.check_not_swapped(step.engine_of(self._optimizer))
        amp.count(scaler, self._optimizer)

    @contextmanager
    def mean(self) -> Iterator[None]:
        """Inside, a step is made on the mean of the window's micro-batches; afterwards it is empty.

        After an exception it is as it was.
        """
        engine = step.engine_of(self._optimizer)
        engine.micro_batches = max(1, self.position)
        try:
            yield
        finally:
            engine.micro_batches = 1
        self.position = 0


def window_of(optimizer: Any, params: Sequence[torch.Tensor] | None = None) -> Window | None:
    """The window that a step of these parameters belongs to, None where each call is a step.

    Raises:
        ValueError: a group holds trainable parameters beside them, which would count along.
    """
    if not step.has_rule(optimizer) or step.options_of(optimizer).accumulation_steps == 1:
        return None
    groups = optimizer.param_groups
    if params is None:
        return Window(optimizer, groups)
    ours = {id(param) for param in params}
    touched = [g for g in groups if any(id(param) in ours for param in g["params"])]
    for group in touched:
        if any(param.requires_grad and id(param) not in ours for param in group["params"]):
            message = (
                "accumulation_steps counts the micro-batches of a group, and this one holds "
                "trainable parameters of other models too: give each model that update_model "
                "updates an optimizer, or a group, of its own"
            )
            raise ValueError(message)
    return Window(optimizer, touched)


def check_loaded(optimizer: Any) -> None:
    """Close windows that a loaded state dict says are open, but whose gradients are not there."""
    windows = step.options_of(optimizer).accumulation_steps > 1
    for group in optimizer.param_groups:
        if not windows or all(param.grad is None for param in group["params"]):
            group.pop(POSITION, None)


def micro_step(
    optimizer: Any, window: Window, whole: Callable[..., Any], closure: Any, scaler: Any
) -> Any:
    """``optimizer.step()`` of a user's own loop: count it, or make the step of a full window."""
    engine = step.engine_of(optimizer)
    enabled = scaler if amp.is_enabled(scaler) else None
    window.check_scale(enabled)
    before = window.position
    if before + 1 < window.length:
        step.check_closure(closure, scaler)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        window.count(enabled)
        window.position = before + 1
        if "step" in optimizer.__dict__ and engine.last is None:
            optimizer._opt_called = False  # a scheduler warns until there was a real step
        return loss
    given = {} if scaler is None else {"grad_scaler": scaler}
    window.position = before + 1
    try:
        with window.mean():
            return whole(optimizer, *(() if closure is None else (closure,)), **given)
    except BaseException:
        window.position = before
        raise
