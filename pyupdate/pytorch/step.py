# SPDX-License-Identifier: Apache-2.0
"""One planned step of a torch optimizer, ours or a stock one: the engine of all three levels."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from .. import amp
from ..options import LastUpdate
from . import uninterrupted
from .checks import check_capturable
from .engines import Engine, engine_of, has_own_step, has_rule, lock_step, options_of, row_of
from .hooks import has_hooks, hooked
from .joining import JOINABLE, Joining, step_all
from .plan import Plan
from .request import NormNotFinite, Scaling
from .rows import AVERAGE, GroupRule, Inputs, Row, Stale, given_by, rows_of, rule_of

Closure = Callable[[], Any]


def _planned_step(
    optimizer: Optimizer,
    closure: Closure | None = None,
    *,
    grad_scaler: GradScaler | None = None,
    only: Collection[torch.Tensor] | None = None,
) -> Any:
    amp.check_closure(closure, grad_scaler)
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    engine = engine_of(optimizer)
    scaling = amp.scaling_of(grad_scaler, optimizer)
    if engine.micro_batches > 1:
        scaling = replace(scaling, divisor=float(engine.micro_batches))
    held: list[threading.Lock] = []
    releases = uninterrupted.releases(held)
    try:
        lock_step(engine, held)
        before = engine.last
        try:
            rules, inputs = _read(optimizer, engine)
            _step_once(optimizer, engine, rules, inputs, scaling, only)
            assert engine.last is not None
            _tell(grad_scaler, optimizer, engine.last)
        except NormNotFinite:
            amp.tell_what_is_found(grad_scaler, optimizer)
            raise
        except BaseException:
            if engine.last is not None and engine.last is not before:  # interrupted behind it
                _tell(grad_scaler, optimizer, engine.last)
            raise
    finally:
        uninterrupted.exhaust(releases)
    return loss


step = hooked(_planned_step)
"""Make one step: unscale, finite check, clip and the rule, in at most two passes.

Args:
    optimizer: one of ours, or a stock one with a rule (`has_rule`).
    closure: re-evaluates the loss; called with gradients enabled.
    grad_scaler: the scaler that the gradients were scaled by; it is told what was found.
    only: the parameters to step; None for all of the optimizer's.

Returns:
    What the closure returned.

Raises:
    TypeError, ValueError: a parameter, gradient or state is refused; nothing was written.
    RuntimeError: the scaler refuses.
"""
step.hooked = True  # type: ignore[attr-defined]


def _planned_step_in_pieces(
    optimizer: Optimizer, run: Callable[[Callable[[Collection[torch.Tensor]], None]], None]
) -> None:
    engine = engine_of(optimizer)
    scaling = amp.scaling_of(None, optimizer)
    held: list[threading.Lock] = []
    releases = uninterrupted.releases(held)
    try:
        lock_step(engine, held)
        rules, inputs = _read(optimizer, engine)

        def piece(only: Collection[torch.Tensor]) -> None:
            _step_once(optimizer, engine, rules, inputs, scaling, only)

        run(piece)
    finally:
        uninterrupted.exhaust(releases)
    _mark_stepped(optimizer)


step_in_pieces = hooked(_planned_step_in_pieces)
"""Make one step, piece by piece: its hooks run once, its groups are read once.

Args:
    optimizer: one with a rule (`has_rule`).
    run: is called with a function that steps the parameters that it is given, and which it calls as
        often as it likes, with every parameter at most once.

Raises:
    What `step` does, and what `run` does. Pieces that were stepped stay stepped.
"""
step_in_pieces.hooked = True  # type: ignore[attr-defined]


def can_join(optimizer: Optimizer) -> bool:
    """Whether its step may be made in one with others': nobody runs between them."""
    if not has_rule(optimizer) or has_hooks(optimizer) or has_own_step(optimizer):
        return False
    row = row_of(optimizer)
    if row is None or row.finish is not None:
        return False
    engine, options = engine_of(optimizer), options_of(optimizer)
    if engine.joins is None or engine.joins[0] is not options:
        engine.joins = (options, JOINABLE.issuperset(options.asked_for))
    return engine.joins[1]


def step_together(
    steps: Sequence[tuple[Optimizer, Collection[torch.Tensor], GradScaler | None]],
) -> bool:
    """Make the steps of several optimizers in one, with the bits of one by one.

    Args:
        steps: for each an optimizer that `can_join` (a different one each), the parameters to step
            (no one twice), and the scaler, as `step` takes them.

    Returns:
        Whether they were made. If not, nothing was done: `step` them one by one, which says why if
        one is refused.
    """
    if any(amp.has_own_check(scaler) for _, _, scaler in steps):
        return False  # which unscales one by one, and may wait for other processes there
    joinings: list[Joining] = []
    held: list[threading.Lock] = []
    releases = uninterrupted.releases(held)
    try:
        with torch.autograd.profiler.record_function("pyupdate.drain"):
            try:
                for optimizer, only, scaler in steps:
                    engine = engine_of(optimizer)
                    lock_step(engine, held)
                    scaling = amp.scaling_of(scaler, optimizer)
                    rules, inputs = _read(optimizer, engine)
                    plan = _plan(engine, inputs, rules, tuple(map(id, only)))
                    plan.begin()
                    joining = plan.joining(inputs, options_of(optimizer), scaling)
                    if joining is None:
                        return False
                    joinings.append(joining)
            except (TypeError, ValueError, RuntimeError):
                return False  # whoever is refused is told so in turn
            try:
                done = step_all(joinings)
                if done is not None:
                    _note_all(steps, done)
            except BaseException:
                made = [joining.part.made for joining in joinings]
                if None not in made:  # an interrupt behind the step; noted twice, it is one
                    _note_all(steps, made)
                raise
    finally:
        uninterrupted.exhaust(releases)
    return done is not None


