# SPDX-License-Identifier: Apache-2.0
"""Updates that wait: one record per model, one callable per model in each dict that was given.

What waits is in the parameters' `.grad`; the record says that it does, and by which scaler it is
scaled. The records do not keep a model alive, the callables in the user's dict do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyupdate.draining import Waiting
from pyupdate.names import name_of

from ..eagerly import eagerly
from ..remembered import Remembered
from . import accumulation, apply, engines, gradients, step

Deferred = MutableMapping[str, list[Callable[[], None]]]


@dataclass(frozen=True)
class _Scale:
    """A scaler and the scale that the waiting gradients carry."""

    scaler: torch.amp.GradScaler
    tensor: Tensor
    version: int
    value: Tensor


_pending: Remembered[_Scale | None] = Remembered()


class DeferredUpdate(Waiting):
    """What a deferred dict holds for a model: called, it makes the step that waits, if one does."""

    __slots__ = ("model",)

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __repr__(self) -> str:
        return f"<deferred update of '{name_of(self.model)}'>"

    @eagerly
    def __call__(self) -> None:
        """Make one step on the gradients that wait; nothing where none do.

        Raises:
            ValueError: no optimizer is attached any more, or the scaler's scale has changed.
            RuntimeError: the scaler's own; gradients of a window of ``accumulation_steps`` are gone
                or other tensors. After any failure the update still waits, unless a hook, or an
                interrupt, has raised behind the step.
        """
        due = _due(self.model)
        if due is not None:
            due.make()

    @classmethod
    def make_all(cls, updates: Sequence[DeferredUpdate]) -> Iterator[DeferredUpdate]:
        """Make them in order, as many as can in one region; yield each when it was made."""
        left = list(updates)
        while left:
            count, due = _leading(left)
            made = left[:count]
            if len(due) > 1 and _step_together(due):
                yield from made
            else:
                for update in made:
                    update()
                    yield update
            del left[:count]


@dataclass(frozen=True)
class Due:
    """A step on the gradients that a model has, which may be made."""

    model: nn.Module
    optimizer: Any
    params: list[nn.Parameter]
    scaler: torch.amp.GradScaler | None

    def make(self) -> None:
        """Make it, and `settle`; after a failure all is as it was, unless the step was made."""
        stepped = engines.Stepped(self.optimizer)
        try:
            apply.apply(self.model, self.optimizer, self.params, self.scaler, restore=True)
            stepped.note()
            self.settle()
        except BaseException:
            if stepped:
                self.settle()
            raise

    def settle(self) -> None:
        """Drop what was waiting, because it was applied."""
        gradients.drop(self.params)
        gradients.drop_frozen(self.model, apply.held(self.optimizer))
        _pending.pop(self.model)


def _due(model: nn.Module) -> Due | None:
    """The step of a model that waits, None where none does.

    Raises:
        ValueError, RuntimeError: it may not be made.
    """
    params = gradients.trainable(model)
    if not is_pending(model, params):
        return None
    name = name_of(model)
    waiting = _pending[model]
    scaler = None if waiting is None else waiting.scaler
    check_scale(model, name, scaler)
    optimizer = apply.optimizer_of(model, name)
    apply.check_holds(name, optimizer, params)
    window = accumulation.window_of(optimizer, params)
    if window is not None:
        apply.ensure_named(model, optimizer, params)
        window.check_kept(gives_up=False)
    if window is not None and not window.is_full:  # its gradients wait for more of them
        window.count(scaler)
        _pending.pop(model)
        return None
    return Due(model, optimizer, params, scaler)


def _leading(updates: Sequence[DeferredUpdate]) -> tuple[int, list[Due]]:
    """How many of these can be made in one go, at least one, and what is due of them."""
    due: list[Due] = []
    seen: set[int] = set()
    for count, update in enumerate(updates):
        try:
            one = _due(update.model)
        except (TypeError, ValueError, RuntimeError):  # it is told so in its turn
            return max(count, 1), due
        if one is None:
            continue
        # What two of them share is stepped, and its gradient dropped, by the first.
        ids = {id(one.optimizer), *map(id, one.params)}
        if not step.can_join(one.optimizer) or not seen.isdisjoint(ids):
            return max(count, 1), due
        seen |= ids
        due.append(one)
    return len(updates), due


def _step_together(due: Sequence[Due]) -> bool:
    for one in due:
        apply.ensure_named(one.model, one.optimizer, one.params)
    stepped = [engines.Stepped(one.optimizer) for one in due]
    try:
        if not step.step_together([(one.optimizer, one.params, one.scaler) for one in due]):
            return False
        for one in due:
            one.settle()
    except BaseException:
        for one, was_stepped in zip(due, stepped, strict=True):
            if was_stepped:
                one.settle()
        raise
    return True


def is_pending(model: nn.Module, params: Sequence[Tensor]) -> bool:
    """Whether gradients of the model wait; somebody's ``zero_grad()`` withdraws them."""
    if model not in _pending:
        return False
    if any(param.grad is not None for param in params):
        return True
    _pending.pop(model)
    return False


