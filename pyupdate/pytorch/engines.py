# SPDX-License-Identifier: Apache-2.0
"""What is kept of a torch optimizer between its steps, and what its class says of its rules."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer

from ..options import LastUpdate, Options
from . import uninterrupted
from .plan import Plan
from .rows import GroupRule, OptimizerRow

ROWS: dict[type[Optimizer], OptimizerRow] = {}
"""Torch's optimizer classes that have rules; `pyupdate.optim` fills it."""

PLANS_KEPT = 8
"""Plans that are kept of one optimizer, each of a subset: one a model that shares it."""

_ENGINE = "_pyupdate_engine"


@dataclass
class Engine:
    """What is kept of one optimizer between steps."""

    row: OptimizerRow | None = None
    plans: dict[tuple[int, ...] | None, Plan] = field(default_factory=dict)
    rules: dict[str, GroupRule] = field(default_factory=dict)
    names: Mapping[int, str] = field(default_factory=dict)
    last: LastUpdate | None = None
    joins: tuple[Options, bool] | None = None  # whether these options let it join others
    kept: int = PLANS_KEPT
    micro_batches: int = 1
    """Of how many the next step takes the mean."""
    window_scale: Any = ...
    """The scale of an open window's gradients, None without a scaler; ... where nobody knows."""
    counted: dict[int, Any] = field(default_factory=dict)
    """By the id of a group: the gradients of its last micro-batch (`counted.Counted`), if known."""
    known: Any = None
    """Of an optimizer with memory that no plan sees: what its `check` keeps, and its `finish`."""
    handed: Any = None  # the scaler whose ``scaler.step`` runs, where its own step takes none
    whole: bool = False  # whether ``optimizer.step()`` counts no micro-batch: somebody has
    swapped: bool = False  # whether the parameters hold their averages: no step may be made
    lock: threading.Lock = field(default_factory=threading.Lock)


def engine_of(optimizer: Optimizer) -> Engine:
    """The engine of an optimizer, made when first asked for."""
    # In the object's own dict, so that a cycle model -> optimizer -> plan -> parameter -> hook ->
    # model can be collected; torch leaves it out of copies and pickles.
    engine = optimizer.__dict__.get(_ENGINE)
    if engine is None:
        engine = optimizer.__dict__[_ENGINE] = Engine()
    assert isinstance(engine, Engine)
    return engine


def row_of(optimizer: Optimizer) -> OptimizerRow | None:
    """How an optimizer's class maps to rules, None if it does not."""
    from .. import optim  # noqa: F401 - fills ROWS

    return _row_of_class(type(optimizer))


def _row_of_class(kind: type) -> OptimizerRow | None:
    return next((ROWS[base] for base in kind.__mro__ if base in ROWS), None)


def has_rule(optimizer: object) -> bool:
    """Whether `step` can step it: one of ours, or a stock one whose ``step`` nobody replaced."""
    from ..optim.planned import Planned

    if not isinstance(optimizer, Optimizer):
        return False
    if isinstance(optimizer, Planned):
        return not is_differentiable(optimizer)
    return type(optimizer) in ROWS and is_as_made(optimizer)


def has_own_step(optimizer: Optimizer) -> bool:
    """Whether it is of a user's subclass of ours, whose ``step`` may do more than ours."""
    from ..optim.planned import Planned

    return isinstance(optimizer, Planned) and type(optimizer).step is not Planned.step


def is_as_made(optimizer: Optimizer) -> bool:
    """Whether a stock optimizer's step is torch's own, and one that ours can stand in for."""
    own = optimizer.__dict__.get("step")
    stock = own is None or hasattr(own, "_wrapped_by_lr_sched")
    return stock and not is_differentiable(optimizer)


def is_differentiable(optimizer: Optimizer) -> bool:
    """Whether a group asks for a step that can be differentiated: torch's own, ours cannot."""
    return any(group.get("differentiable", False) for group in optimizer.param_groups)


def set_names(optimizer: Optimizer, names: Mapping[int, str]) -> None:
    """Let errors name the parameters as the model does.

    Args:
        optimizer: whose parameters.
        names: ``id(parameter)`` -> qualified name.
    """
    engine = engine_of(optimizer)
    engine.names = dict(names)
    engine.plans.clear()


def has_names(optimizer: Optimizer) -> bool:
    """Whether `set_names` was called for it."""
    return bool(engine_of(optimizer).names)


class Stepped:
    """Whether an optimizer has made a step since: who raises behind one has not undone it."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer if has_rule(optimizer) else None
        self._before = None if self._optimizer is None else last_step(self._optimizer)
        self._noted = False

    def note(self) -> None:
        """It has: of an optimizer without a rule nobody else knows."""
        self._noted = True

    def __bool__(self) -> bool:
        of = self._optimizer
        return self._noted or (of is not None and last_step(of) is not self._before)


def last_step(optimizer: Optimizer) -> LastUpdate | None:
    """What the last planned step of an optimizer did, None before the first."""
    return engine_of(optimizer).last


def options_of(optimizer: Optimizer) -> Options:
    """The options that its constructor, `accelerate` or `build` were given."""
    options = optimizer.__dict__.get("pyupdate_options")
    return options if isinstance(options, Options) else _PLAIN


_PLAIN = Options()


def check_options(kind: type[Optimizer], options: Options) -> None:
    """Refuse an option that a class cannot have.

    Raises:
        ValueError: names both.
    """
    row = _row_of_class(kind)
    for name in () if row is None else row.lacks:
        if name in options.asked_for:
            message = f"{kind.__name__} cannot be had with {name}: leave one of them out"
            raise ValueError(message)


def lock_step(engine: Engine, held: list[threading.Lock]) -> None:
    """Let nobody else step an optimizer until the lock that is put into `held` is released.

    Raises:
        RuntimeError: it is being stepped, or inside `pyupdate.averaged_weights`.
    """
    check_not_swapped(engine)
    if not uninterrupted.take(held, engine.lock):
        message = "this optimizer is being stepped by another thread"
        raise RuntimeError(message)


def check_not_swapped(engine: Engine) -> None:
    """Refuse a step of averages, which would be lost.

    Raises:
        RuntimeError: inside `pyupdate.averaged_weights`.
    """
    if engine.swapped:
        message = (
            "the averages are in the model (pyupdate.averaged_weights), and a step of them would "
            "be lost: leave the block first"
        )
        raise RuntimeError(message)