def _note_all(
    steps: Sequence[tuple[Optimizer, Collection[torch.Tensor], GradScaler | None]],
    done: Sequence[LastUpdate],
) -> None:
    """What a joint step did for each of its optimizers."""
    for (optimizer, _, scaler), last in zip(steps, done, strict=True):
        engine_of(optimizer).last = last
        _tell(scaler, optimizer, last)


def _tell(scaler: GradScaler | None, optimizer: Optimizer, last: LastUpdate) -> None:
    """Let those know who count steps; told twice, they count one."""
    amp.tell(scaler, optimizer, last)
    _mark_stepped(optimizer)


def _mark_stepped(optimizer: Optimizer) -> None:
    if "step" in optimizer.__dict__:  # an lr_scheduler watches whether steps are made
        optimizer._opt_called = True  # type: ignore[attr-defined]


def _read(optimizer: Optimizer, engine: Engine) -> tuple[list[GroupRule], Inputs]:
    """What the groups say at this moment: schedulers just work."""
    row = engine.row
    if row is None:
        row = engine.row = row_of(optimizer)
        assert row is not None
    groups = optimizer.param_groups
    rules = []
    for index, group in enumerate(groups):
        rule = rule_of(row, group, index, type(optimizer).__name__)
        if group.get("capturable", False):
            check_capturable(group)
        known = engine.rules.get(rule.name)
        if known is None:
            known = engine.rules[rule.name] = GroupRule(rule, row.counts_steps)
        rules.append(known)
    numbers = [given_by(rules[index].rule, group, index) for index, group in enumerate(groups)]
    options = options_of(optimizer)
    averages = options.ema_decay is not None
    return rules, Inputs(groups, optimizer.state, numbers, options.state_dtype, averages)


def _step_once(
    optimizer: Optimizer,
    engine: Engine,
    rules: list[GroupRule],
    inputs: Inputs,
    scaling: Scaling,
    only: Collection[torch.Tensor] | None,
) -> None:
    """Make it; what it did is the engine's `last`."""
    key = None if only is None else tuple(map(id, only))
    # By state that it found absent a plan knows a first step, where torch counts none. If the step
    # was not made the plan is dropped: what is loaded then is not what a first step makes.
    for _ in range(3):
        plan = _plan(engine, inputs, rules, key)
        assert engine.row is not None
        if engine.row.check is not None:
            engine.row.check(optimizer, plan.rows)
        options = options_of(optimizer)
        finish = engine.row.finish
        if finish is not None and options.ema_decay is not None:
            # Parameters move behind the passes, so the passes leave the averages where they are.
            options = replace(options, ema_decay=1.0)
        plan.begin()
        try:
            last = plan.step(inputs, options, scaling)
            if finish is not None and not last.skipped:
                finish(optimizer, plan.rows, last)
                if inputs.averages:
                    _average(optimizer, plan.rows)
            engine.last = last
            if plan.lacked_state:  # so it was skipped
                engine.plans.pop(key, None)
            return
        except Stale as stale:
            del engine.plans[key]
            reason = str(stale)
        except BaseException as error:
            if finish is None and not isinstance(error, NormNotFinite) and plan.made is not None:
                engine.last = plan.made  # an interrupt behind the step
            elif plan.lacked_state:
                engine.plans.pop(key, None)
            raise
    message = (
        f"the plan of {type(optimizer).__name__} does not settle at {reason}: its gradient or "
        "state is of a class that the compiled step cannot read (a subclass of torch.Tensor that "
        "no parameter is of): make it a plain tensor with .as_subclass(torch.Tensor), or step on "
        "the back end 'reference'"
    )
    raise RuntimeError(message)


@torch.no_grad()
def _average(optimizer: Optimizer, rows: Sequence[Row]) -> None:
    """Move the averages of parameters that were moved behind the passes."""
    from ..backends.reference import average_moved

    decay = options_of(optimizer).ema_decay
    assert decay is not None  # there are averages
    for row in rows:
        if row.param.grad is not None:
            average = optimizer.state[row.param][AVERAGE]
            average.copy_(average_moved(average, row.param, 1.0 - float(decay)))


def _plan(
    engine: Engine, inputs: Inputs, rules: list[GroupRule], key: tuple[int, ...] | None
) -> Plan:
    plan = engine.plans.get(key)
    if plan is not None and plan.fits(rules, inputs):
        return plan
    only = None if key is None else frozenset(key)
    rows, left_out = rows_of(inputs.groups, only, engine.names)
    while len(engine.plans) >= engine.kept:
        del engine.plans[next(iter(engine.plans))]
    plan = engine.plans[key] = Plan(rows, rules, averages=inputs.averages, left_out=left_out)
    return plan
