# SPDX-License-Identifier: Apache-2.0
"""``accumulation_steps``: windows of micro-batches whose mean makes one step.

The gradients of a window add up in `.grad`, where autograd puts them; how many micro-batches are in
them stands in the optimizer's groups, so that a ``state_dict`` carries it. The step divides by that
number in its one multiplier. Between two steps nothing of the optimizer is written but that count.
"""

from __future__ import annotations

import itertools
import operator
import weakref
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

    def count(self, scaler: torch.amp.GradScaler | None, found: Gradients | None = None) -> None:
        """Make no step yet.

        Args:
            scaler: that of the gradients.
            found: the gradients, where they were just read.
        """
        engine = step.engine_of(self._optimizer)
        step.check_not_swapped(engine)
        amp.count(scaler, self._optimizer)
        engine.counted = Counted(found or Gradients(self._optimizer), engine.counted)

    def check_kept(self) -> Gradients:
        """Refuse gradients that hold fewer micro-batches than were counted; the window is given up.

        Returns:
            What it has read.

        Raises:
            RuntimeError: a gradient that was counted is gone, or another tensor.
        """
        counted = step.engine_of(self._optimizer).counted
        found = Gradients(self._optimizer)
        if self.position == 0 or counted is None or counted.are_kept(found):
            return found
        count, self.position = self.position, 0
        message = (
            f"{count} of accumulation_steps={self.length} micro-batches were counted, but their "
            "gradients are not in .grad any more: inside a window call optimizer.zero_grad(), "
            "which keeps them, not model.zero_grad(), and add to .grad in place. The window was "
            "given up: drop its gradients with zero_grad() and begin anew"
        )
        raise RuntimeError(message)

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
        engine.counted = Counted(Gradients(self._optimizer), engine.counted)


class Gradients:
    """The parameters of an optimizer and what is in their `.grad`; it keeps both alive."""

    def __init__(self, optimizer: Any) -> None:
        self.params = [param for group in optimizer.param_groups for param in group["params"]]
        self.grads = [param.grad for param in self.params]
        self.same: Counted | None = None
        """What was found to be of these; it stays so while this keeps them alive."""

    def missing(self) -> int:
        """How many parameters have no gradient."""
        return sum(map(operator.is_, self.grads, itertools.repeat(None)))


class Counted:
    """The gradients that an optimizer has counted or stepped last, without keeping them alive.

    Weak references that still hold are taken over from the micro-batch before: of 1,000 tensors
    making them and asking each for its kind took 0.5 ms, comparing takes 0.1. Ids will not do for
    gradients: what takes the place of one that was dropped may have its id.
    """

    def __init__(self, found: Gradients, before: Counted | None) -> None:
        self._params: list[weakref.ref[torch.Tensor]]
        self._ids: list[int]
        self._grads: list[Callable[[], torch.Tensor | None]]
        self._missing: int
        if before is not None and before._is_of(found):
            self._params, self._ids, self._grads = before._params, before._ids, before._grads
            self._missing = before._missing
        else:
            self._params = [weakref.ref(param) for param in found.params]
            self._ids = [id(param) for param in found.params]
            self._grads = [_reference(grad) for grad in found.grads]
            self._missing = found.missing()
        self._versions = [
            -1 if grad is None or reference is _nothing else grad._version
            for grad, reference in zip(found.grads, self._grads, strict=True)
        ]

    def _is_of(self, found: Gradients) -> bool:
        """Whether these are the same gradients of the same parameters, in place."""
        if found.same is self:
            return True
        # None is what a reference to a dropped gradient gives, too.
        if self._ids != [*map(id, found.params)] or self._missing != found.missing():
            return False
        if all(map(operator.is_, found.grads, [grad() for grad in self._grads])):
            found.same = self
        return found.same is self

    def are_kept(self, found: Gradients) -> bool:
        """Whether all are in `.grad`, where a backward pass adds to them in place.

        Autograd puts new tensors there where the sums can be differentiated themselves
        (``create_graph=True``), or where one was sparse.

        Args:
            found: what the optimizer has now.
        """
        if self._is_of(found):
            return True
        moved = differentiable = False
        for param, grad in zip(self._params, self._grads, strict=True):
            if grad is _nothing:
                continue
            its = param()
            now = None if its is None else its.grad
            if now is None:
                return False
            differentiable = differentiable or now.grad_fn is not None
            moved = moved or (now is not grad() and not now.is_sparse)
        return differentiable or not moved

    def are_all(self, params: Sequence[torch.Tensor]) -> bool:
        """Whether the gradients of these parameters are these, unchanged."""
        pairs = zip(self._grads, self._versions, strict=True)
        known = {id(grad()): version for grad, version in pairs if grad is not _nothing}
        grads = [param.grad for param in params if param.grad is not None]
        return all(known.get(id(grad)) == grad._version for grad in grads)


