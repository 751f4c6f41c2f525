# SPDX-License-Identifier: Apache-2.0
"""``update_model`` for Keras models: check, differentiate, step or defer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, MutableMapping, Sequence
from functools import partial
from typing import Any, TypeVar

import tensorflow as tf

from pyupdate import frameworks
from pyupdate.names import check_deferred, name_of
from pyupdate.options import LastUpdate, Options

from ..remembered import Remembered
from . import averages, gradients, halves, loss_scale, optimizers, passes, rates, replicas, scopes
from .alone import without_strategy
from .attributes import fingerprint
from .plan import Plan
from .state import State

Deferred = MutableMapping[str, list[Callable[[], None]]]

PLANS = 16
"""So many plans an optimizer has at most: the one not used for longest is forgotten."""

P = TypeVar("P")
_plans: Remembered[OrderedDict[Any, Any]] = Remembered()
_moving: Remembered[bool] = Remembered()
"""Whose own step changes its Python attributes: an eager step runs its Python every time."""
_last: Remembered[LastUpdate | list[Any]] = Remembered()
_warned: Remembered[set[str]] = Remembered()


# In a user's tf.function AutoGraph would rewrite all of us, for nothing and with warnings.
@tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
def update(
    model: Any, loss: Any, tape: Any, scaler: Any, defer: bool, deferred: Deferred | None
) -> None:
    """Do what `pyupdate.update_model` says, with a Keras model and a ``tf.Tensor``."""
    name = name_of(model)
    check_deferred(name, defer, deferred)
    _check(name, model, loss, tape, scaler)
    averages.check_not_swapped(model, name)
    optimizer = optimizer_of(model, name)
    owners = list(model.trainable_variables)
    if not owners:
        message = (
            f"'{name}' has no trainable variables: it was never called on data (not built; call it "
            "once), or every layer is frozen (set trainable=True where one is to be stepped)"
        )
        raise ValueError(message)
    variables = [optimizers.tf_variable(owner) for owner in owners]
    replicas.check_place(variables, name)
    scopes.make_state(optimizer, owners, variables, name)
    scaling = loss_scale.of(optimizer)
    with gradients.not_recorded(tape):
        scale = None if scaling is None else scaling.value()
        grads = gradients.taken(name, tape, loss, variables, scale, replicas.count())
        warned = _warned.get(model)
        if warned is None:
            _warned[model] = warned = set()
        there = gradients.reached(name, grads, owners, warned)
        missed: tuple[int, ...] = ()
        if accumulates(model):  # what one micro-batch does not reach, another may
            missed = tuple(sorted(set(range(len(owners))).difference(there)))
            there = list(range(len(owners)))
        dense = [gradients.dense(grads[i], variables[i]) for i in there]
        if not defer:
            held, stepped = [owners[i] for i in there], [variables[i] for i in there]
            apply(model, name, held, stepped, dense, scale, missed)
            return
    assert deferred is not None  # check_deferred
    held = [owners[i] for i in there]
    stepped = [variables[i] for i in there]

    @tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
    def deferred_update() -> None:
        now = optimizer_of(model, name)
        if now is not optimizer:
            scopes.make_state(now, owners, variables, name)
        with gradients.not_recorded(tape):
            apply(model, name, held, stepped, dense, scale, missed)

    deferred.setdefault(name, []).append(deferred_update)


def options_of(model: Any) -> Options:
    """What `pyupdate.build` was given."""
    found = getattr(model, "update_options", None)
    return found if isinstance(found, Options) else Options()


def accumulates(model: Any) -> bool:
    """Whether a step is made of several micro-batches."""
    return options_of(model).accumulation_steps > 1


def optimizer_of(model: Any, name: str) -> Any:
    """``model.current_optimizer``, else what ``compile`` has set.

    Raises:
        ValueError: there is none, or it is none of Keras's.
    """
    for attribute in ("current_optimizer", "optimizer"):
        found = getattr(model, attribute, None)
        if found is None:
            continue
        if not optimizers.is_optimizer(found):
            message = (
                f"the {attribute} of '{name}' is a {frameworks.type_name(found)}: give a Keras "
                "optimizer"
            )
            raise ValueError(message)
        optimizers.check_home(found, model, f"{attribute} of '{name}'")
        return found
    message = (
        f"'{name}' has no optimizer: attach one by pyupdate.build(model, 'adam'), or by "
        "model.compile(optimizer=...)"
    )
    raise ValueError(message)


def apply(
    model: Any,
    name: str,
    owners: Sequence[Any],
    variables: Sequence[Any],
    grads: Sequence[Any],
    scale: Any,
    missed: tuple[int, ...],
) -> None:
    """Step the optimizer that the model has now on dense gradients of these variables.

    Args:
        model: whose they are.
        name: its name.
        owners: the model's variables.
        variables: the ``tf.Variable`` of each: Keras asks 2 us for one.
        grads: dense, one of each.
        scale: what the gradients are scaled by; None where they are not.
        missed: the positions of those that are zero, as a micro-batch does not reach its variable.
    """
    optimizer = optimizer_of(model, name)
    options = options_of(model)
    scaling = loss_scale.of(optimizer)
    if scaling is None and scale is not None:  # deferred under an optimizer that scales
        scaling = loss_scale.NONE
    elif scaling is not None and scale is None:  # deferred under one that does not
        scale = tf.constant(1.0)
    state = _state(model, options)
    kinds = tuple([grad.dtype for grad in grads])

    if optimizers.counts_in_python(optimizers.stepped(optimizer)):
        _moving[optimizer] = True

    replicated = replicas.are_here(variables)
    traced = tf.executing_eagerly() and not replicated and not _moving.get(optimizer)
    asked = rates.fed(optimizers.stepped(optimizer)) if traced else {}

    def said() -> Any:
        """What a trace takes from Python; None where nothing is traced."""
        inner = optimizers.stepped(optimizer)
        return None if _moving.get(optimizer) else fingerprint(inner, asked)

    def planned(make: Callable[[], P], *also: Any) -> P:
        inner = said()
        grows = None if scaling is None else scaling.growth_steps
        # A plan holds the state: its number stays taken.
        kept = (options, id(state), missed, passes.allowed())
        key = (*kept, tuple(map(id, variables)), kinds, scale is not None, inner, grows, *also)
        return _planned(optimizer, key, make)

    made: list[Plan] = []

    def make() -> Plan:
        copies, targets = halves.of(optimizer, owners, variables, name)
        inner = optimizers.stepped(optimizer)
        plan = Plan(inner, variables, targets, options, scaling, state, copies, missed, asked)
        made.append(plan)
        if _moving.get(optimizer):
            plan.leave_traces()
        return plan

    if replicated:

        def of(strategy: Any) -> Any:
            scopes.check_inside(optimizer, variables, name)
            return replicas.plan(
                strategy, optimizer, name, owners, variables, options, scaling, state, missed
            )

        eagerly = tf.config.functions_run_eagerly()
        replicas.step(
            grads,
            scale,
            lambda strategy: planned(partial(of, strategy), replicas.count(), eagerly),
            partial(_keep, optimizer),
        )
        return
    plan = planned(make)
    before = said() if made else None
    _keep(optimizer, plan(grads, scale), scale)
    # Changed by its own trace, so a trace cannot say its next step.
    if made and tf.executing_eagerly() and before != said():
        _moving[optimizer] = True
        _plans[optimizer] = OrderedDict()


def _planned(optimizer: Any, key: Any, make: Callable[[], P]) -> P:
    """The optimizer's plan of that key."""
    plans = _plans.get(optimizer)
    if plans is None:
        _plans[optimizer] = plans = OrderedDict()
    plan = plans.get(key)
    if plan is None:
        plans[key] = plan = make()
        if len(plans) > PLANS:
            plans.popitem(last=False)
    elif plan is not next(reversed(plans.values())):  # a key takes 20 us to find
        plans.move_to_end(key)
    return plan


