# SPDX-License-Identifier: Apache-2.0
"""``accumulation_steps``: windows of micro-batches whose mean makes one step.

The gradients of a window add up in `.grad`, where autograd puts them; how many micro-batches are in
them stands in the optimizer's groups, so that a ``state_dict`` carries it. The step divides by that
number in its one multiplier. Between two steps nothing of the optimizer is written but that count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pyupdate import amp

from . import engines
from .counted import Changes, Counted, Gradients
from .request import NormNotFinite
from .rows import name_of

POSITION = "accumulated"
"""In each group of an optimizer that has windows: the micro-batches that are in its parameters'
`.grad`, 0 between windows. It is there then, too: torch.distributed.checkpoint loads into the keys
that it finds, and a count that it left out would divide a loaded window's gradients by too few."""


class Window:
    """The micro-batches of some groups; open while their number is not 0."""

    def __init__(self, optimizer: Any, groups: Sequence[dict[str, Any]]) -> None:
        self._optimizer = optimizer
        self._groups = groups
        self.length = engines.options_of(optimizer).accumulation_steps

    @property
    def position(self) -> int:
        """How many micro-batches are in the gradients."""
        return max((group.get(POSITION, 0) for group in self._groups), default=0)

    @position.setter
    def position(self, count: int) -> None:
        for group in self._groups:
            group[POSITION] = count

    @property
    def is_full(self) -> bool:
        """Whether it is time for the step."""
        return self.position >= self.length

    def check_scale(self, scaler: torch.amp.GradScaler | None) -> None:
        """Refuse a scale that is not that of the micro-batches before; the window is given up.

        Raises:
            ValueError: the gradients of the window are of different scales.
        """
        engine = engines.engine_of(self._optimizer)
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

    def count(
        self, scaler: torch.amp.GradScaler | None, found: Sequence[Gradients] | None = None
    ) -> None:
        """Make no step yet.

        Args:
            scaler: that of the gradients.
            found: the gradients, where they were just read.
        """
        engines.check_not_swapped(engines.engine_of(self._optimizer))
        amp.count(scaler, self._optimizer)
        self.note(found)

    def note(self, found: Sequence[Gradients] | None = None) -> None:
        """Remember which gradients the micro-batches are in.

        Args:
            found: the gradients, where they were just read.
        """
        engine = engines.engine_of(self._optimizer)
        listed = {id(group) for group in self._optimizer.param_groups}
        before = engine.counted
        engine.counted = {key: counted for key, counted in before.items() if key in listed}
        for group, grads in zip(self._groups, found or self._gradients(), strict=True):
            engine.counted[id(group)] = Counted(grads, before.get(id(group)))

    def _gradients(self) -> list[Gradients]:
        return [Gradients(group) for group in self._groups]

    def check_kept(self, *, gives_up: bool) -> list[Gradients]:
        """Refuse gradients that hold fewer micro-batches than were counted.

        Args:
            gives_up: whether the window ends there, so that ``optimizer.zero_grad()`` drops what is
                left; else everything stays as it was, and is refused again.

        Returns:
            What it has read.

        Raises:
            RuntimeError: a gradient that was counted is gone, or another tensor.
            ValueError: a parameter was put into a group since.
        """
        found, changes = self._compared()
        replaced = [] if changes.differentiable else changes.replaced
        if not (changes.new or changes.gone or replaced):
            return found
        begun = f"{self.position} of accumulation_steps={self.length} micro-batches were counted"
        if gives_up:
            self.position = 0
            mend = "The window was given up: drop its gradients with zero_grad() and begin anew"
        else:
            mend = "Drop the window's gradients with model.zero_grad() and begin it anew"
        if changes.new:
            message = (
                f"{begun} when parameter {self._name(changes.new[0])} was not in its group yet, or "
                "not swapped yet: its gradient would be divided by micro-batches that it does not "
                "hold. Change which parameters a group has, and swap them, between windows. "
                f"{mend}"
            )
            raise ValueError(message)
        lost, how = (changes.gone, "gone") if changes.gone else (replaced, "another tensor by now")
        message = (
            f"{begun}, but the gradient of {self._name(lost[0])} is {how}: inside a window call "
            "optimizer.zero_grad(), which keeps them, not model.zero_grad(), and add to .grad in "
            f"place; swap tensors (torch.utils.swap_tensors) between windows. {mend}"
        )
        raise RuntimeError(message)

    def _compared(self) -> tuple[list[Gradients], Changes]:
        """What the gradients are now, and what became of those that were counted."""
        counted = engines.engine_of(self._optimizer).counted
        found = self._gradients()
        changes = Changes()
        for group, grads in zip(self._groups, found, strict=True):
            if group.get(POSITION, 0) and id(group) in counted:
                counted[id(group)].compare(grads, changes)
        return found, changes

    def is_open(self) -> bool:
        """Whether micro-batches were counted that are known to be in the gradients still."""
        counted = engines.engine_of(self._optimizer).counted
        known = all(id(group) in counted for group in self._groups)
        return known and self.position > 0 and not self._compared()[1].replaced

    def _name(self, param: torch.Tensor) -> str:
        names = engines.engine_of(self._optimizer).names
        return next(
            f"'{name_of(group, g, p, names)}'"
            for g, group in enumerate(self._optimizer.param_groups)
            for p, other in enumerate(group["params"])
            if other is param
        )

    def mean(self, make_step: Callable[[], Any], count: int | None = None) -> Any:
        """Make a step on the mean of the window's micro-batches; afterwards it is empty.

        After an exception it is as it was, unless the step was made before. (No context manager:
        an interrupt may come before its end is run, and the window would stay open.)

        Args:
            make_step: makes it, whole.
            count: how many they are, with one that `position` has not counted yet.

        Returns:
            What `make_step` does.
        """
        engine = engines.engine_of(self._optimizer)
        before = engine.last
        try:
            engine.micro_batches = max(1, self.position if count is None else count)
            made = make_step()
            self._close()
            return made
        except BaseException as error:
            if isinstance(error, NormNotFinite):
                error.add_note(
                    "The micro-batches of the window stay in .grad, and the next step is refused "
                    "too where they are what is not finite: model.zero_grad() drops them"
                )
            if engine.last is not before:  # a hook has raised behind the step, or an interrupt
                self._close()
            raise
        finally:
            engine.micro_batches = 1

    def _close(self) -> None:
        """Begin anew: what was counted is stepped."""
        self.position = 0
        self.note()


