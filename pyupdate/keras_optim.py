# SPDX-License-Identifier: Apache-2.0
"""Keras optimizers of update rules: the text that runs under PyTorch, in TensorFlow and XLA.

The numbers of a step are prepared in fp64 in the graph, state and parameters are computed in fp32
(fp64 for fp64 variables), so a step is torch's up to what XLA contracts: multiplications and
additions in one rounding, unless the process was started with ``XLA_FLAGS=--xla_cpu_max_isa=AVX``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from .kernels.bind import bind
from .kernels.language import Rule, named_results
from .kernels.own import OwnRule, rule_at
from .kernels.rules import RULES

__all__ = ["RuleOptimizer", "from_rule"]

_RATE = "lr"  # Keras's learning_rate, by the name that rules have for it


@keras.saving.register_keras_serializable(package="pyupdate")
class RuleOptimizer(keras.optimizers.Optimizer):  # type: ignore[misc]
    """A Keras optimizer that steps by a rule; made by `from_rule`.

    Attributes:
        rule: the rule.
        numbers: its numbers by name, as they were given.
    """

    def __init__(self, rule: Rule, numbers: Mapping[str, Any], **options: Any) -> None:
        rate = numbers.get(_RATE, 0.0)
        super().__init__(learning_rate=rate, **options)
        self.rule = rule
        self.numbers = dict(numbers)
        self._hypers: dict[str, Any] | None = None

    def build(self, variables: Sequence[Any]) -> None:
        """Make the state, in the dtype of each variable; scalars in float32, as torch has them."""
        if self.built:
            return
        super().build(variables)
        self._state = {
            name: [self._begun(name, initial, v) for v in variables]
            for name, initial in self.rule.state.items()
        }
        self._scalars = {
            name: [
                self.add_variable(
                    (), self._constant(self._number(initial)), dtype="float32", name=f"{name}_{i}"
                )
                for i in range(1 if name in self.rule.counted else len(variables))
            ]
            for name, initial in self.rule.scalars.items()
        }

    def _begun(self, name: str, initial: Any, variable: Any) -> Any:
        # The value comes by the initializer: what a checkpoint restored before is not written over.
        begin: Any = (
            (lambda _shape, dtype: tf.cast(variable, dtype))
            if initial == "param"
            else self._constant(self._number(initial))
        )
        return self.add_variable_from_reference(variable, name, begin)

    def _number(self, initial: Any) -> float:
        return float(self.numbers[initial] if isinstance(initial, str) else initial)

    def _constant(self, value: float) -> Any:
        # Keras's own Constant is rounded to float32 on its way to float64.
        return lambda shape, dtype: tf.fill(shape, tf.cast(tf.constant(value, tf.float64), dtype))

    # ----- a step ---------------------------------------------------------------------------------

    def _backend_update_step(
        self, grads: Any, trainable_variables: Any, learning_rate: Any
    ) -> None:
        # Once a step, not once a variable: the powers of a prepare are hundreds of operations.
        self._hypers, counted = self._prepared()
        try:
            super()._backend_update_step(grads, trainable_variables, learning_rate)
        finally:
            self._hypers = None
        for name, value in counted.items():
            self._scalars[name][0].assign(tf.cast(value, tf.float32))

    def _prepared(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The hypers of this step and the new scalars, in fp64."""
        rule = self.rule
        # with gradient_accumulation_steps it is a quotient of Keras's, no variable
        step = tf.cast(tf.convert_to_tensor(self.iterations), tf.float64) + 1.0
        numbers = self.rule_numbers()
        kept = [tf.cast(self._scalars[name][0].value, tf.float64) for name in rule.counted]
        made = bind(rule.prepare.text, "tensorflow float64")(step, *numbers, *kept)
        named = named_results(rule.prepare, made)
        return (
            {name: named[name] for name in rule.hypers},
            {name: named[name] for name in rule.counted},
        )

    def rule_numbers(self) -> list[Any]:
        """The rule's numbers as they are now, in its order, as float64 tensors."""
        return [self._now(name) for name in self.rule.numbers]

    def _now(self, name: str) -> Any:
        """A number in fp64. Keras keeps the learning rate in float32: ours, while it is that."""
        given = self.numbers[name]
        if name != _RATE:
            return tf.constant(float(given), tf.float64)
        rate = tf.convert_to_tensor(self.learning_rate)
        wide = tf.cast(rate, tf.float64)
        if callable(given):
            return wide
        same = tf.equal(rate, tf.constant(np.float32(given), rate.dtype))
        return tf.where(same, tf.constant(float(given), tf.float64), wide)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:  # noqa: ARG002
        """Move one variable and its state; Keras calls it."""
        hypers = self._hypers if self._hypers is not None else self._prepared()[0]
        rule = self.rule
        place = self._get_variable_index(variable)
        compute = tf.float64 if variable.dtype in ("float64", tf.float64) else tf.float32
        held = {name: kept[place].value for name, kept in self._state.items()}
        held["param"] = variable.value if isinstance(variable, keras.Variable) else variable
        known = {name: tf.cast(value, compute) for name, value in held.items()}
        known["grad"] = tf.cast(gradient, compute)
        known |= {name: tf.cast(value, compute) for name, value in hypers.items()}
        places = dict(hypers)
        places["numel"] = tf.constant(float(math.prod(variable.shape)), tf.float64)
        for name in rule.scalars:
            if name not in rule.counted:
                places[name] = tf.cast(self._scalars[name][place].value, tf.float64)
        for stage in rule.stages:
            function = bind(stage.function.text, f"tensorflow {compute.name}")
            out = function(*(known[name] for name in stage.function.arguments))
            for name, value in named_results(stage.function, out).items():
                if name in stage.sums:
                    places[name] = tf.reduce_sum(tf.cast(value, tf.float64))
                else:  # a later stage reads what was stored
                    known[name] = tf.cast(tf.cast(value, held[name].dtype), compute)
            if stage.turn is not None:
                turn = bind(stage.turn.text, "tensorflow float64")
                made = turn(*(places[name] for name in stage.turn.arguments))
                places |= named_results(stage.turn, made)
            known |= {name: tf.cast(places[name], compute) for name in stage.leaves}
        for name, value in held.items():
            if any(name in stage.writes for stage in rule.stages):
                value.assign(tf.cast(known[name], value.dtype))
        for name in rule.scalars:
            if name not in rule.counted:
                self._scalars[name][place].value.assign(tf.cast(places[name], tf.float32))

    # ----- on disk --------------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """What `from_config` makes it of again."""
        config = super().get_config()
        rate = config.pop("learning_rate")
        config.pop("weight_decay")  # Keras's own; a rule's is among its numbers
        numbers = {k: v for k, v in self.numbers.items() if k != _RATE}
        if _RATE in self.numbers:
            given = self.numbers[_RATE]
            kept = isinstance(rate, float) and not callable(given) and np.float32(given) == rate
            numbers[_RATE] = given if kept else rate
        return {**config, "rule": _identity(self.rule), "numbers": numbers}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> RuleOptimizer:
        """The optimizer of a config."""
        given = dict(config)
        numbers = dict(given.pop("numbers"))
        if isinstance(numbers.get(_RATE), dict):
            numbers[_RATE] = keras.optimizers.schedules.deserialize(numbers[_RATE], custom_objects)
        rule = _found(given.pop("rule"), custom_objects)
        return from_rule(rule, **numbers, **given)


