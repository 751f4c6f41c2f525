# SPDX-License-Identifier: Apache-2.0
"""What every optimizer class of pyupdate shares: a step through the plan, and the options."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch.optim import Optimizer

from .. import amp
from ..eagerly import eagerly
from ..forks import one_thread_in_forked_child
from ..kernels.language import Rule
from ..options import PARAMETERS, LastUpdate, Options
from ..pytorch import accumulation, engines, state, step
from ..pytorch.hooks import hooked
from ..pytorch.rows import Group, OptimizerRow, Row, rule_of

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler

# Torch warns when a GradScaler hands itself to a step that asks for it, which is how ours learns of
# the scaler before torch's own pass over the gradients.
warnings.filterwarnings(
    "ignore",
    message="GradScaler is going to stop passing itself as a keyword argument",
    category=FutureWarning,
)

_OPTIONS = frozenset(parameter.name for parameter in PARAMETERS)

_NOT_GIVEN: Any = object()
"""In the place of a closure: whoever gives None instead may be torch.distributed.checkpoint."""


def _without_a_closure(step: Callable[..., Any]) -> inspect.Signature:
    """A step's signature with None as its closure, as torch's."""
    shown = inspect.signature(step)
    given = shown.parameters | {"closure": shown.parameters["closure"].replace(default=None)}
    return shown.replace(parameters=[*given.values()])


DROP_INS: dict[type[Optimizer], type[Planned]] = {}
"""What `accelerate` makes of an optimizer of torch's; `planned` fills it."""

_P = TypeVar("_P", bound="type[Planned]")


def planned(
    rule: Callable[[Group], Rule],
    *,
    counts_steps: bool,
    finish: Callable[[Any, Sequence[Row], LastUpdate], None] | None = None,
    check: Callable[[Any, Sequence[Row]], None] | None = None,
    lacks: tuple[str, ...] = (),
) -> Callable[[_P], _P]:
    """Declare of a class which rule steps its groups, and whether it keeps ``state[p]["step"]``.

    `finish`, `check` and `lacks` are what `OptimizerRow` says.
    A class on one of ``torch.optim`` also becomes what `accelerate` makes of that one.
    """
    row = OptimizerRow(rule, counts_steps, finish, check, lacks)

    def declare(cls: _P) -> _P:
        engines.ROWS[cls] = row
        stock = cls.__mro__[2]  # behind Planned
        if stock is not Optimizer:
            engines.ROWS[stock] = row
            DROP_INS[stock] = cls
        return cls

    return declare