def path_of(model: Any) -> str:
    """What made the model's last step, in words: "XLA", or what else and why.

    Raises:
        ValueError: there was none yet.
    """
    name = name_of(model)
    plans = _plans.get(optimizer_of(model, name))
    if not plans:
        message = f"'{name}' was not stepped yet: call pyupdate.update_model first"
        raise ValueError(message)
    path: str = next(reversed(plans.values())).path
    return path


def last_update(model_or_optimizer: Any) -> LastUpdate | None:
    """Do what `pyupdate.last_update` says."""
    optimizer = model_or_optimizer
    if not optimizers.is_optimizer(optimizer):
        optimizer = optimizer_of(optimizer, name_of(optimizer))
    found = _last.get(optimizer)
    return _read([tf.identity(v) for v in found]) if isinstance(found, list) else found


def _keep(optimizer: Any, found: Sequence[Any], scale: Any) -> None:
    """Remember what a step found; inside a ``tf.function`` by variables that it writes.

    Where there are such variables, every later step writes them: which one was the last is known
    to no one else, as a function may be called again without Python.
    """
    eager = tf.executing_eagerly()
    kept = _last.get(optimizer)
    if eager and not isinstance(kept, list):
        multiplier = (lambda: 1.0 / float(scale)) if scale is not None else 1.0
        _last[optimizer] = _read(found) if found else LastUpdate(None, False, multiplier)
        return
    if not isinstance(kept, list):

        def zeros() -> list[Any]:
            return [tf.Variable(tf.zeros([], tf.float64), trainable=False) for _ in range(3)]

        # A variable that a function makes itself has it traced a second time.
        kept = _last[optimizer] = without_strategy(zeros)
    if not found:
        one = tf.constant(1.0, tf.float64)
        found = (NOT_ASKED, 0.0, one if scale is None else one / tf.cast(scale, tf.float64))
    for variable, value in zip(kept, found, strict=True):
        variable.assign(tf.cast(value, tf.float64))