def from_rule(rule: Rule | str, **arguments: Any) -> RuleOptimizer:
    """A Keras optimizer of a rule, the user's own or a shipped one.

    Args:
        rule: what `pyupdate.rule` made of a function, or the name of a shipped rule
            (``pyupdate.kernels.rules.RULES``), such as "adamw".
        **arguments: the rule's numbers by their names, such as ``lr`` (a number, or a Keras
            schedule, whose steps begin at 0) and ``beta1``; and what every Keras optimizer takes:
            ``clipnorm``, ``global_clipnorm``, ``clipvalue``, ``use_ema``, ``ema_momentum``,
            ``ema_overwrite_frequency``, ``loss_scale_factor``, ``gradient_accumulation_steps``,
            ``name``.

    Returns:
        A ``keras.optimizers.Optimizer``, for `pyupdate.update_model`, ``model.compile`` or a loop
        of your own. It is saved with a model. A rule of your own is kept by its module and name,
        from which it is imported again; where that has none, give
        ``load_model(..., custom_objects={"its name": rule})``.

    Raises:
        TypeError: `rule` is none; a number is missing or unknown.
        ValueError: no shipped rule has that name, or the rule is around matrix products (Muon,
            Adafactor), which are not in its text.

    Example:
        >>> import keras, pyupdate
        >>> from pyupdate import keras_optim
        >>> @pyupdate.rule
        ... def descent(param, grad, lr):
        ...     param = param - lr * grad
        ...     return param
        >>> optimizer = keras_optim.from_rule(descent, lr=0.5)
        >>> weight = keras.Variable([1.0, 1.0])
        >>> optimizer.apply([keras.ops.array([0.5, 0.0])], [weight])
        >>> weight.numpy().tolist()
        [0.75, 1.0]
    """
    if isinstance(rule, str):
        rule = _found(rule)
    if not isinstance(rule, Rule):
        message = f"from_rule takes a pyupdate.rule or a name, but got a {type(rule).__name__}"
        raise TypeError(message)
    if rule.name in ("muon", "adafactor") and RULES[rule.name] is rule:
        message = f"rule '{rule.name}' is around matrix products: use keras.optimizers for it"
        raise ValueError(message)
    numbers = dict(rule.defaults) if isinstance(rule, OwnRule) else {}
    numbers |= {name: arguments.pop(name) for name in rule.numbers if name in arguments}
    if missing := [name for name in rule.numbers if name not in numbers]:
        message = f"from_rule({rule.name}) needs {', '.join(missing)}: give them by name"
        raise TypeError(message)
    if unknown := [name for name in arguments if name not in _OPTIONS]:
        message = (
            f"from_rule({rule.name}) takes no {', '.join(map(repr, unknown))}; its numbers are: "
            f"{', '.join(rule.numbers)}; its options: {', '.join(_OPTIONS)}"
        )
        raise TypeError(message)
    return RuleOptimizer(rule, numbers, **arguments)


