# SPDX-License-Identifier: Apache-2.0
"""Updates that wait: one record per model, one callable per model in each dict that was given.

What waits is in the parameters' `.grad`; the record says that it does, and by which scaler it is
scaled. The records do not keep a model alive, the callables in the user's dict do.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from . import apply, gradients

Deferred = MutableMapping[str, list[Callable[[], None]]]


@dataclass(frozen=True)
class _Scale:
    """A scaler and the scale that the waiting gradients carry."""

    scaler: torch.amp.GradScaler
    tensor: Tensor
    version: int
    value: Tensor


_pending: MutableMapping[nn.Module, _Scale | None] = WeakIdKeyDictionary()
_names: MutableMapping[nn.Module, str] = WeakIdKeyDictionary()
_numbers = itertools.count(1)


class DeferredUpdate:
    """What a deferred dict holds for a model: called, it makes the step that waits, if one does."""

    __slots__ = ("model",)

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __repr__(self) -> str:
        return f"<deferred update of '{name_of(self.model)}'>"

    def __call__(self) -> None:
        """Make one step on the gradients that wait; nothing where none do.

        Raises:
            ValueError: no optimizer is attached any more, or the scaler's scale has changed.
            RuntimeError: the scaler's own. After any failure the update still waits.
        """
        model = self.model
        params = gradients.trainable(model)
        if not is_pending(model, params):
            return
        name = name_of(model)
        waiting = _pending[model]
        scaler = None if waiting is None else waiting.scaler
        check_scale(model, name, scaler)
        optimizer = apply.optimizer_of(model, name)
        apply.check_holds(name, optimizer, params)
        apply.apply(model, optimizer, params, scaler, restore=True)
        gradients.drop(params)
        _pending.pop(model, None)


def name_of(model: nn.Module) -> str:
    """``model.model_name``, else a name that no other model has."""
    name: Any = getattr(model, "model_name", None)
    if isinstance(name, str) and name:
        return name
    if model not in _names:
        _names[model] = f"{type(model).__name__} #{next(_numbers)}"
    return _names[model]


def check_deferred(name: str, defer: bool, deferred: Any) -> None:
    """Refuse a dict that a deferred update could not be left in, or found in.

    Raises:
        ValueError: names the model.
    """
    if deferred is None:
        if not defer:
            return
        message = (
            f"defer=True for '{name}' needs a dict to leave the update in: give deferred={{}} and "
            "call what it holds when all losses are differentiated"
        )
        raise ValueError(message)
    if not isinstance(deferred, MutableMapping):
        message = f"deferred must be a dict or None, but is a {type(deferred).__name__}"
        raise ValueError(message)
    entry = deferred.get(name)
    if entry is not None and not isinstance(entry, list):
        message = f"deferred['{name}'] must be a list of callables, but is a {type(entry).__name__}"
        raise ValueError(message)


def is_pending(model: nn.Module, params: Sequence[Tensor]) -> bool:
    """Whether gradients of the model wait; somebody's ``zero_grad()`` withdraws them."""
    if model not in _pending:
        return False
    if any(param.grad is not None for param in params):
        return True
    _pending.pop(model, None)
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
    entry = deferred.setdefault(name, [])
    if not any(_is_of(update, model) for update in entry):
        entry.append(DeferredUpdate(model))


def settle(model: nn.Module, name: str, deferred: Deferred | None) -> None:
    """Forget what waited, because it was applied, and take the model's callable out of the dict."""
    _pending.pop(model, None)
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