NOT_ASKED = -1.0
"""The norm that a variable holds where nobody asked for one."""


def _read(found: Sequence[Any]) -> LastUpdate:
    norm, skipped, multiplier = found  # tensors: copying three to the host takes 0.2 ms

    def asked() -> float | None:
        value = float(norm.numpy())
        return None if value == NOT_ASKED else value

    return LastUpdate(asked, lambda: bool(skipped.numpy()), lambda: float(multiplier.numpy()))


def _state(model: Any, options: Options) -> State | None:
    """What the model keeps for its options; None where they keep nothing."""
    if options.accumulation_steps == 1 and options.ema_decay is None:
        return None
    state = getattr(model, "update_state", None)
    before = state if isinstance(state, State) else None
    variables = [optimizers.tf_variable(owner) for owner in model.trainable_variables]
    if before is None or not before.serves(variables, options):
        wanted = {id(v) for v in (*variables, *(before.stepped if before else ()))}
        every = [optimizers.tf_variable(owner) for owner in model.variables]
        variables = [variable for variable in every if id(variable) in wanted]
        model.update_state = before = State(variables, every, options, before)
    return before


def _check(name: str, model: Any, loss: Any, tape: Any, scaler: Any) -> None:
    """Refuse what TensorFlow cannot do anything with, before anything is computed.

    Raises:
        ValueError: says what to give.
    """
    if optimizers.home(model) == "keras":
        import keras

        if keras.backend.backend() != "tensorflow":
            message = (
                f"'{name}' runs on Keras's back end {keras.backend.backend()}: set KERAS_BACKEND="
                "tensorflow before Keras is imported"
            )
            raise ValueError(message)
    if not loss.dtype.is_floating:
        message = (
            f"the loss of '{name}' must be a floating tensor, but is one of {loss.dtype.name}: "
            "compute it in a floating type, as integers have no gradients"
        )
        raise ValueError(message)
    if scaler is not None:
        message = (
            f"scaler is PyTorch's, but '{name}' is a Keras model: leave scaler=None and give the "
            "model a keras.optimizers.LossScaleOptimizer"
        )
        raise ValueError(message)
    if not isinstance(tape, tf.GradientTape):
        found = "is missing" if tape is None else f"is a {frameworks.type_name(tape)}"
        message = (
            f"tape {found}: compute the loss of '{name}' inside `with tf.GradientTape() as tape:` "
            "and give tape=tape"
        )
        raise ValueError(message)