def window_of(optimizer: Any, params: Sequence[torch.Tensor] | None = None) -> Window | None:
    """The window that a step of these parameters belongs to, None where each call is a step.

    Raises:
        ValueError: a group holds trainable parameters beside them, which would count along.
    """
    if engines.options_of(optimizer).accumulation_steps == 1 or not engines.has_rule(optimizer):
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


def counts_of(optimizer: Any) -> list[tuple[int, Counted | None]]:
    """Of each group: how many micro-batches it has counted, and the gradients that they are in."""
    counted = engines.engine_of(optimizer).counted
    return [(group.get(POSITION, 0), counted.get(id(group))) for group in optimizer.param_groups]


def check_loaded(optimizer: Any, before: Sequence[tuple[int, Counted | None]]) -> None:
    """Count, after a state dict was loaded, what is in the gradients, which loading leaves alone.

    Gradients that are as this optimizer left them are what it has counted itself, so its own count
    stays. Others were put there for the loaded window. Where there are none, none is open.

    Args:
        optimizer: which has loaded.
        before: its `counts_of` before.
    """
    engine = engines.engine_of(optimizer)
    goes_on = False
    for group, (position, own) in zip(optimizer.param_groups, before, strict=True):
        if all(param.grad is None for param in group["params"]):
            group[POSITION] = 0
        elif own is not None and own.are_all(group["params"]):
            group[POSITION] = position
            goes_on = goes_on or position > 0
    keep_counts(optimizer)
    engine.counted = {
        id(group): Counted(Gradients(group), None)
        for group in optimizer.param_groups
        if group.get(POSITION, 0)
    }
    if not goes_on:  # the scale was that of other gradients
        engine.window_scale = ...