def _nothing() -> None:
    """In the place of a reference: no gradient, or one that has no version to tell it by."""


def _reference(grad: torch.Tensor | None) -> Callable[[], torch.Tensor | None]:
    return _nothing if grad is None or grad.is_inference() else weakref.ref(grad)


def window_of(optimizer: Any, params: Sequence[torch.Tensor] | None = None) -> Window | None:
    """The window that a step of these parameters belongs to, None where each call is a step.

    Raises:
        ValueError: a group holds trainable parameters beside them, which would count along.
    """
    if step.options_of(optimizer).accumulation_steps == 1 or not step.has_rule(optimizer):
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


def positions_of(optimizer: Any) -> list[int]:
    """How many micro-batches each group has counted."""
    return [group.get(POSITION, 0) for group in optimizer.param_groups]


def check_loaded(optimizer: Any, before: Sequence[int]) -> None:
    """Count, after a state dict was loaded, what is in the gradients, which loading leaves alone.

    Gradients that are as this optimizer left them are what it has counted itself, so its own count
    stays. Others were put there for the loaded window. Where there are none, none is open.

    Args:
        optimizer: which has loaded.
        before: its `positions_of` before.
    """
    engine = step.engine_of(optimizer)
    windows = step.options_of(optimizer).accumulation_steps > 1
    own = engine.counted
    for group, position in zip(optimizer.param_groups, before, strict=True):
        if not windows or all(param.grad is None for param in group["params"]):
            group.pop(POSITION, None)
        elif own is not None and own.are_all(group["params"]):
            group.pop(POSITION, None)
            if position:
                group[POSITION] = position
    engine.counted = None


def check_new_group(optimizer: Any) -> None:
    """Refuse a group that would join an open window with fewer micro-batches than it has.

    Raises:
        ValueError: a window is open.
    """
    for group in optimizer.param_groups:
        count = group.get(POSITION, 0)
        if count and any(param.grad is not None for param in group["params"]):
            length = step.options_of(optimizer).accumulation_steps
            message = (
                f"a parameter group was added in an open window, when {count} of "
                f"accumulation_steps={length} micro-batches were counted: its gradients would be "
                "divided by micro-batches that they do not hold. Add it between windows, or drop "
                "this one's gradients first with model.zero_grad()"
            )
            raise ValueError(message)


def micro_step(
    optimizer: Any, window: Window, whole: Callable[..., Any], closure: Any, scaler: Any
) -> Any:
    """``optimizer.step()`` of a user's own loop: count it, or make the step of a full window."""
    engine = step.engine_of(optimizer)
    enabled = scaler if amp.is_enabled(scaler) else None
    window.check_scale(enabled)
    found: Gradients | None = window.check_kept()
    before = window.position
    if before + 1 < window.length:
        amp.check_closure(closure, scaler)
        loss = None
        if closure is not None:
            found = None
            with torch.enable_grad():
                loss = closure()
        window.count(enabled, found)
        window.position = before + 1
        if "step" in optimizer.__dict__ and engine.last is None:
            optimizer._opt_called = False  # a scheduler warns until there was a real step
        return loss
    found = None  # which would keep them alive
    given = {} if scaler is None else {"grad_scaler": scaler}
    window.position = before + 1
    try:
        with window.mean():
            return whole(optimizer, *(() if closure is None else (closure,)), **given)
    except BaseException:
        window.position = before
        raise
