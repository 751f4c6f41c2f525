# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C wherever it may come in an update: all of it was made, or nothing.

An interrupt is raised at the first place where Python may raise one, at the second, and so on:
where a function of pyupdate, or of the context managers that it uses, begins or ends, and behind
each call that it makes of C. What is found then must be, to the bit, what there was before or what
there is after an update that nobody interrupts, and training must go on from there as it goes on
otherwise. (Nobody is told of a call of C's with ``*args``; where one writes, give its arguments one
by one.)
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pyupdate
from pyupdate.pytorch import deferral

HOMES = (str(Path(pyupdate.__file__).parent), contextlib.__file__)

GOES_ON = 5
"""Of so many places one is gone on from."""

Scaler = torch.amp.GradScaler
Snapshot = dict[Any, Any]


class Interrupted:
    """As a context: an interrupt at the nth place. `place` says which that is, None behind all."""

    def __init__(self, count: int) -> None:
        self._left = count
        self.place: str | None = None

    def __enter__(self) -> Interrupted:
        sys.setprofile(self._look)
        return self

    def __exit__(self, *raised: object) -> None:
        sys.setprofile(None)

    def _look(self, frame: Any, event: str, _: object) -> None:
        code = frame.f_code
        if event not in ("call", "return", "c_return") or not code.co_filename.startswith(HOMES):
            return
        if event != "c_return" and code.co_flags & inspect.CO_GENERATOR:
            return  # it may just be closed, where nobody hears of it
        self._left -= 1
        if self._left == 0:
            self.place = f"{event} in {code.co_qualname}, line {frame.f_lineno}"
            raise KeyboardInterrupt


class Loop:
    """Models in the middle of their training, and what is to be interrupted."""

    def __init__(self, models: int = 1, *, scaled: bool = False, **options: Any) -> None:
        self.options = options
        self.scaler = Scaler("cpu", init_scale=4.0) if scaled else None
        self.models = [
            pyupdate.build(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), "adamw", **options)
            for _ in range(models)
        ]
        for m, model in enumerate(self.models):
            with torch.no_grad():
                for p, param in enumerate(model.parameters()):
                    param.copy_(torch.arange(param.numel()).view_as(param) / 7 + p - m)
        self.deferred: dict[str, list[Callable[[], None]]] = {}

    def trained(self) -> Loop:
        for _ in range(self.options.get("accumulation_steps", 1)):
            self.next(1.0)
        return self

    def next(self, value: float) -> Loop:
        self.update(value)
        if self.scaler is not None:
            self.scaler.update()
        return self

    def with_gradients(self) -> Loop:
        for param in self.params():
            param.grad = torch.full_like(param, 0.25)
        return self

    def go_on(self) -> None:
        if self.scaler is not None:
            self.scaler.update()
        for param in self.params():
            param.grad = None
        self.trained()

    def waiting(self) -> Loop:
        for model in self.models:
            loss = self.loss(model, 2.0)
            pyupdate.update_model(
                model, loss, scaler=self.scaler, defer=True, deferred=self.deferred
            )
        return self

    def update(self, value: float = 3.0, **given: Any) -> None:
        for model in self.models:
            pyupdate.update_model(model, self.loss(model, value), scaler=self.scaler, **given)

    def step(self) -> None:
        for model in self.models:
            if self.scaler is None:
                model.current_optimizer.step()
            else:
                self.scaler.step(model.current_optimizer)

    def call(self) -> None:
        for listed in list(self.deferred.values()):
            for update in listed:
                update()

    def drain(self) -> None:
        pyupdate.drain(self.deferred)

    @staticmethod
    def loss(model: nn.Module, value: float) -> torch.Tensor:
        out: torch.Tensor = model(torch.full((2, 4), value))
        return out.square().sum()

    def params(self) -> list[nn.Parameter]:
        return [param for model in self.models for param in model.parameters()]

    def snapshots(self) -> list[Snapshot]:
        """Of each model: all that an update changes."""
        return [self.snapshot(model) for model in self.models]

    def snapshot(self, model: nn.Module) -> Snapshot:
        optimizer: Any = model.current_optimizer
        found: Snapshot = {}
        for name, param in model.named_parameters():
            found[name, "itself"] = param.detach().clone()
            found[name, "grad"] = None if param.grad is None else param.grad.clone()
            for key, value in optimizer.state.get(param, {}).items():
                found[name, key] = value.clone()
        found["counted"] = [group.get("accumulated") for group in optimizer.param_groups]
        waiting = [u for listed in self.deferred.values() for u in listed if u.model is model]
        found["waiting"] = bool(waiting) and deferral.is_pending(model, list(model.parameters()))
        last = pyupdate.last_update(model)
        found["last"] = last and (last.norm, last.skipped, last.multiplier)
        if self.scaler is not None:
            state = self.scaler._per_optimizer_states[id(optimizer)]
            flags = state["found_inf_per_device"].values()
            found["scaler"] = state["stage"], [float(flag) for flag in flags]
        return found