def keep_counts(optimizer: Any) -> None:
    """Let each group have a count, where the optimizer has windows, and else none."""
    windows = engines.options_of(optimizer).accumulation_steps > 1
    for group in optimizer.param_groups:
        if windows:
            group.setdefault(POSITION, 0)
        else:
            group.pop(POSITION, None)


def close_without_gradients(optimizer: Any) -> None:
    """Close the window of every group that has counted gradients which are not there."""
    for group in optimizer.param_groups:
        if POSITION in group and all(param.grad is None for param in group["params"]):
            group[POSITION] = 0


def check_new_length(optimizer: Any, length: int) -> None:
    """Refuse another ``accumulation_steps`` for the micro-batches of an open window.

    Raises:
        ValueError: a window is open.
    """
    before = engines.options_of(optimizer).accumulation_steps
    count = _count_of_open(optimizer)
    if count and length != before:
        message = (
            f"accumulation_steps was to become {length} in an open window, when {count} of "
            f"{before} micro-batches were counted: their gradients would be divided by another "
            "number. Change it between windows, or drop this one's gradients first with "
            "model.zero_grad()"
        )
        raise ValueError(message)


def _count_of_open(optimizer: Any) -> int:
    """How many micro-batches were counted that are still in some gradients."""
    for group in optimizer.param_groups:
        count: int = group.get(POSITION, 0)
        if count and any(param.grad is not None for param in group["params"]):
            return count
    return 0


def check_new_group(optimizer: Any) -> None:
    """Refuse a group that would join an open window with fewer micro-batches than it has.

    Raises:
        ValueError: a window is open.
    """
    count = _count_of_open(optimizer)
    if count:
        length = engines.options_of(optimizer).accumulation_steps
        message = (
            f"a parameter group was added in an open window, when {count} of "
            f"accumulation_steps={length} micro-batches were counted: its gradients would be "
            "divided by micro-batches that they do not hold. Add it between windows, or drop "
            "this one's gradients first with model.zero_grad()"
        )
        raise ValueError(message)


def is_to_make_state(optimizer: Any, window: Window) -> bool:
    """Whether a step without a closure, None in its place, is no micro-batch but makes state.

    torch.distributed.checkpoint makes the state that it loads into, or saves, so: of an optimizer
    without any it sets all gradients to zeros and all learning rates to 0, calls
    ``step(closure=None)`` and takes them away again. To count it would open a window.
    """
    groups = optimizer.param_groups
    if optimizer.state or any(float(group["lr"]) != 0.0 for group in groups if "lr" in group):
        return False
    if window.is_open():
        return False
    grads = [param.grad for group in groups for param in group["params"] if param.requires_grad]
    return all(grad is not None and not grad.is_meta and not grad.any() for grad in grads)


def micro_step(
    optimizer: Any, window: Window, whole: Callable[..., Any], closure: Any, scaler: Any
) -> Any:
    """``optimizer.step()`` of a user's own loop: count it, or make the step of a full window."""
    engine = engines.engine_of(optimizer)
    enabled = scaler if amp.is_enabled(scaler) else None
    window.check_scale(enabled)
    found: list[Gradients] | None = window.check_kept(gives_up=True)
    before = window.position
    if before + 1 < window.length:
        amp.check_closure(closure, scaler)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            found = window.check_kept(gives_up=True)
        window.count(enabled, found)
        window.position = before + 1
        if "step" in optimizer.__dict__ and engine.last is None:
            optimizer._opt_called = False  # a scheduler warns until there was a real step
        return loss
    found = None  # which would keep them alive
    evaluate = None if closure is None else _kept_through(closure, window)
    given = {} if scaler is None else {"grad_scaler": scaler}
    args = () if evaluate is None else (evaluate,)
    return window.mean(lambda: whole(optimizer, *args, **given), before + 1)


def _kept_through(closure: Callable[[], Any], window: Window) -> Callable[[], Any]:
    """A closure after which the gradients of the micro-batches before it must still be there."""

    def evaluate() -> Any:
        loss = closure()
        window.check_kept(gives_up=True)
        return loss

    return evaluate