_OPTIONS = (
    "clipnorm",
    "global_clipnorm",
    "clipvalue",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
    "loss_scale_factor",
    "gradient_accumulation_steps",
    "name",
)


def _identity(rule: Rule) -> str:
    """How a config names a rule: a shipped one's name, or module:name of the user's."""
    if RULES.get(rule.name) is rule:
        return rule.name
    assert isinstance(rule, OwnRule)
    return f"{rule.text.__module__}:{rule.text.__qualname__}"


def _found(name: str, custom_objects: Mapping[str, Any] | None = None) -> Rule:
    """The rule of that identity: Keras's custom objects come before what its module holds."""
    module, colon, inside = name.partition(":")
    simple = inside.rpartition(".")[2]
    given = keras.saving.get_registered_object(simple, custom_objects)
    if isinstance(given, Rule):
        return given
    if colon:
        try:
            return rule_at(module, inside)
        except (ImportError, AttributeError, TypeError) as error:
            message = (
                f"the rule '{simple}', by which this optimizer steps, is not {inside} of "
                f"module {module} ({error}): give custom_objects={{{simple!r}: the rule}}"
            )
            raise ValueError(message) from error
    if name not in RULES:
        message = f"no shipped rule is named {name!r}; there are {', '.join(RULES)}"
        raise ValueError(message)
    return RULES[name]