class Planned(Optimizer):
    """What the drop-in classes share: a step through the plan, and the options."""

    _step_supports_amp_scaling = True
    pyupdate_options: Options

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        self.pyupdate_options = Options(**given)
        engines.check_options(type(self), self.pyupdate_options)
        with one_thread_in_forked_child():  # Adagrad's constructor makes state
            super().__init__(*args, **kwargs)
            if engines.is_differentiable(self):
                self._check_differentiable()
            wanted = self.pyupdate_options.state_dtype
            for inner, key, value in state.converted(self, wanted):
                inner[key] = value

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let ``help`` show the constructor of the class below with the options behind it.

        And let its own ``step`` be handed a scaler: one that finds inf and nan in a way of its own,
        and agrees with other processes on them, would not be asked otherwise.
        """
        super().__init_subclass__(**kwargs)
        below: Any = cls.__dict__.get("__init__") or super().__init__
        own = _with_those_below(cls, inspect.signature(below))
        rest = [p for p in own if p.kind is p.VAR_KEYWORD]
        shown = [*(p for p in own if p not in rest), *PARAMETERS, *rest]
        cls.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
        step: Any = cls.step  # a mixin's, too
        if "grad_scaler" not in inspect.signature(step).parameters:
            cls.step = _taking_a_scaler(step)  # type: ignore[method-assign]

    @eagerly
    def step(
        self,
        closure: Callable[[], Any] | None = _NOT_GIVEN,
        *,
        grad_scaler: GradScaler | None = None,
    ) -> Any:
        """Make one step; see `pyupdate.pytorch.step.step`.

        Args:
            closure: re-evaluates the model and returns the loss.
            grad_scaler: the ``torch.amp.GradScaler`` that the gradients were scaled by:
                ``scaler.step(optimizer)`` passes itself here.

        Returns:
            What the closure returned, None without one.

        Raises:
            TypeError, ValueError: something is refused; nothing was written.
            RuntimeError: a second step before ``scaler.update()``.
        """
        known = engines.engine_of(self)
        if known.handed is not None:
            grad_scaler, known.handed = known.handed, None
        window = None if known.whole else accumulation.window_of(self)
        if closure is None and window is not None and grad_scaler is None:
            if accumulation.is_to_make_state(self, window):
                window.position, window = 0, None
        elif closure is _NOT_GIVEN:
            closure = None
        if window is not None and not engines.is_differentiable(self):
            return accumulation.micro_step(self, window, Planned._whole_step, closure, grad_scaler)
        given: dict[str, Any] = {} if grad_scaler is None else {"grad_scaler": grad_scaler}
        return self._whole_step(*(() if closure is None else (closure,)), **given)

    step.__signature__ = _without_a_closure(step)  # type: ignore[attr-defined]
    step.hooked = True  # type: ignore[attr-defined] # torch would run the hooks of every micro-batch

    @hooked
    def _whole_step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scaler: GradScaler | None = None,
    ) -> Any:
        """A step that is made, not only counted: the hooks and schedulers see these."""
        if engines.is_differentiable(self):
            return self._differentiable_step(closure, grad_scaler)
        return step.step.__wrapped__(self, closure, grad_scaler=grad_scaler)  # type: ignore[attr-defined]

    @eagerly
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients; inside a window of ``accumulation_steps`` they are kept.

        Args:
            set_to_none: as in torch.
        """
        if not any(group.get(accumulation.POSITION) for group in self.param_groups):
            super().zero_grad(set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, of this class or of torch's.

        As torch's, but that a parameter's scalars stay in the dtype they were saved in, so that
        training goes on with the same bits; that float32 state of bfloat16 and float16 parameters
        stays float32, and with ``state_dtype`` all of it becomes float32. An open window of
        ``accumulation_steps`` goes on only where its gradients were put into `.grad` before;
        gradients that this optimizer has counted itself keep its own count.

        Args:
            state_dict: what ``state_dict()`` returned.
        """
        before = accumulation.counts_of(self)
        wanted = engines.options_of(self).state_dtype
        kept = state.kept_on_load(self, wanted, lambda index: _scalars_of(self, index))
        with one_thread_in_forked_child(), kept:
            super().load_state_dict(state_dict)
        accumulation.check_loaded(self, before)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; between two windows of ``accumulation_steps`` only.

        Args:
            param_group: as in torch.

        Raises:
            ValueError: a window is open, whose micro-batches the new gradients would not hold.
        """
        accumulation.check_new_group(self)
        super().add_param_group(param_group)
        self.param_groups[-1].pop(accumulation.POSITION, None)  # a dict of another optimizer's
        accumulation.keep_counts(self)

    def _check_differentiable(self) -> None:
        """Refuse options, of which torch's own step knows nothing."""
        asked_for = engines.options_of(self).asked_for
        if asked_for:
            message = (
                f"{', '.join(asked_for)} cannot be had with differentiable=True, which runs "
                "torch's own step: clip with torch.nn.utils.clip_grad_norm_ or clip_grad_value_ "
                "yourself, or leave one of them out"
            )
            raise ValueError(message)

    def _differentiable_step(self, closure: Callable[[], Any] | None, scaler: Any) -> Any:
        self._check_differentiable()
        amp.check_closure(closure, scaler)
        found = amp.unscale(scaler, self)
        loss = None if found else _stock_step(self)(self, closure)
        amp.tell(scaler, self, LastUpdate(None, skipped=found, multiplier=1.0))
        return loss

    def __getstate__(self) -> dict[str, Any]:
        kept = super().__getstate__()
        return kept | {"pyupdate_options": engines.options_of(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        accumulation.keep_counts(self)
        accumulation.close_without_gradients(self)  # torch copies and pickles parameters without


def _scalars_of(optimizer: Planned, index: int) -> Collection[str]:
    """The state keys of the scalars that each parameter of a group has."""
    row, name = engines.row_of(optimizer), type(optimizer).__name__
    if row is None:
        return ()
    try:
        return rule_of(row, optimizer.param_groups[index], index, name).scalars
    except (ValueError, RuntimeError):  # a step says what is wrong with the group
        return ()


def _with_those_below(cls: type[Planned], shown: inspect.Signature) -> list[inspect.Parameter]:
    """A constructor's parameters; in the place of ``*args, **kwargs`` torch's, which get those."""
    own = [p for p in shown.parameters.values() if p.name != "self"]
    variable = [p for p in own if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    below = next(base for base in cls.__mro__ if base.__module__.startswith("torch.optim"))
    if len(variable) != 2 or below is Optimizer:
        return own
    theirs = [*inspect.signature(below).parameters.values()]
    first = [p for p in own if p.kind is p.POSITIONAL_OR_KEYWORD]
    if [p.name for p in first] != [p.name for p in theirs[: len(first)]]:
        return own
    named = [p for p in own if p.kind is p.KEYWORD_ONLY]
    taken = {p.name for p in named}
    return [*(p for p in theirs if p.name not in taken), *named]


def _taking_a_scaler(own_step: Callable[..., Any]) -> Callable[..., Any]:
    """A step that takes no scaler, as one that takes it and leaves it to ours, which it calls."""

    @functools.wraps(own_step)
    def step(self: Planned, *args: Any, grad_scaler: Any = None, **kwargs: Any) -> Any:
        if grad_scaler is None:
            return own_step(self, *args, **kwargs)
        known = engines.engine_of(self)
        known.handed = grad_scaler
        try:
            done = own_step(self, *args, **kwargs)
            if known.handed is not None:  # it made no step, and update() wants to hear something
                _check_may_pass(self, grad_scaler)
                amp.tell_what_is_found(grad_scaler, self)
        finally:
            known.handed = None
        return done

    shown = inspect.signature(own_step)
    rest = [p for p in shown.parameters.values() if p.kind is p.VAR_KEYWORD]
    taken = [p for p in shown.parameters.values() if p not in rest]
    scaler = inspect.Parameter("grad_scaler", inspect.Parameter.KEYWORD_ONLY, default=None)
    step.__signature__ = shown.replace(parameters=[*taken, scaler, *rest])  # type: ignore[attr-defined]
    return step


def _check_may_pass(optimizer: Optimizer, scaler: Any) -> None:
    if amp.has_own_check(scaler):
        message = (
            f"the step of {type(optimizer).__name__} did not call super().step(), which asks the "
            f"{type(scaler).__name__} what it has found, and agrees with other processes on it: "
            "call it, or do not call scaler.step() where no step is to be made"
        )
        raise RuntimeError(message)


def _stock_step(optimizer: Optimizer) -> Callable[..., Any]:
    """The step of torch's own class, without the hooks that ours has run already."""
    for kind in type(optimizer).__mro__:
        if kind in DROP_INS:
            found = kind.step
            inner = getattr(found, "__wrapped__", found)
            stock: Callable[..., Any] = inner if hasattr(found, "hooked") else found
            return stock
    message = f"{type(optimizer).__name__} is none of torch's optimizers"
    raise TypeError(message)