def differences(one: Snapshot, other: Snapshot) -> list[Any]:
    def are_same(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return torch.equal(a, b)
        return not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor) and a == b

    keys = {**one, **other}
    return [key for key in keys if not are_same(one.get(key, ...), other.get(key, ...))]


CASES: dict[str, tuple[Callable[[], Loop], Callable[[Loop], object]]] = {
    "an update": (lambda: Loop().trained(), Loop.update),
    "the first update": (lambda: Loop(max_norm=1.0), Loop.update),
    "beside gradients": (lambda: Loop(max_norm=1.0).trained().with_gradients(), Loop.update),
    "an average": (lambda: Loop(ema_decay=0.9).trained().with_gradients(), Loop.update),
    "a scaler": (lambda: Loop(scaled=True).trained(), Loop.update),
    "a micro-batch": (lambda: Loop(accumulation_steps=2).trained(), Loop.update),
    "a window's last": (lambda: Loop(accumulation_steps=2).trained().next(2.0), Loop.update),
    "a window's last, scaled": (
        lambda: Loop(accumulation_steps=2, scaled=True).trained().next(2.0),
        Loop.update,
    ),
    "a deferred update": (
        lambda: Loop().trained(),
        lambda loop: loop.update(defer=True, deferred=loop.deferred),
    ),
    "its call": (lambda: Loop().trained().waiting(), Loop.call),
    "its call, scaled": (lambda: Loop(scaled=True).trained().waiting(), Loop.call),
    "an update that takes it": (
        lambda: Loop().trained().waiting(),
        lambda loop: loop.update(deferred=loop.deferred),
    ),
    "a drain": (lambda: Loop(2, max_norm=1.0).trained().waiting(), Loop.drain),
    "a drain, scaled": (lambda: Loop(2, scaled=True).trained().waiting(), Loop.drain),
    "a step": (lambda: Loop().trained().with_gradients(), Loop.step),
    "a scaler's step": (
        lambda: scaled_once(Loop(scaled=True).trained().with_gradients()),
        Loop.step,
    ),
    "what finishes a window": (
        lambda: Loop(accumulation_steps=2).trained().next(2.0),
        lambda loop: pyupdate.finish_window(loop.models[0]),
    ),
    "what finishes a loop's window": (
        lambda: Loop(accumulation_steps=2).trained().next(2.0),
        lambda loop: pyupdate.finish_window(loop.models[0].current_optimizer),
    ),
    "a window's step": (lambda: Loop(accumulation_steps=2).trained().next(2.0), Loop.step),
}
"""What is made, and then interrupted."""


def scaled_once(loop: Loop) -> Loop:
    assert loop.scaler is not None
    loop.scaler.scale(torch.ones(()))
    return loop


IN_CI = (
    "the first update",
    "a window's last, scaled",
    "a deferred update",
    "a scaler's step",
)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case in IN_CI else pytest.mark.slow) for case in CASES],
)
def test_an_update_is_made_as_a_whole_or_not_at_all(case, compiled):
    make, act = CASES[case]
    with pyupdate.use_backend("cpu"):
        loop = make()
        before = loop.snapshots()
        act(loop)
        after = loop.snapshots()
        loop.go_on()
        later = loop.snapshots()
        seen = set()
        for count in itertools.count(1):
            loop = make()
            with suppress(KeyboardInterrupt), Interrupted(count) as interrupted:
                act(loop)
            if interrupted.place is None:
                break
            found = loop.snapshots()
            for m, model in enumerate(found):
                to_before, to_after = differences(model, before[m]), differences(model, after[m])
                assert not to_before or not to_after, (interrupted.place, to_before, to_after)
                seen.add(not to_after)
            if count % GOES_ON:
                continue
            if not any(differences(*both) for both in zip(found, after, strict=True)):
                loop.go_on()  # nobody has kept a lock, a window or a scale
                for both in zip(loop.snapshots(), later, strict=True):
                    assert not differences(*both), interrupted.place
            elif not any(differences(*both) for both in zip(found, before, strict=True)):
                act(loop)
                for both in zip(loop.snapshots(), after, strict=True):
                    assert not differences(*both), interrupted.place
        assert seen == {False, True}