def check_scale(model: nn.Module, name: str, scaler: torch.amp.GradScaler | None) -> None:
    """Refuse to mix the gradients that wait with ones of another scale.

    Raises:
        ValueError: another scaler, or another scale of the same one.
    """
    if model not in _pending:
        return
    waiting = _pending[model]
    was = None if waiting is None else waiting.scaler
    mend = "call the deferred updates first, or drop the gradients with model.zero_grad()"
    if was is not scaler:
        had = "without a scaler" if was is None else "with another scaler"
        now = "without one" if scaler is None else "with this one"
        message = (
            f"gradients of '{name}' wait for their deferred update, scaled {had}; they cannot be "
            f"used in an update {now}, which would give them another scale: {mend}"
        )
        raise ValueError(message)
    if waiting is None:
        return
    current = waiting.scaler._get_scale_async()
    if current is waiting.tensor and current._version == waiting.version:
        return  # the usual case, decided without waiting for the device
    if current is None or not torch.equal(current.to(waiting.value.device), waiting.value):
        found = None if current is None else float(current)
        message = (
            f"gradients of '{name}' wait for their deferred update and carry the scale "
            f"{float(waiting.value)}, but the scaler's is now {found}: call scaler.update() after "
            "the deferred updates, not before; drop these gradients with model.zero_grad()"
        )
        raise ValueError(message)


def leave(
    model: nn.Module, name: str, scaler: torch.amp.GradScaler | None, deferred: Deferred
) -> None:
    """Record that gradients of the model wait, with one callable for it in this dict."""
    scale = None if scaler is None else scaler._get_scale_async()
    if scaler is None or scale is None:
        _pending[model] = None
    else:
        _pending[model] = _Scale(scaler, scale, scale._version, scale.clone())
    entry = deferred.get(name)
    if entry is None:
        deferred[name] = [DeferredUpdate(model)]
    elif not is_listed(model, name, deferred):
        entry.append(DeferredUpdate(model))


def settle(model: nn.Module, name: str, deferred: Deferred | None) -> None:
    """Forget what waited, because it was applied, and take the model's callable out of the dict."""
    withdraw(model, name, deferred, waits=False)


def is_listed(model: nn.Module, name: str, deferred: Deferred | None) -> bool:
    """Whether the dict has the model's callable."""
    entry = None if deferred is None else deferred.get(name)
    return entry is not None and any(_is_of(update, model) for update in entry)


def withdraw(model: nn.Module, name: str, deferred: Deferred | None, *, waits: bool) -> None:
    """Take the model's callable out of the dict and, unless it `waits`, forget what waited."""
    if not waits:
        _pending.pop(model)
    entry = None if deferred is None else deferred.get(name)
    if not deferred or not entry:
        return
    others = [update for update in entry if not _is_of(update, model)]
    if len(others) == len(entry):
        return
    entry[:] = others
    if not others:
        del deferred[name]


def _is_of(update: object, model: nn.Module) -> bool:
    return isinstance(update, DeferredUpdate) and update.model is model
